"""A statistic of one's own: what its two forms are given, what they may return, and what is said of common mistakes."""

from __future__ import annotations

import dataclasses
import traceback

import pytest
import torch
from conftest import tiny_model
from oracle import stock_of
from test_record import T5_CROSS, run_t5
from zoo import ENTRIES

from llama_attn import AttentionStats, AttentionStatsConfig, Statistic, record, register_statistic
from llama_attn.stats.rows import QUERY_DIMS as QUERY
from llama_attn.testing import assert_statistic_matches

KEY = ("layer", "batch", "head", "key")


def own(dims, stream, textbook, **more):
    return Statistic("own", dims, "-", "-", stream=stream, textbook=textbook, **more)


def count(block):
    return (block.weights > 0.1).sum(-1).to(block.weights.dtype)


def count_textbook(reference):
    return (reference.weights > 0.1).sum(-1)


@pytest.mark.parametrize(
    "statistic",
    [
        own(QUERY, count, count_textbook),
        own(QUERY, lambda b: (count(b) > 1).to(b.weights.dtype), lambda r: count_textbook(r) > 1),
        own(QUERY, lambda b: count(b).long(), lambda r: count_textbook(r).float(), dtype=torch.long),
        own(QUERY, lambda b: (count(b) > 1).int(), lambda r: count_textbook(r) > 1, dtype=torch.int32),
    ],
    ids=["whole numbers", "truth", "floats of whole numbers", "truth of whole numbers"],
)
def test_the_textbook_form_may_give_numbers_of_any_type(statistic):
    """What it gives of padding is no number, of whatever type."""
    assert_statistic_matches(statistic)
    wrong = dataclasses.replace(statistic, textbook=lambda r: statistic.textbook(r) != statistic.textbook(r) + 0.5)
    with pytest.raises(AssertionError, match=r"'own' in .* the streaming form is off by"):
        assert_statistic_matches(wrong)


@pytest.mark.parametrize(
    ("textbook", "found"),
    [
        # Of tokens of all keys, behind a cache; heads left out; what is no tensor, or no real number.
        (lambda r: r.weights.sum(-1).expand(-1, -1, r.num_keys),
         r"\(batch, head, query\) = \(2, 4, 1\) of torch.float64, got \(2, 4, 21\) of torch.float64"),
        (lambda r: r.weights.sum((1, 3)), r"\(2, 4, 1\) of torch.float64, got \(2, 1\) of torch.float64"),
        (lambda r: None, r"\(2, 4, 1\) of torch.float64, got None"),
        (lambda r: r.weights.sum(-1) + 0j, r"\(2, 4, 1\) of torch.float64, got \(2, 4, 1\) of torch.complex128"),
    ],
)  # fmt: skip
def test_a_textbook_form_that_returns_something_else(textbook, found):
    statistic = own(QUERY, lambda b: b.weights.sum(-1), textbook)
    with pytest.raises(ValueError, match=rf"^'own': expected its textbook form to return .*{found}\n'own' in \{{"):
        assert_statistic_matches(statistic)


def test_what_the_forms_raise_says_in_which_situation():
    statistic = own(QUERY, lambda b: b.weights.topk(2).values[..., 1], lambda r: r.weights.sum(-1))
    with pytest.raises(RuntimeError, match=r"out of range\n'own' in \{'queries': 1\}") as raised:
        assert_statistic_matches(statistic)
    assert "'own' in {'queries': 1}" in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("stream", "textbook"),
    [
        (lambda b: b.logits.mean(-1), lambda r: r.scores.nan_to_num(neginf=0).mean(-1)),
        (lambda b: b.centred.amin(-1), lambda r: r.scores.amin(-1) - r.scores.amax(-1)),
        (lambda b: b.logits.square().sum(-1), lambda r: r.scores.nan_to_num(neginf=0).square().sum(-1)),
    ],
)
def test_logits_of_hidden_keys_are_recognised(stream, textbook):
    hint = "; the logits of hidden keys mean nothing: use block.visible in the streaming form$"
    with pytest.raises(AssertionError, match=hint):
        assert_statistic_matches(own(QUERY, stream, textbook))
    large = own(QUERY, lambda b: 1e9 * b.weights.amax(-1), lambda r: 2e9 * r.weights.amax(-1))
    with pytest.raises(AssertionError, match=r"most at .*e\+09$|most at [^;]*$"):
        assert_statistic_matches(large)


