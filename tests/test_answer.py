"""What an answer draws on: retrieval heads, lookback ratio, streaming heads and sources, against weights written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model
from oracle import stock_of
from written_out import Written, close

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import (
    keep_mask,
    lookback_ratio,
    received_norm,
    retrieval_heads,
    sources,
    streaming_heads,
)

PROMPT, NEW = 30, 8
NAMES = ("system", "left", "right")
WINDOW = 5
STATISTICS = (
    "topk_position", "topk_weight", "sink_mass", "local_mass", "mean_distance", "entropy", "previous_token",
    "duplicate_token", "induction", "received_total", "value_output_norm",
)  # fmt: skip


def segments_of(padding):
    """A prompt of three parts, of which the first begins with the first real token; the token before last in none."""
    labels = [None] * padding + ["system"] * 6 + ["left"] * 5 + ["right"] * 17 + [None, "right"]
    return [*labels, *[None] * (PROMPT - len(labels))][:PROMPT]


class Words:
    """A tokenizer whose tokens are named by their ids."""

    def convert_ids_to_tokens(self, ids):
        return [f"t{number}" for number in ids]


class Run:
    """A run of generate over two rows, the second behind padding, and its weights written out in float64."""

    def __init__(self, rows="generated", **settings):
        self.prompt = torch.randint(3, 97, (2, PROMPT), generator=torch.Generator().manual_seed(5))
        self.real = torch.ones_like(self.prompt)
        self.real[1, :4] = 0
        self.segments = [segments_of(0), segments_of(4)]
        self.segments[1][-1] = "right"
        config = AttentionStatsConfig(
            statistics=STATISTICS, segments=self.segments, rows=rows, window=WINDOW, **settings
        )
        model = tiny_model(dtype=torch.float64)
        output = model.generate(
            self.prompt, attention_mask=self.real, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            return_dict_in_generate=True, pad_token_id=0, output_attention_stats=config,
        )  # fmt: skip
        self.sequences = output.sequences
        self.stats = output.attention_stats.with_tokens(Words(), self.sequences)
        self.ds = self.stats.to_xarray()
        fed = self.sequences[:, :-1]
        real = torch.cat([self.real, torch.ones(2, NEW - 1, dtype=torch.long)], 1)
        written = Written(
            fed, real, AttentionStatsConfig(statistics="entropy"), position_ids=(real.cumsum(-1) - 1).clamp(min=0)
        )
        self.weights, self.visible = written.weights, written.visible
        self.length = PROMPT + NEW - 1
        self.labels = [[*row, *["generated"] * (NEW - 1)] for row in self.segments]
        self.answering = range(PROMPT - 1, self.length)


@pytest.fixture(scope="module")
def run():
    return Run()


def test_retrieval_heads(run):
    """Whether a head copies is not left to chance: the answer is made of what some heads attend most."""
    needle = (6, 12)
    ds = run.ds.copy(deep=True)
    strings = ds.key_token.values
    strings[:, needle[0] : needle[1]] = [f"n{at}" for at in range(*needle)]
    # The tokens at 30 … 36 are drawn by the queries at 29 … 35.
    for b in range(2):
        strings[b, PROMPT : PROMPT + 4] = ["n6", "n9", "n9", "n11"]
    ds.topk_position[:] = 0
    ds.topk_position[1, 0, 2, PROMPT - 1 : PROMPT + 3, 0] = [6, 9, 9, 8]
    ds.topk_position[2, 1, 5, PROMPT - 1 : PROMPT + 3, 0] = [6, 9, 6, 11]
    ds.topk_position[2, 1, 5, 35, 0] = 9
    # Outside of the needle, or not the most attended key.
    ds.topk_position[0, 0, 0, PROMPT - 1, 1] = 6
    found = retrieval_heads(ds, needle)
    score, steps = np.zeros((3, 2, 6)), np.zeros((3, 2, 6))
    score[1, 0, 2], steps[1, 0, 2] = 2 / 6, 3
    score[2, 1, 5], steps[2, 1, 5] = 3 / 6, 3
    close(found.score, score)
    close(found.steps, steps)
    np.testing.assert_array_equal(found.retrieval, score > 0.1)
    assert found.attrs["needle"] == [6, 12]


def test_retrieval_heads_of_weights(run):
    """Of the run as it is, against the definition: which keys are attended most, and what was generated."""
    needle = (0, PROMPT)
    score = np.zeros((3, 2, 6))
    for b in range(2):
        for layer in range(3):
            for head in range(6):
                copied = {
                    int(run.weights[layer, b, head, i].argmax())
                    for i in run.answering[:-1]
                    if int(run.sequences[b, run.weights[layer, b, head, i].argmax()]) == int(run.sequences[b, i + 1])
                }
                score[layer, b, head] = len(copied & set(range(PROMPT))) / PROMPT
    close(retrieval_heads(run.ds, needle).score, score)
    assert score.max() > 0, "some head copies"


@pytest.mark.parametrize("context", [None, "left", ("system", "right")])
def test_lookback_ratio(context, run):
    names = None if context is None else {context} if isinstance(context, str) else set(context)
    found = lookback_ratio(run.ds, context)
    assert found.dims == ("layer", "batch", "head", "query")
    assert found["query"].values.tolist() == list(run.answering)
    assert found.generated.values.tolist() == [i + 1 for i in run.answering]
    for b in range(2):
        for place, i in enumerate(run.answering):
            keys = np.flatnonzero(run.visible[b, i])
            new = [key for key in keys if key >= PROMPT]
            old = [key for key in keys if key < PROMPT and (names is None or run.labels[b][key] in names)]
            on_old = run.weights[:, b, :, i][..., old].mean(-1)
            with np.errstate(invalid="ignore"):
                on_new = run.weights[:, b, :, i][..., new].sum(-1) / len(new) if new else np.nan
            close(found[:, b, :, place], on_old / (on_old + on_new))
    assert np.isnan(found[..., 0]).all()
    assert np.isfinite(found[..., 1:]).all()


@pytest.mark.parametrize("context", [None, "left"])
def test_lookback_ratio_with_the_end_of_the_prompt_as_new(context, run):
    """From the 12th token on all that is in "right" counts as new, even to the query that wrote the first token."""
    found = lookback_ratio(run.ds, context, new="right")
    for b in range(2):
        for place, i in enumerate(run.answering):
            keys = np.flatnonzero(run.visible[b, i])
            new = [key for key in keys if run.labels[b][key] in ("right", "generated")]
            old = [key for key in keys if key not in new and context in (None, run.labels[b][key])]
            on_old, on_new = (run.weights[:, b, :, i][..., part].mean(-1) for part in (old, new))
            close(found[:, b, :, place], on_old / (on_old + on_new))
    assert np.isfinite(found).all()
    close(lookback_ratio(run.ds, new=["left", "right"]), lookback_ratio(run.ds, new=("right", "left")))


def test_streaming_heads(run):
    found = streaming_heads(run.ds, threshold=0.6)
    outside, uniform = np.zeros((3, 6)), []
    for layer in range(3):
        for head in range(6):
            masses, uniform = [], []
            for b in range(2):
                first = int(run.visible[b].any(-1).argmax())
                for i in range(first, run.length):
                    far = list(range(first + 1, i - WINDOW + 1))
                    if far:
                        masses.append(run.weights[layer, b, head, i, far].sum())
                        uniform.append(len(far) / (i - first + 1))
            outside[layer, head] = np.mean(masses)
    close(found.outside, outside)
    close(found.uniform, [np.mean(uniform)] * 3)
    np.testing.assert_array_equal(found.kind, np.where(outside < 0.6, "streaming", "retrieval"))
    assert set(found.kind.values.ravel()) == {"streaming", "retrieval"}


def test_short_texts_have_no_streaming_heads(run):
    ids = torch.randint(3, 97, (1, WINDOW + 1))
    short = Written(ids, None, AttentionStatsConfig(window=WINDOW))
    found = streaming_heads(short.ds)
    assert set(found.kind.values.ravel()) == {"no data"}
    assert found.outside.isnull().all()


CHOSEN = {0: [1, 3], 2: [5]}


def expected_sources(run, b, i, heads, sinks):
    """Numbers of one generated token by segment, from its query's weights."""
    chosen = [(layer, head) for layer in range(3) for head in range(6)]
    picked = chosen if heads is None else [(layer, head) for layer in heads for head in heads[layer]]
    keys = np.flatnonzero(run.visible[b, i])
    rest = [key for key in keys if key not in sinks]
    lines = {}
    for name in (*NAMES, "generated"):
        mine = [key for key in keys if run.labels[b][key] == name]
        left = [key for key in mine if key not in sinks]

        def mean(of, among):
            return np.mean([run.weights[layer, b, head, i, among].sum() for layer, head in of])

        share, without = mean(picked, mine), mean(picked, left) / mean(picked, rest)
        with np.errstate(divide="ignore", invalid="ignore"):
            lines[name] = [
                len(mine), share, mean(chosen, mine),
                len(mine) / len(keys), share / (np.float64(len(mine)) / len(keys)),
                without, len(left) / len(rest), without / (np.float64(len(left)) / len(rest)),
            ]  # fmt: skip
    return lines


