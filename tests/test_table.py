"""The table of statistics is complete, and a user's entry works like a built-in one."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from corpora import measured, write
from oracle import capture, errors, expected, stock_of
from test_cli import invoke
from trainers import trainer_for

import llama_attn
from llama_attn import AttentionStatsConfig, Statistic, register_statistic
from llama_attn.analysis import head_means
from llama_attn.observe.training import AttentionStatsCallback
from llama_attn.stats.rows import QUERY_DIMS as QUERY
from llama_attn.stats.table import DIMENSIONS, default_statistics, statistics_table
from llama_attn.testing import assert_statistic_matches
from llama_attn.viz import plot_head_grid, plot_layer_profile

PACKAGE = Path(llama_attn.__file__).parent
DEFAULT = {
    "entropy", "logsumexp", "max_logit", "max_weight", "sink_mass", "local_mass", "mean_distance", "received",
}  # fmt: skip
NORMS = {
    "hidden_norm", "hidden_max", "hidden_max_channel", "hidden_median", "hidden_top", "hidden_top_channel",
    "hidden_layer_median", "key_norm", "value_norm", "key_mean_norm", "value_mean_norm", "value_output_norm",
}  # fmt: skip

# What they need to be measured; it adds them.
ASKED_FOR = {"segment_mass": "segments", "row_weights": "rows", "kept_mass": "keep"}


def test_the_table():
    table = statistics_table()
    assert set(default_statistics()) == DEFAULT
    assert {name for name, statistic in table.items() if statistic.is_norm} == NORMS
    others = {
        "effective_keys", "received_total", "weights_map", "logits_map", "distance_histogram", "topk_weight",
        "topk_position", "previous_token", "duplicate_token", "induction", "learned_sink_mass", "weight_count",
        "weight_mass",
    }  # fmt: skip
    assert set(table) == DEFAULT | NORMS | set(ASKED_FOR) | others
    for name, statistic in table.items():
        assert name == statistic.name
        assert statistic.unit
        assert statistic.source
        assert statistic.meaning
        assert set(statistic.dims) <= set(DIMENSIONS)


def test_what_a_configuration_measures(ids):
    model = tiny_model()

    def names(**settings):
        with torch.no_grad():
            stats = model(ids, output_attention_stats=AttentionStatsConfig(**settings)).attention_stats
        return set(stats.names)

    segments = torch.zeros_like(ids)
    assert names() == DEFAULT
    assert names(statistics=["entropy"]) == names(statistics="entropy") == {"entropy"}
    assert names(statistics=("entropy", "key_norm")) == {"entropy", "key_norm"}
    assert names(norms=True) == DEFAULT | NORMS
    assert names(statistics=(), norms=True) == NORMS
    assert names(statistics="all") == set(statistics_table()) - NORMS - set(ASKED_FOR)
    given = {"segments": segments, "rows": (-1,), "keep": segments == 0}
    assert names(statistics="all", **given, norms=True) == set(statistics_table())
    for name, need in ASKED_FOR.items():
        assert names(**{need: given[need]}) == DEFAULT | {name}
        with pytest.raises(ValueError, match=f"{name!r} needs `{need}`"):
            names(statistics=(name,))


def varentropy(block):
    mean = (block.weights * block.logits).sum(-1, keepdim=True)
    return (block.weights * (block.logits - mean).square()).sum(-1)


def varentropy_textbook(reference):
    scores = torch.where(reference.visible, reference.scores, 0)
    mean = (reference.weights * scores).sum(-1, keepdim=True)
    return (reference.weights * (scores - mean).square()).sum(-1)


@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_a_statistic_written_elsewhere(backend, ids, left_padding, tmp_path):
    dims = ("layer", "batch", "head", "query")
    register_statistic(
        Statistic("varentropy", dims, "nat²", "entropix", stream=varentropy, textbook=varentropy_textbook)
    )
    register_statistic(
        Statistic("total", dims[:3], "attention", "here", stream=lambda block: block.weights.sum((-1, -2)),
                  textbook=lambda r: torch.where(r.real_queries[:, None, :, None], r.weights, 0).sum((-1, -2)))
    )  # fmt: skip
    model = tiny_model(backend, torch.float64)
    config = AttentionStatsConfig(statistics=("varentropy", "total", "entropy"))
    inputs = {"input_ids": ids, "attention_mask": left_padding}
    with torch.no_grad():
        stats = model(**inputs, output_attention_stats=config).attention_stats
    wanted = expected(*capture(stock_of(model), **inputs), config, stats.names, real=left_padding.bool())
    assert max(errors(stats, wanted).values()) < 1e-10
    assert stats["varentropy"].nanmean() > 0
    assert stats["total"][0, :, 0].tolist() == pytest.approx([28, 37])
    assert stats.to_xarray()["varentropy"].attrs["units"] == "nat²"


@pytest.mark.usefixtures("restored_registry")
def test_bad_registrations():
    entropy = statistics_table()["entropy"]
    with pytest.raises(ValueError, match="'entropy' is built in"):
        register_statistic(entropy)
    with pytest.raises(TypeError, match="expected a Statistic"):
        register_statistic("entropy")
    for name in ("key", "visible_keys", "query_token", ""):
        with pytest.raises(ValueError, match="name: expected a string other than"):
            register_statistic(dataclasses.replace(entropy, name=name))
    assert dataclasses.replace(entropy, dims=list(entropy.dims)) == entropy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": ("head", "batch")}, r"dims: expected .*in the order of \['layer', .*'query', .* for 'entropy'"),
        ({"dims": ("layer", "batch", "banana")}, "dims: expected"),
        ({"dims": ("layer", "batch", "query", "head")}, "dims: expected"),
        ({"dims": ("layer", "batch", "head", "query", "query")}, "dims: expected"),
        ({"dims": ("layer", "hidden_layer", "batch")}, "dims: expected"),
        ({"dims": "layer"}, "dims: expected"),
        ({"dims": ("batch", "head", "query")}, "dims: expected"),
        ({"dims": ()}, "dims: expected"),
        ({"dims": ("layer", "batch", "head", "query", "key")}, "a matrix of T × T, see `weights_map`"),
        (
            {"dims": ("layer", "batch", "query")},
            r"dims: 'entropy' observes 'block': expected \['layer', 'batch', 'head'\], then one of \['', 'query', .*, got "
            r"\('layer', 'batch', 'query'\); keep the axis of heads, and sum over it in what has been measured",
        ),
        ({"dims": ("layer", "batch")}, "keep the axis of heads"),
        ({"dims": ("layer", "batch", "head", "kv_head", "query")}, "'entropy' observes 'block': expected"),
        ({"dims": ("layer", "batch", "head", "key", "rank")}, "none behind keys or bins of positions"),
        ({"dims": ("layer", "batch", "head", "distance_bin", "rank")}, "none behind keys or bins of positions"),
        ({"dims": ("layer", "batch", "head", "query", "key_bin")}, "'entropy' observes 'block': expected"),
        ({"dims": ("layer", "batch", "head", "row")}, "'entropy' observes 'block': expected"),
        (
            {"dims": ("layer", "batch", "head", "row", "key")},
            "needs: expected 'rows' and nothing else for 'entropy' if",
        ),
        (
            {"needs": "rows"},
            "needs: expected 'rows' and nothing else for 'entropy' if and only if it has the axis 'row', got 'rows'",
        ),
        (
            {"dims": ("layer", "batch", "head", "row", "key"), "needs": ["rows", "tokens"]},
            r"needs: expected 'rows' and nothing else .*, got \('rows', 'tokens'\)",
        ),
        ({"dims": ("hidden_layer", "batch", "query")}, "'entropy' observes 'block': expected .*'layer', 'batch'"),
        ({"observes": "hidden"}, r"'entropy' observes 'hidden': expected \['hidden_layer', 'batch'\], .*'query'"),
        ({"observes": "key"}, r"'entropy' observes 'key': expected \['layer', 'batch'\], .*'kv_head key'"),
        ({"observes": "value", "dims": ("layer", "batch", "kv_head", "query")}, "'entropy' observes 'value': expected"),
        ({"observes": "value_output", "dims": ("layer", "batch", "key")}, "'value_output': .*keep the axis of"),
        ({"observes": "key", "dims": ("layer", "batch", "key"), "needs": "tokens"}, "needs: expected None for"),
        ({"observes": "key", "dims": ("layer", "batch", "key"), "finish": max}, "finish: expected None for 'entropy'"),
        ({"parts": (2,), "finish": max}, r"parts: expected \(\) for 'entropy', .* got \(2,\)"),
        ({"parts": (2,), "dims": ("layer", "batch", "head")}, r"parts: expected \(\) for"),
        ({"dtype": torch.float16}, r"dtype: expected one of \[None, torch.int8, .* for 'entropy', got torch.float16"),
        ({"observes": "foo"}, r"observes: expected one of \['block', .*'value_output'\] for 'entropy', got 'foo'"),
        (
            {"dims": (*QUERY, "segment")},
            "needs: expected 'segments' for 'entropy', which has the axis 'segment', got None",
        ),
        ({"needs": "token"}, r"needs: expected some of \['segments', 'tokens', .*\] for 'entropy', got \['token'\]"),
        ({"needs": ("tokens", 5)}, r"needs: expected some of \['segments', .*\] for 'entropy', got \[5\]"),
        ({"needs": 5}, r"needs: expected some of \['segments', .*\] for 'entropy', got \[5\]"),
    ],
)
def test_axes_of_a_statistic(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(statistics_table()["entropy"], **changes)


@pytest.mark.parametrize("form", ["stream", "textbook", "finish"])
def test_forms_of_a_statistic(form):
    with pytest.raises(TypeError, match=f"{form}: expected a function for 'entropy', got 'entropy'"):
        dataclasses.replace(statistics_table()["entropy"], **{form: "entropy"})


@pytest.mark.parametrize("name", [*statistics_table(), "varentropy"])
def test_streaming_forms_are_textbook_forms(name):
    own = Statistic("varentropy", QUERY, "nat²", "entropix", stream=varentropy, textbook=varentropy_textbook)
    assert_statistic_matches(statistics_table().get(name, own))


def of_all_rows(block):
    return block.exponentials.sum(-1).div(block.row_sum).sum(-1)


def unsigned(block):
    return block.mean((block.key_slots - block.first_key).to(block.exponentials.dtype))


def first_of_block(block):
    return block.weights[..., 0]


@pytest.mark.parametrize(
    ("stream", "textbook", "dims", "message"),
    [
        # Forgets that padding is no query; a mean of the mean; the first key of the block, which a window moves.
        (of_all_rows, lambda r: torch.where(r.real_queries[:, None, :, None], r.weights, 0).sum((-1, -2)),
         ("layer", "batch", "head"), r"'own' in \{'queries': 33.*'left'\}: the streaming form is off by"),
        (varentropy, lambda r: varentropy_textbook(r).sqrt(), QUERY, r"'queries': 7.*the streaming form is off by"),
        (first_of_block, lambda r: r.weights[..., 0], QUERY, "'window': 7}: the streaming form is off by"),
        (unsigned, lambda r: (r.weights * torch.arange(r.num_keys)).sum(-1), QUERY, "'window': 7}: the streaming"),
        (lambda b: b.weights.sum(-1) * torch.nan, lambda r: r.weights.sum(-1), QUERY, "not finite on one side only"),
        # Hidden keys have scores −∞ in the one and were forgotten in the other.
        (lambda b: b.logits.amin(-1), lambda r: r.scores.amin(-1), QUERY, "not finite on one side only"),
        (lambda b: b.weights.sum(-1), lambda r: r.weights.sum(-1) * torch.inf, QUERY, "expected inf, got"),
    ],
)  # fmt: skip
def test_the_check_of_a_statistic_can_fail(stream, textbook, dims, message):
    with pytest.raises(AssertionError, match=message):
        assert_statistic_matches(Statistic("own", dims, "-", "-", stream=stream, textbook=textbook))


KEY = ("layer", "batch", "head", "key")


def squares(block):
    return block.weights.square().sum(-2)


def squares_textbook(reference):
    return (reference.weights * reference.real_queries[:, None, :, None]).square().sum(-2)


def test_the_check_of_a_statistic_says_that_padding_was_counted():
    own = Statistic("own", KEY, "-", "-", stream=squares, textbook=squares_textbook)
    assert_statistic_matches(own)
    hint = "; the difference is of padded rows: leave them out of the textbook form with reference.real_queries$"
    padded = dataclasses.replace(own, textbook=lambda reference: reference.weights.square().sum(-2))
    with pytest.raises(AssertionError, match=r"'padding': 'right'}: the streaming form is off by .*" + hint):
        assert_statistic_matches(padded)
    other = dataclasses.replace(own, stream=lambda block: block.weights.pow(3).sum(-2), textbook=padded.textbook)
    with pytest.raises(AssertionError, match=r"above 1.49e-08, most at [^;]+$"):
        assert_statistic_matches(other)
    # Right wherever nothing is padded, and wrong in more than padding where something is.
    twice = dataclasses.replace(
        own, textbook=lambda r: padded.textbook(r) * (1 + ~r.real_queries.all(1)[:, None, None])
    )
    with pytest.raises(AssertionError, match=r"'padding': 'left'}.*above 1.49e-08, most at [^;]+$"):
        assert_statistic_matches(twice)


@pytest.mark.parametrize(
    ("dtype", "wrong", "message"),
    [
        (None, 1.25, r"off by 1.11e-01, above 1.49e-08, most at batch 1, head 2, query 5: expected 1.25, got 1$"),
        (None, torch.inf, r"not finite on one side only, first at batch 1, head 2, query 5: expected inf, got 1$"),
        (torch.long, 3, r"off by 5.00e-01, above 0.00e\+00, most at batch 1, head 2, query 5: expected 3, got 1$"),
    ],
)
def test_the_check_of_a_statistic_says_where(dtype, wrong, message):
    def ones(weights):
        return torch.ones_like(weights[..., 0], dtype=dtype)

    def textbook(reference):
        values = ones(reference.weights)
        values[1:, 2:3, 5:6] = wrong
        return values

    own = Statistic("own", QUERY, "-", "-", stream=lambda block: ones(block.weights), textbook=textbook, dtype=dtype)
    with pytest.raises(AssertionError, match=r"^'own' in \{'queries': 7, .*" + message):
        assert_statistic_matches(own)


SHAPE = r"\(2, \d+, \d+\) of torch.float\d\d"
ROWS = ("layer", "batch", "head", "row", "key")
STATES = ("hidden_layer", "batch", "query")
OF_KEYS = ("layer", "batch", "kv_head", "key")


def check_refused(own, message, ids):
    """By the check of a statistic, and by a model that is asked for it."""
    with pytest.raises(ValueError, match=message):
        assert_statistic_matches(own)
    register_statistic(own)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        tiny_model()(ids, output_attention_stats=AttentionStatsConfig(statistics="own"))


@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((QUERY, lambda b: b.weights.sum(-1, keepdim=True)), rf"\(batch, head, query\) = {SHAPE}, got \(2, \d+, \d+, 1\)"),
        ((QUERY, lambda b: b.weights.sum((1, 3))), rf"\(batch, head, query\) = {SHAPE}, got \(2, \d+\) of"),
        ((QUERY, lambda b: b.weights.argmax(-1)),
         rf"\(batch, head, query\) = {SHAPE}, got .* of torch.int64; give counts in .*, as .to\(block.weights.dtype\), whose "
         r"padding is NaN; of positions say so with Statistic\(…, dtype=torch.int64\), whose padding is −1"),
        ((QUERY, lambda b: b.weights.sum(-1) > 1), r"got .* of torch.bool; give counts in .* padding is NaN(\n'own' in \{.*\})?$"),
        ((QUERY, lambda b: b.weights.sum(-1).bfloat16()), rf"\(batch, head, query\) = {SHAPE}, got .* of torch.bfloat16"),
        ((QUERY, lambda b: b.weights.sum(-1), torch.long), r" of torch.int64, got .* of torch.float"),
        ((QUERY, lambda b: 1.5), rf"\(batch, head, query\) = {SHAPE}, got 1.5"),
        ((QUERY, lambda b: None), rf"\(batch, head, query\) = {SHAPE}, got None"),
        ((KEY[:3], lambda b: b.weights.sum(-1)), r"\(batch, head\) = \(2, \d+\) of .*, got \(2, \d+, \d+\)"),
        ((KEY, lambda b: b.weights.sum(-2)[..., :-1]), rf"\(batch, head, key\) = {SHAPE}, got \(2, \d+, \d+\)"),
        (((*QUERY, "rank"), lambda b: b.weights[..., :1]), r"\(batch, head, query, rank\) = \(2, \d+, \d+, [38]\) of"),
        ((("layer", "batch", "head", "distance_bin"), lambda b: b.weights.new_zeros(*b.row_sum.shape[:2], 9)),
         r"\(batch, head, distance_bin\) = \(2, \d+, \d\) of"),
        ((STATES, lambda states: states), rf"\(batch, query\) = \(2, \d+\) of .*, got {SHAPE}"),
        ((STATES, lambda states: states.norm(dim=-1).half()), r"\(batch, query\) = .*, got .* of torch.float16"),
        ((STATES, lambda states: 3), r"\(batch, query\) = .*, got 3(\n'own' in \{.*\})?$"),
        (((*STATES, "rank"), lambda states: states[..., :1]), r"\(batch, query, rank\) = \(2, \d+, [38]\) of"),
        ((OF_KEYS, lambda key: key.sum((1, 3)), None, "key"), rf"\(batch, kv_head, key\) = {SHAPE}, got \(2, \d+\) of"),
        ((OF_KEYS, lambda value: value.argmax(-1), None, "value"), rf"\(batch, kv_head, key\) = {SHAPE}, got .*int64"),
        ((KEY, lambda value, weight: value.norm(dim=-1), None, "value_output"), rf"\(batch, head, key\) = {SHAPE}, got"),
    ],
)  # fmt: skip
def test_a_streaming_form_that_returns_something_else(given, message, ids):
    dims, stream, dtype, observes = (*given, *(None, "block")[len(given) - 2 :])
    observes = "hidden" if dims[0] == "hidden_layer" else observes
    own = Statistic(
        "own", dims, "-", "-", stream=stream, dtype=dtype, observes=observes, textbook=lambda reference: reference.weights,
    )  # fmt: skip
    message = f"^'own': expected its streaming form to return .*{message}"
    check_refused(own, message, ids)


@pytest.mark.usefixtures("restored_registry")
def test_a_finish_that_returns_something_else(ids):
    own = Statistic(
        "own", KEY[:3], "-", "-", stream=lambda block: block.weights.sum((-1, -2)), textbook=lambda reference: None,
        finish=lambda total, counts, config: total[..., None],
    )  # fmt: skip
    message = (
        r"^'own': expected its finish to return \(layer, batch, head\) = \(\d, 2, \d\) of .*, got \(\d, 2, \d, 1\)"
    )
    check_refused(own, message, ids)


@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize("backend", ["sdpa", "streaming", "streaming_torch"])
def test_rows_of_a_users_own(backend, ids, left_padding):
    """The streaming form gives all rows of its block; those that are wanted are taken from it."""
    own = Statistic(
        "squares", ROWS, "probability²", "here", needs="rows", stream=lambda block: block.weights.square(),
        textbook=lambda r: r.weights.square().masked_fill(~r.real_queries[:, None, :, None], torch.nan),
    )  # fmt: skip
    assert_statistic_matches(own)
    register_statistic(own)
    config = AttentionStatsConfig(statistics=("entropy",), rows=(3, 12, 13, -1))
    with torch.no_grad():
        model = tiny_model(backend, torch.float64)
        stats = model(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats
    assert stats["squares"].shape == (3, 2, 6, 4, 37)
    assert stats["squares"][:, 0, :, 0].isnan().all()
    torch.testing.assert_close(stats["squares"], stats["row_weights"].square(), equal_nan=True)


def imports_of(module: str) -> set[str]:
    """Modules of llama_attn that ``module`` names in its imports, those for the type checker among them."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return set()
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    named = {node.module for node in nodes} | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    return {name.removeprefix("llama_attn.") for name in named if name.startswith("llama_attn.")}


