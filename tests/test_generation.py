"""Statistics through `generate`: the same tokens, and the numbers of one forward over the final sequence."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import CACHE, tiny_model
from transformers import DynamicCache, StoppingCriteria
from transformers.models.llama import modeling_llama as upstream

from llama_attn import AttentionStats, AttentionStatsConfig, chat_segments
from llama_attn.observe.forward import Observed
from llama_attn.stats.merge import Run
from llama_attn.stats.step import Step
from llama_attn.testing import relative_error

EVERYTHING = AttentionStatsConfig(statistics="all", norms=True, map_size=8, top_k=30)
EOS = 2


@pytest.fixture
def prompt():
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model, prompt, config=None, **settings):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": EOS} | settings
    return model.generate(**prompt, return_dict_in_generate=True, output_attention_stats=config, **settings)


def fed_mask(sequences, mask, eos=EOS):
    """1 for every token that was fed and counts: the prompt and the new tokens before a row's end."""
    new = sequences[:, mask.shape[1] :]
    counted = torch.ones_like(new) if eos is None else ((new == eos).cumsum(-1) == 0).long()
    return torch.cat([mask, counted[:, :-1]], dim=-1)


def one_forward(model, sequences, mask, config=EVERYTHING) -> AttentionStats:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(
            sequences[:, : mask.shape[1]], attention_mask=mask, position_ids=positions, output_attention_stats=config
        ).attention_stats