COLUMNS = [
    "tokens", "share", "all_heads", "uniform", "relative", "without_sink", "uniform_without_sink", "relative_without_sink",
]  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("heads", [None, CHOSEN])
@pytest.mark.parametrize("b", [0, 1])
def test_sources(b, heads, exact, run):
    frame = sources(run.ds if exact else run.ds.drop_vars("row_weights"), heads=heads, batch=b)
    assert frame.attrs["exact"] == exact
    first = [0, 4][b]
    lines = []
    for i in run.answering:
        by_name = expected_sources(run, b, i, heads, {first})
        best = max(NAMES, key=lambda name: by_name[name][5])
        here = frame[frame.position == i + 1].set_index("segment")
        assert here.index.tolist() == [*NAMES, "generated"]
        if i + 1 < run.length:
            assert set(here.token) == {f"t{int(run.sequences[b, i + 1])}"}
        else:
            assert here.token.isna().all(), "it was never fed back"
        for name, numbers in by_name.items():
            close(here.loc[name, COLUMNS].to_numpy(dtype=float), numbers)
            assert here.wins[name] == (name == best)
        lines.append([by_name[name] for name in by_name])
    means = frame[frame.position == -1].set_index("segment")
    assert set(means.token) == {"mean"}
    close(means[COLUMNS].to_numpy(dtype=float), np.nanmean(lines, 0))
    assert means.wins.sum() == 1
    assert means.wins[means.without_sink[list(NAMES)].idxmax()]
    assert len(frame) == 4 * (NEW + 1)