@pytest.mark.parametrize("module", ["table", "config", "reference", "visibility", "scoring", "block", "rows", "maps"])
def test_definitions_and_configuration_do_not_go_in_circles(module):
    start = f"stats.{module}"
    reached, left = set(), [start]
    while left:
        new = imports_of(left.pop()) - reached
        reached |= new
        left += new
    assert start not in reached
    assert reached or module == "scoring"


@pytest.mark.usefixtures("restored_registry")
def test_whole_numbers_have_no_mean(ids, tmp_path):
    """Positions with −1 for none; every reader that averages says so before it does."""

    def farthest(block):
        return block.weights.argmax(-1)

    def textbook(reference):
        return reference.weights.argmax(-1)

    register_statistic(Statistic("place", QUERY, "position", "-", farthest, textbook, dtype=torch.long))
    config = AttentionStatsConfig(statistics=("entropy", "place"))
    with torch.no_grad():
        dataset = tiny_model()(ids, output_attention_stats=config).attention_stats.to_xarray()
    whole = "whole numbers are positions or channels, with −1 for none; a count has a mean if it is of floats"
    for read in (head_means, plot_layer_profile, plot_head_grid):
        with pytest.raises(ValueError, match=rf"one of \['entropy'\], got 'place', {whole}"):
            read(dataset, "place")
    write(tmp_path / "texts", count=5)
    with pytest.raises(ValueError, match=rf"\['place'\] do not add up over texts: {whole}"):
        measured(tmp_path / "texts", tmp_path / "out", config=config)
    refused = invoke("corpus", "no model", tmp_path / "texts", "--out", tmp_path / "out", "--statistics", "place")
    assert refused.exit_code == 2
    assert f"['place'] do not add up over texts: {whole}" in refused.output
    with pytest.raises(ValueError, match=rf"which have a mean, got \['place'\]: {whole}"):
        AttentionStatsCallback(trainer_for(tiny_model(), tmp_path), statistics="place")