def assert_same(actual: AttentionStats, expected: AttentionStats, bound=1e-9):
    # The median of a layer has no merged form, so that a run of several forwards is without it.
    left_out = () if actual.replayed else ("hidden_layer_median",)
    assert actual.names == tuple(name for name in expected.names if name not in left_out)
    assert actual.queries == expected.queries
    for name in actual.values:
        assert relative_error(actual[name], expected[name]) <= bound, name


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "several per prompt": {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunked prefill, static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beam search": {"num_beams": 3},
    "beams, several": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "beams without an end": {"num_beams": 3, "eos_token_id": None},
}


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, backend, prompt):
    model = tiny_model(backend, torch.float64)
    off = generate(model, prompt, **MODES[mode])
    on = generate(model, prompt, EVERYTHING, **MODES[mode])
    assert torch.equal(on.sequences, off.sequences)
    assert [type(on).__mro__[1] is type(off), off.get("attention_stats")] == [True, None]
    repeats = MODES[mode].get("num_return_sequences", 1)
    prompt_mask = prompt["attention_mask"].repeat_interleave(repeats, dim=0)
    mask = fed_mask(on.sequences, prompt_mask, MODES[mode].get("eos_token_id", EOS))
    assert_same(on.attention_stats, one_forward(model, on.sequences, mask))
    assert on.attention_stats.replayed == ("beam" in mode)
    assert on.attention_stats.queries == range(on.sequences.shape[1] - 1)


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_assisted_decoding(settings, prompt):
    model = tiny_model("sdpa", torch.float64)
    one = {
        "input_ids": prompt["input_ids"][1:].repeat(1, 2),
        "attention_mask": prompt["attention_mask"][1:].repeat(1, 2),
    }
    if "assistant_model" in settings:
        settings = {
            "assistant_model": upstream.LlamaForCausalLM(tiny_model(num_hidden_layers=1).config).double().eval()
        }
    off, on = (generate(model, one, config, **settings) for config in (None, EVERYTHING))
    assert torch.equal(on.sequences, off.sequences)
    assert on.attention_stats.replayed
    assert_same(on.attention_stats, one_forward(model, on.sequences, fed_mask(on.sequences, one["attention_mask"])))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_prompt_given_as_embeddings(settings, prompt):
    model = tiny_model("streaming", torch.float64)
    embeds = model.get_input_embeddings()(prompt["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": prompt["attention_mask"]}
    off, on = (generate(model, given, config, **settings) for config in (None, EVERYTHING))
    assert torch.equal(on.sequences, off.sequences)
    sequences = torch.cat([prompt["input_ids"], on.sequences], dim=-1)
    expected = one_forward(model, sequences, fed_mask(sequences, prompt["attention_mask"]))
    missing = {"duplicate_token", "induction"} | (set() if on.attention_stats.replayed else {"hidden_layer_median"})
    assert set(expected.names) - set(on.attention_stats.names) == missing
    for name in on.attention_stats.values:
        assert relative_error(on.attention_stats[name], expected[name]) <= 1e-9, name
    with pytest.raises(ValueError, match="'induction' needs the ids of all tokens"):
        generate(model, given, AttentionStatsConfig(statistics=("induction",)), **settings)


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("ends", [1, 3])
def test_a_row_that_ends_early(ends, cache, backend, prompt):
    """The row's later tokens are padding: NaN, and no part of any mean."""
    model = tiny_model(backend, torch.float64)
    free = generate(model, prompt, eos_token_id=None).sequences
    eos = int(free[1, 10 + ends])
    assert eos not in free[0, 11:], "the other row must go on"
    assert eos not in free[1, 11 : 10 + ends]
    settings = {"eos_token_id": eos, "cache_implementation": None if cache == "dynamic" else cache}
    off, on = (generate(model, prompt, config, **settings) for config in (None, EVERYTHING))
    assert torch.equal(on.sequences, off.sequences)
    mask = fed_mask(on.sequences, prompt["attention_mask"], eos)
    assert mask.sum(-1).tolist() == [7 + 11, 11 + ends - 1]
    assert_same(on.attention_stats, one_forward(model, on.sequences, mask))
    assert on.attention_stats["entropy"][:, 1, :, 11 + ends - 1 :].isnan().all()
    assert on.attention_stats["received"][:, 1, :, 11 + ends - 1 :].isnan().all()


def test_a_row_that_a_criterion_ends(prompt):
    class Second(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([False, input_ids.shape[1] >= 14])

    model = tiny_model("sdpa", torch.float64)
    settings = {"stopping_criteria": [Second()], "eos_token_id": 96}
    stats = generate(model, prompt, EVERYTHING, **settings).attention_stats
    assert (stats.visible_keys[1] > 0).sum() == 13
    assert (stats.visible_keys[0] > 0).sum() == 18


@pytest.mark.parametrize("config", [
    AttentionStatsConfig(statistics="all", norms=True, layers=(1,), heads=(2, 5), query_stride=3),
    AttentionStatsConfig(query_stride=4, map_size=3, norms=True),
    AttentionStatsConfig(statistics="all", map_size=1),
    AttentionStatsConfig(statistics=("distance_histogram", "logits_map"), map_size=16),
], ids=["selection", "stride", "one bin", "maps"])  # fmt: skip
@pytest.mark.parametrize("settings", [{"max_new_tokens": 25}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_selections(settings, config, prompt):
    model = tiny_model("streaming", torch.float64)
    on = generate(model, prompt, config, **settings)
    mask = fed_mask(on.sequences, prompt["attention_mask"])
    assert_same(on.attention_stats, one_forward(model, on.sequences, mask, config))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=str,
)
def test_generated_tokens_are_a_segment_of_their_own(settings, prompt):
    model = tiny_model("streaming", torch.float64)
    labels = [["a"] * 5 + ["b"] * 6, ["b"] * 10 + [None]]
    config = AttentionStatsConfig(segments=labels)
    on = generate(model, prompt, config, **settings)
    stats, repeats = on.attention_stats, settings.get("num_return_sequences", 1)
    assert stats.segments == ("a", "b", "generated")
    extended = [row + ["generated"] * (stats.num_keys - 11) for row in labels for _ in range(repeats)]
    mask = fed_mask(on.sequences, prompt["attention_mask"].repeat_interleave(repeats, dim=0))
    expected = one_forward(model, on.sequences, mask, AttentionStatsConfig(segments=extended))
    assert expected.segments == stats.segments
    assert_same(stats, expected)
    assert (stats["segment_mass"][:, :, :, 12:, 2].nan_to_num(1.0) > 0).all()


def test_continuing_a_cache(prompt):
    model = tiny_model("sdpa", torch.float64)
    ids = prompt["input_ids"][1:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :6], **{CACHE: cache})
    on = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, EVERYTHING, **{CACHE: cache})
    stats = on.attention_stats
    assert stats.queries == range(6, on.sequences.shape[1] - 1)
    whole = one_forward(model, on.sequences, torch.ones_like(on.sequences[:, :-1]))
    for name in ("entropy", "induction", "topk_weight", "sink_mass"):
        assert relative_error(stats[name], whole[name][:, :, :, 6:]) < 1e-9, name
    assert relative_error(stats["key_norm"], whole["key_norm"]) < 1e-9


def test_what_cannot_be_served_is_refused(prompt):
    model = tiny_model("sdpa")
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        model.generate(**prompt, output_attention_stats=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="continuous batching"):
        generate(model, prompt, True, cache_implementation="paged")
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[1, 2]], output_attention_stats=True)
    with pytest.raises(ValueError, match="not served"):
        generate(model, prompt, True, custom_generate=lambda *a, **k: None)
    with pytest.raises(ValueError, match="output_attention_stats: expected"):
        generate(model, prompt, "yes")
    with pytest.raises(ValueError, match=r"expected shape \(2, 11\)"):
        generate(model, prompt, AttentionStatsConfig(segments=torch.zeros(2, 12, dtype=torch.long)))