def test_a_winner_is_chosen_among_the_segments_named(run):
    frame = sources(run.ds, among=["left", "generated"])
    for _, here in frame.groupby("position"):
        may = here[here.segment.isin(["left", "generated"])]
        assert here[here.wins].segment.tolist() == [may.segment[may.without_sink.idxmax()]]


def test_sinks_in_several_segments_need_the_rows():
    run = Run(sink_tokens=8)
    frame = sources(run.ds)
    i = run.answering[3]
    by_name = expected_sources(run, 0, i, None, set(range(8)))
    here = frame[frame.position == i + 1].set_index("segment")
    for name, numbers in by_name.items():
        close(here.loc[name, COLUMNS].to_numpy(dtype=float), numbers)
    with pytest.raises(ValueError, match=r"lie in 2 segments, \['left', 'system'\].*rows=\"generated\""):
        sources(run.ds.drop_vars("row_weights"))


def test_sinks_in_no_segment_take_nothing_of_any(run):
    ds = run.ds.drop_vars("row_weights").copy(deep=True)
    names = ds.key_segment.values.copy()
    names[0, 0] = ""
    ds = ds.assign_coords(key_segment=(("batch", "key"), names))
    ds["segment_mass"] = ds.segment_mass.copy()
    ds.segment_mass[:, 0, :, :, 0] -= ds.sink_mass[:, 0]
    frame, before = sources(ds), sources(run.ds)
    close(frame.without_sink, before.without_sink)
    assert (frame.share[frame.segment == "system"] < before.share[before.segment == "system"]).all()


def test_received_norm(run):
    found = received_norm(run.ds)
    close(found, run.ds.received_total.values * run.ds.value_output_norm.values)
    assert found.attrs["units"] == "activation"
    with pytest.raises(ValueError, match="value_output_norm"):
        received_norm(run.ds.drop_vars("value_output_norm"))


def test_what_is_missing_is_named(run):
    bare = run.ds.drop_vars(["key_segment", "segment_mass"])
    for function in (sources, lookback_ratio):
        with pytest.raises(ValueError, match=r"expected segments; measure with AttentionStatsConfig\(segments=…\)"):
            function(bare)
    close(retrieval_heads(bare, (0, 9)).score, retrieval_heads(run.ds, (0, 9)).score)
    unknown = bare.drop_dims("row")
    with pytest.raises(ValueError, match=r"nothing says which tokens were generated.*rows=\"generated\""):
        retrieval_heads(unknown, (0, 9))
    with pytest.raises(ValueError, match=r"topk_position.*not measured"):
        retrieval_heads(run.ds.drop_vars("topk_position"), (0, 9))
    with pytest.raises(ValueError, match=r"expected token strings; give them with AttentionStats.with_tokens"):
        retrieval_heads(run.ds.drop_vars("key_token"), (0, 9))
    with pytest.raises(ValueError, match=r'measure "sink_mass", or the rows themselves.*rows="generated"'):
        sources(run.ds.drop_vars(["row_weights", "sink_mass"]))
    with pytest.raises(ValueError, match="local_mass"):
        streaming_heads(run.ds.drop_vars("local_mass"))
    with pytest.raises(ValueError, match="expected the queries 29 to 36"):
        sources(run.ds.isel(query=slice(None, None, 2)))