@pytest.mark.parametrize(
    ("statistic", "situation"),
    [
        (own(QUERY, lambda b: b.weights.sum(-1), lambda r: r.visible.any(-1).expand(r.weights.shape[:-1])), "sinks"),
        (own(QUERY, lambda b: b.logits.amax(-1), lambda r: (r.query @ r.key.repeat_interleave(
            r.query.shape[1] // r.key.shape[1], 1).mT * r.scaling).masked_fill(~r.visible, -torch.inf).amax(-1)), "softcap"),
    ],
)  # fmt: skip
def test_what_is_true_of_a_llama_alone_is_found(statistic, situation):
    """Weights add up to 1 unless there is a learned sink; scores are products unless they are bounded."""
    with pytest.raises(AssertionError, match=rf"'own' in {{.*'{situation}': .*}}: the streaming form is off"):
        assert_statistic_matches(statistic)


def same_token(block):
    return block.mass(block.tokens[:, None] == block.row_tokens[..., None])


def same_token_textbook(reference):
    rows = reference.tokens[:, reference.query_slots]
    return (reference.weights * (reference.tokens[:, None] == rows[..., None])[:, None]).sum(-1)


def labelled(block):
    return block.mean((block.segments == 1).to(block.weights.dtype))


def kept(block):
    keep = block.keep.repeat_interleave(block.weights.shape[1] // block.keep.shape[1], 1)
    return (block.weights * keep[:, :, None]).sum(-1)


def kept_textbook(reference):
    keep = reference.keep.repeat_interleave(reference.weights.shape[1] // reference.keep.shape[1], 1)
    return (reference.weights * keep[:, :, None]).sum(-1)


def recorded(model, ids, config):
    with record(stock := stock_of(model), config):
        stock(ids)


def generated(model, ids, config):
    model.generate(ids, max_new_tokens=2, output_attention_stats=config, return_dict_in_generate=True)


MEASURE = {
    "model": lambda model, ids, config: model(ids, output_attention_stats=config),
    "record": recorded,
    "generate": generated,
}


@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize("of", MEASURE)
@pytest.mark.parametrize(
    ("need", "stream", "textbook"),
    [
        ("tokens", same_token, same_token_textbook),
        ("segments", labelled, lambda r: (r.weights * (r.segments == 1)[:, None, None]).sum(-1)),
        ("keep", kept, kept_textbook),
    ],
)
def test_what_a_statistic_takes_it_has_to_need(need, stream, textbook, of, ids):
    statistic = own(QUERY, stream, textbook, needs=need)
    assert_statistic_matches(statistic)
    unsaid = dataclasses.replace(statistic, needs=None)
    message = rf"^'own' needs `{need}`, which is not there; say so with Statistic\(…, needs=\"{need}\"\)"
    with pytest.raises(ValueError, match=message):
        assert_statistic_matches(unsaid)
    other = dataclasses.replace(statistic, needs="keep" if need == "tokens" else "tokens")
    both = rf'\("{other.needs}", "{need}"\)'
    message_of_other = rf"'own' needs `{need}`, which is not there; say so with Statistic\(…, needs={both}\)"
    with pytest.raises(ValueError, match=message_of_other):
        assert_statistic_matches(other)
    register_statistic(unsaid)
    config, model = AttentionStatsConfig(statistics="own"), tiny_model()
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        MEASURE[of](model, ids, config)


def same_token_labelled(block):
    return block.mass((block.tokens[:, None] == block.row_tokens[..., None]) & (block.segments == 1)[:, None])


def same_token_labelled_textbook(reference):
    same = reference.tokens[:, None] == reference.tokens[:, reference.query_slots][..., None]
    return (reference.weights * (same & (reference.segments == 1)[:, None])[:, None]).sum(-1)


@pytest.mark.usefixtures("restored_registry")
def test_a_statistic_may_need_several_things(ids):
    """With all of them it is measured, named or not, as others that need one; without, it is refused if it is named."""
    statistic = own(QUERY, same_token_labelled, same_token_labelled_textbook, needs=["tokens", "segments"])
    assert_statistic_matches(statistic)
    register_statistic(statistic)
    model, segments = tiny_model("streaming"), torch.arange(ids.shape[1]).expand_as(ids) % 3
    with torch.no_grad():
        measured = model(ids, output_attention_stats=AttentionStatsConfig(segments=segments)).attention_stats
        embeddings = model.get_input_embeddings()(ids)
        without_ids = model(
            inputs_embeds=embeddings, output_attention_stats=AttentionStatsConfig(segments=segments)
        ).attention_stats
        rows = model(ids, output_attention_stats=AttentionStatsConfig(statistics="row_weights", rows=slice(None)))
        asked = AttentionStatsConfig(statistics="own", segments=segments)
        with pytest.raises(ValueError, match="'own' needs the ids of all tokens"):
            model(inputs_embeds=embeddings, output_attention_stats=asked)
        with pytest.raises(ValueError, match=r"'own' needs `segments` in the AttentionStatsConfig$"):
            model(ids, output_attention_stats=AttentionStatsConfig(statistics="own"))
    same = (ids[:, None] == ids[..., None]) & (segments == 1)[:, None]
    weights = rows.attention_stats["row_weights"].nan_to_num()
    torch.testing.assert_close(measured["own"], (weights * same[:, None]).sum(-1))
    assert "own" not in without_ids
    assert "segment_mass" in without_ids


@pytest.mark.parametrize(
    ("stream", "textbook"),
    [
        (lambda b: b.key_slots[b.weights.argmax(-1)], lambda r: r.weights.argmax(-1) + r.offset),
        (lambda b: b.key_slots[b.weights.argmax(-1)] + b.visibility.offset, lambda r: r.weights.argmax(-1)),
    ],
)
def test_a_position_is_no_slot_where_a_cache_has_dropped_keys(stream, textbook):
    right = own(
        QUERY, lambda b: b.key_slots[b.weights.argmax(-1)] + b.visibility.offset,
        lambda r: r.weights.argmax(-1) + r.offset, dtype=torch.long,
    )  # fmt: skip
    assert_statistic_matches(right)
    with pytest.raises(AssertionError, match="'dropped': 9}: the streaming form is off by"):
        assert_statistic_matches(dataclasses.replace(right, stream=stream, textbook=textbook))


@pytest.mark.parametrize(
    "given",
    [
        (QUERY, lambda b: b.weights.sum(-1).double(), lambda r: r.weights.sum(-1)),
        (("layer", "batch", "kv_head", "key"), lambda k: k.double().norm(dim=-1), lambda r: r.key.norm(dim=-1), "key"),
    ],
)
def test_a_type_that_float64_would_hide(given):
    dims, stream, textbook, observes = (*given, "block")[:4]
    with pytest.raises(ValueError, match=r"streaming form to return .* of torch.float32, got .* of torch.float64"):
        assert_statistic_matches(own(dims, stream, textbook, observes=observes))


@pytest.mark.usefixtures("restored_registry")
def test_whole_numbers_of_distances_in_cross_attention():
    """They are −1 where floats are NaN."""

    def last(block):
        return block.distance(block.keys.start, block.keys.stop).expand_as(block.weights)[..., -1].contiguous()

    register_statistic(own(QUERY, last, lambda r: r.distance[..., -1], of_distance=True, dtype=torch.long))
    model = ENTRIES["t5"].build()
    with record(model, AttentionStatsConfig(statistics=("own", "entropy")), stack=T5_CROSS) as recording:
        run_t5(model)
    assert recording.stats.direction == "cross"
    assert recording.stats["own"].shape == recording.stats["entropy"].shape
    assert recording.stats["own"].eq(-1).all()


@pytest.mark.usefixtures("restored_registry")
def test_whole_numbers_of_rows_that_another_text_does_not_have():
    dims = ("layer", "batch", "head", "row", "key")
    register_statistic(
        own(
            dims, lambda b: (b.weights > 0.1).long(), lambda r: (r.weights > 0.1).long(), needs="rows", dtype=torch.long
        )
    )
    generator = torch.Generator().manual_seed(7)
    alone = []
    for length in (9, 12):
        ids = torch.randint(3, 97, (1, length), generator=generator)
        with torch.no_grad():
            config = AttentionStatsConfig(statistics="own", rows=(-1,))
            alone.append(tiny_model()(ids, output_attention_stats=config).attention_stats)
    found = AttentionStats.concat(alone)
    assert found.rows == (8, 11)
    assert torch.equal(found["own"][:, :1, :, :1, :9], alone[0]["own"])
    assert found["own"][:, 0, :, 1].eq(-1).all()


def per_query(total, counts, config):
    return total / counts.visible_queries_per_head


def test_a_sum_is_divided_by_those_who_saw():
    def textbook(reference):
        seen = (reference.visible & reference.real_queries[:, None, :, None]).sum(-2)
        return (reference.weights * reference.real_queries[:, None, :, None]).square().sum(-2) / seen

    right = own(KEY, lambda b: b.weights.square().sum(-2), textbook, finish=per_query)
    assert_statistic_matches(right)
    # (batch, key) is none of (layer, batch, head, key).
    wrong = dataclasses.replace(right, finish=lambda total, counts, config: total / counts.visible_queries)
    with pytest.raises(RuntimeError, match=r"size of tensor .*\n'own' in \{'queries': 1\}"):
        assert_statistic_matches(wrong)