def test_off_returns_upstreams_own(prompt):
    model = tiny_model("sdpa")
    assert torch.is_tensor(model.generate(**prompt, max_new_tokens=2, pad_token_id=0))
    assert torch.is_tensor(model.generate(**prompt, max_new_tokens=2, pad_token_id=0, output_attention_stats=False))


@pytest.mark.smollm2
@pytest.mark.parametrize("mode", ["greedy", "static cache", "beam search"])
def test_smollm2(mode, smollm2, demo_chat):
    model, tokenizer = smollm2
    model.set_attn_implementation("streaming")
    labels = chat_segments(tokenizer, demo_chat)
    config = AttentionStatsConfig(statistics=("entropy", "received", "segment_mass"), segments=labels)
    settings = {"max_new_tokens": 8, "eos_token_id": tokenizer.eos_token_id} | MODES[mode]
    off, on = (generate(model.double(), demo_chat, c, **settings) for c in (None, config))
    assert torch.equal(on.sequences, off.sequences)
    stats = on.attention_stats
    mask = fed_mask(on.sequences, demo_chat["attention_mask"], tokenizer.eos_token_id)
    expected = one_forward(model, on.sequences, mask, AttentionStatsConfig(statistics=("entropy", "received")))
    for name in ("entropy", "received"):
        assert relative_error(stats[name], expected[name]) < 1e-8
    assert stats.segments == ("special", "system", "user", "generated")
    torch.testing.assert_close(stats["segment_mass"].sum(-1), torch.ones_like(stats["entropy"]))
    assert stats.with_tokens(tokenizer, on.sequences).tokens[0][0] == "<|im_start|>"


def test_a_run_lets_go_of_what_it_has_added(prompt):
    """Sums over queries of every step would be as much memory as the matrices that nobody holds."""
    model, config, cache = tiny_model("streaming"), AttentionStatsConfig(), None
    run, gone = Run(config), []
    for at in range(4):
        forward = model.observe(config, Step(first=at, prompt=1))
        with Observed(forward), torch.no_grad():
            cache = model(prompt["input_ids"][:, at : at + 1], **{CACHE: cache}).past_key_values
        measured = forward.measured()
        run.add(measured)
        gone.append(weakref.ref(measured.groups[0].raw["received"]))
    del forward, measured
    gc.collect()
    assert [tensor() for tensor in gone] == [None] * 4
    assert run.result().groups[0].raw["entropy"].shape[-1] == 4