@pytest.mark.parametrize("needle", [(0, 31), (5, 5), (7, 3), (-1, 4), 3, (1, 2, 3), (0.0, 2), None])
def test_bad_needles(needle, run):
    with pytest.raises(ValueError, match=r"needle: expected its first position.*0 to 29, got"):
        retrieval_heads(run.ds, needle)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ds: sources(ds, batch=2), r"batch: 2 was not measured; there are \[0, 1\]"),
        (lambda ds: sources(ds, heads={3: [0]}), r"heads: layer 3 was not measured; there are \[0, 1, 2\]"),
        (lambda ds: sources(ds, heads={1: [6]}), r"heads: expected some of \[0, 1, 2, 3, 4, 5\] in layer 1, got \[6\]"),
        (lambda ds: sources(ds, heads={1: []}), "heads: expected some of"),
        (lambda ds: sources(ds, heads=[1]), "heads: expected heads of each layer"),
        (lambda ds: sources(ds, heads={}), "heads: expected heads of each layer"),
        (lambda ds: sources(ds, among=["middle"]), "among: expected some of"),
        (lambda ds: sources(ds, among=[]), "among: expected some of"),
        (lambda ds: lookback_ratio(ds, "middle"), r"context: expected some of \['system', 'left', 'right', 'generated'\]"),
        (lambda ds: lookback_ratio(ds, "generated"), "context: expected segments of the prompt"),
        (lambda ds: lookback_ratio(ds, new="middle"), r"new: expected some of \['system', 'left', 'right', 'generated'\]"),
        (lambda ds: lookback_ratio(ds, new="generated"), "new: expected segments of the prompt that are not context"),
        (lambda ds: lookback_ratio(ds, "left", new="left"), r"new: expected segments of the prompt .* got 'left'"),
        (lambda ds: lookback_ratio(ds, new=["left", "left"]), "each once, got"),
        (lambda ds: lookback_ratio(ds, new=""), "new: expected some of"),
        (lambda ds: streaming_heads(ds, 0), "threshold: expected a number between 0 and 1, got 0"),
        (lambda ds: streaming_heads(ds, True), "threshold: expected a number between 0 and 1"),
        (lambda ds: streaming_heads(ds.assign_attrs(direction="bidirectional")), "expected causal attention"),
    ],
)  # fmt: skip
def test_bad_calls(call, message, run):
    with pytest.raises(ValueError, match=message):
        call(run.ds)


def test_an_answer_of_the_demo_model(smollm2):
    """From generate to shares of documents, kept keys and looking back: as the weights of stock eager attention have it."""
    model, tokenizer = smollm2
    parts = {
        "oak": "The oak is 40 metres tall. ",
        "tower": "The tower is 330 metres tall. ",
        "ask": "How tall is the tower? It is",
    }
    pieces = [(name, tokenizer(text)["input_ids"]) for name, text in parts.items()]
    prompt = torch.tensor([[number for _, ids in pieces for number in ids]])
    labels = [name for name, ids in pieces for _ in ids]
    config = AttentionStatsConfig(
        statistics=("sink_mass", "received_total", "key_norm"), segments=[labels], rows="generated"
    )
    output = model.generate(
        prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=0,
        output_attention_stats=config,
    )  # fmt: skip
    stats = output.attention_stats.with_tokens(tokenizer, output.sequences)
    stock = stock_of(model)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = stock(output.sequences[:, :-1], output_attentions=True).attentions
    weights = torch.stack(attentions)[:, 0].double().numpy()
    first, labels = len(labels), [*labels, *["generated"] * 7]
    frame, ratio = sources(stats), lookback_ratio(stats)
    for step, i in enumerate(range(first - 1, first + 7)):
        here = frame[frame.position == i + 1].set_index("segment")
        for name in (*parts, "generated"):
            mine = [key for key in range(1, i + 1) if labels[key] == name]
            share = weights[:, :, i, mine].sum(-1).mean() / (1 - weights[:, :, i, 0].mean())
            assert here.without_sink[name] == pytest.approx(share, abs=2e-5)
        old, new = weights[:, :, i, :first].mean(-1), weights[:, :, i, first : i + 1]
        if step:
            np.testing.assert_allclose(ratio[:, 0, :, step], old / (old + new.mean(-1)), atol=2e-4)
    kept = keep_mask(stats, "h2o", 12)
    total = weights.sum(2).reshape(30, 3, 3, -1).mean(2)[..., :-6]
    best = np.sort(total, -1)[..., -6]
    chosen = kept[:, 0, :, :-6].values
    assert (kept.sum("key") == 12).all()
    assert (np.where(chosen, total, np.inf).min(-1) >= best - 1e-4).all()
