"""A summary of many texts: against the texts read one by one, and the same whatever way they were read."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from corpora import CONFIG, LENGTH, Letters, assert_same, measured, model, reader, run, write
from hypothesis import given, strategies as st

from llama_attn import record
from llama_attn.analysis import classify_heads
from llama_attn.corpus import CorpusSummary
from llama_attn.corpus.bins import BINS, OTHERS, RAISED, position_starts, value_bins
from llama_attn.corpus.examples import ROUNDING
from llama_attn.corpus.moments import Moments
from llama_attn.corpus.records import Record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def summary(folder, tmp_path_factory):
    return measured(folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of fewer texts, for what reads them one by one several times, and its summary."""
    folder = tmp_path_factory.mktemp("few")
    write(folder, count=22)
    return folder, measured(folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def one_by_one(folder):
    """(file, line, digest, ids, dataset) of every text, each measured alone by the model itself."""
    own, found = model(), []
    for path in sorted(folder.glob("*.jsonl")):
        for line, written in enumerate(path.read_text().splitlines(), 1):
            text = json.loads(written)["text"]
            ids = Letters()(text, truncation=True, max_length=LENGTH)["input_ids"]
            with torch.no_grad():
                stats = own(torch.tensor([ids]), output_attention_stats=CONFIG).attention_stats
            digest = Record(path.name, line, text).digest
            found.append((path.name, line, digest, ids, stats.to_xarray().isel(batch=0)))
    return found


def pooled(one_by_one, name, start, stop):
    """All numbers of a statistic at some positions, (…, number)."""
    parts = [ds[name].values[..., start : min(stop, ds[name].shape[-1])] for *_, ds in one_by_one]
    return np.concatenate(parts, -1)


def test_statistics_by_position_are_those_of_the_texts(summary, one_by_one):
    ds = summary.to_xarray()
    assert ds.attrs["texts"] == summary.texts == len(one_by_one) == 73
    assert ds.attrs["tokens"] == sum(len(ids) for _, _, _, ids, _ in one_by_one)
    starts = position_starts(LENGTH)
    assert ds.position_bin.values.tolist() == starts == [0, 1, 3, 7, 15, 31]
    for name in ("entropy", "received", "logsumexp", "mean_distance", "effective_keys", "key_norm", "hidden_norm"):
        edges = value_bins(summary.about.labels[name].unit).edges
        for at, (start, stop) in enumerate(itertools.pairwise([*starts, LENGTH])):
            numbers = pooled(one_by_one, name, start, stop)
            here = ds.isel(position_bin=at)
            assert (here[f"{name}_count"] == numbers.shape[-1]).all()
            for told, expected in (
                ("mean", numbers.mean(-1)), ("std", numbers.std(-1)), ("min", numbers.min(-1)), ("max", numbers.max(-1)),
            ):  # fmt: skip
                np.testing.assert_allclose(here[f"{name}_{told}"].values, expected, rtol=1e-6, atol=1e-9)
            counted = np.apply_along_axis(
                lambda row, edges=edges: np.bincount(
                    np.searchsorted(edges, row * RAISED, side="right"), minlength=len(edges) + 1
                ),
                -1, numbers,
            )  # fmt: skip
            np.testing.assert_array_equal(here[f"{name}_histogram"].values, counted, err_msg=name)
        means = np.stack([ds_of[name].values.mean(-1) for *_, ds_of in one_by_one])
        for told, expected in (
            ("mean", means.mean(0)),
            ("std", means.std(0)),
            ("min", means.min(0)),
            ("max", means.max(0)),
        ):
            np.testing.assert_allclose(ds[f"{name}_text_{told}"].values, expected, rtol=1e-6, atol=1e-9)


def test_sinks_roles_weights_and_massive_channels(summary, one_by_one):
    ds = summary.to_xarray()
    first = np.stack([one.received.values[..., 0] > 0.3 for *_, one in one_by_one])
    np.testing.assert_array_equal(ds.sink_rate.values, first.mean(0))
    assert 0 < ds.sink_rate.values.mean() < 1
    roles = [classify_heads(one.expand_dims(batch=[0], axis=1)) for *_, one in one_by_one]
    shares = ds.role_share.transpose("role", "layer", "head").values.reshape(len(summary.about.roles), -1)
    for role, share in zip(summary.about.roles, shares, strict=True):
        counts = np.mean([frame.role.values == role for frame in roles if frame.role.notna().all()], axis=0)
        np.testing.assert_allclose(share, counts, err_msg=role)
    assert (shares > 0).any(1).sum() > 3
    lengths = np.array([len(ids) for _, _, _, ids, _ in one_by_one])
    for name in ("weight_count", "weight_mass"):
        expected = np.tensordot(lengths, np.stack([one[name].values for *_, one in one_by_one]), 1) / lengths.sum()
        np.testing.assert_allclose(ds[name].values, expected, rtol=1e-6, atol=1e-12)
    massive = {}
    for *_, one in one_by_one:
        magnitude, channel = one.hidden_max.values, one.hidden_max_channel.values
        here = (magnitude > 100) & (magnitude >= 1000 * one.hidden_layer_median.values[:, None])
        for layer in range(len(here)):
            for number in {*channel[layer][here[layer]]}:
                tokens, holding = massive.get((layer, int(number)), (0, 0))
                massive[layer, int(number)] = tokens + int((channel[layer][here[layer]] == number).sum()), holding + 1
    assert massive
    found = {
        tuple(key): tuple(count)
        for key, count in zip(summary.massive.keys.tolist(), summary.massive.counts.tolist(), strict=True)
    }
    assert found == massive


def test_sinks_by_token(summary, one_by_one):
    from llama_attn.analysis import sink_positions

    expected = {}
    for _, _, _, ids, one in one_by_one:
        heads = sink_positions(one.expand_dims(batch=[0], axis=1)).sink.sum(["layer", "head"]).values[0]
        for position, (token, count) in enumerate(zip(ids, heads, strict=True)):
            first, behind, seen_first, seen_behind = expected.get(token, (0, 0, 0, 0))
            own = (count, 0, 1, 0) if position == 0 else (0, count, 0, 1)
            expected[token] = (first + own[0], behind + own[1], seen_first + own[2], seen_behind + own[3])
    found = dict(zip(summary.sinks.keys[:, 0].tolist(), map(tuple, summary.sinks.counts.tolist()), strict=True))
    assert found == {token: tuple(int(n) for n in counts) for token, counts in expected.items()}
    assert summary.strings[1] == "<1>"


def peak(values):
    """The first of the largest, the first token aside, which sees itself alone."""
    if len(values) == 1:
        return 0
    return 1 + np.flatnonzero(values[1:] >= values[1:].max() - ROUNDING)[0]


def test_examples_are_the_strongest_texts(summary, one_by_one):
    about, strongest = summary.about, summary.strongest
    assert {"sink_mass", "local_mass", "induction"} <= {*about.examples_of}
    for at, name in enumerate(about.examples_of):
        for layer, head in np.ndindex(3, 6):
            numbers = [one[name].values[layer, head] for *_, one in one_by_one]
            scores = [row.mean() for row in numbers]
            order = sorted(
                range(len(scores)),
                key=lambda n, s=scores: (
                    -(s[n] / ROUNDING).round(),
                    one_by_one[n][2],
                    one_by_one[n][0],
                    one_by_one[n][1],
                ),
            )
            for rank, place in enumerate(order[:3]):
                file, line, digest, ids, _ = one_by_one[place]
                where = (at, layer, head, rank)
                assert strongest.score[where] == pytest.approx(scores[place], abs=1e-9)
                assert (summary.files[strongest.file[where]], strongest.line[where]) == (file, line)
                assert strongest.digest[where] == digest
                assert strongest.position[where] == peak(numbers[place])
                shown = [token for token in strongest.ids[where] if token >= 0]
                start = strongest.start[where]
                assert shown == ids[start : start + 24]
                assert start <= strongest.position[where] < start + len(shown)
                np.testing.assert_allclose(
                    strongest.values[where][: len(shown)], numbers[place][start : start + len(shown)], atol=1e-3
                )


def test_the_sample_has_the_smallest_digests(summary, one_by_one):
    sample = summary.sample
    expected = sorted(one_by_one, key=lambda one: (one[2], one[0], one[1]))
    assert sample.digest.tolist() == [digest for _, _, digest, _, _ in expected][:128]
    for row, (file, line, _, ids, one) in enumerate(expected):
        assert (summary.files[sample.file[row]], sample.line[row]) == (file, line)
        assert [token for token in sample.ids[row] if token >= 0] == ids
        for at, name in enumerate(summary.about.scores):
            np.testing.assert_allclose(sample.means[row, at], one[name].values.mean(-1), rtol=1e-5, atol=1e-6)
        at = summary.about.examples_of.index("sink_mass")
        first, window = sample.window(row, at, 1, 2)
        there = window >= 0
        assert there.sum() == min(len(ids), 24)
        position = sample.position[row, at, 1, 2]
        values = one.sink_mass.values[1, 2]
        assert position == peak(values)
        start = min(max(position - 12, 0), max(len(ids) - 24, 0))
        assert first == start
        assert window[there].tolist() == ids[start : start + 24]
        np.testing.assert_allclose(sample.values[row, at, 1, 2][there], values[start : start + 24], atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"every": 1}, {"every": 7, "batch_tokens": 60}, {"every": 1000, "batch_tokens": 1}, {"batch_tokens": 10**6}],
)
def test_however_it_is_read_it_is_the_same(settings, few, tmp_path):
    folder, summary = few
    assert_same(measured(folder, tmp_path, **settings), summary)


def test_any_order_of_files_and_of_merging(folder, summary, tmp_path):
    parts = [str(path) for path in sorted(folder.glob("*.jsonl"))]
    assert_same(measured(parts[::-1], tmp_path / "turned"), summary)
    alone = [measured([part], tmp_path / str(number)) for number, part in enumerate(parts)]
    for order in itertools.permutations(alone):
        assert_same(CorpusSummary.merge(order), summary)
    assert_same(alone[0].merged(alone[1].merged(alone[2])), alone[0].merged(alone[1]).merged(alone[2]))


def test_saved_and_loaded(summary, tmp_path):
    summary.save(tmp_path / "summary.safetensors")
    loaded = CorpusSummary.load(tmp_path / "summary.safetensors")
    assert_same(loaded, summary)
    assert repr(loaded) == repr(summary)
    whole = (tmp_path / "summary.safetensors").read_bytes()
    for damaged in (
        whole[:-9],
        whole[:200],
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole.replace(b"texts", b"textz", 1),
        b"",
    ):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or no summary of a corpus"):
            CorpusSummary.load(tmp_path / "damaged")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        CorpusSummary.load(tmp_path / "nothing")


def test_what_was_measured_otherwise_is_not_merged(summary):
    for field, other in (("model", "other"), ("weights", "0"), ("max_tokens", 9), ("layers", (0, 1))):
        with pytest.raises(ValueError, match=f"{field}: expected summaries of the same, got"):
            summary.merged(replace(summary, about=replace(summary.about, **{field: other})))
    with pytest.raises(ValueError, match="expected one or more"):
        CorpusSummary.merge([])


def test_as_a_table(summary):
    frame = summary.to_pandas()
    assert len(frame) == 18
    ds = summary.to_xarray()
    line = frame[(frame.layer == 2) & (frame["head"] == 4)].iloc[0]
    assert line.sink_mass == float(ds.sink_mass_text_mean.sel(layer=2, head=4))
    assert line.sink_mass_std == float(ds.sink_mass_text_std.sel(layer=2, head=4))
    assert line.role == ds.role.values[ds.role_share.sel(layer=2, head=4).values.argmax()]
    assert frame.attrs["texts"] == 73


def test_other_models_too(folder, tmp_path):
    """A BERT in float32, and a Llama of which some layers and heads are measured."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ).eval()
    read = reader(bert)
    text = next(iter(read.batches([read.tokenize(Record("a", 1, "some letters"))[0]])))
    found = read.measure(text)
    ids = torch.tensor([text[0].ids])
    with torch.no_grad(), record(bert, CONFIG) as recording:
        bert(ids)
    np.testing.assert_allclose(
        found.by_text["entropy"].mean, recording.stats["entropy"].mean(-1)[:, 0], rtol=1e-5, atol=1e-6
    )
    assert found.about.direction == "bidirectional"
    some = measured(folder, tmp_path, config=replace(CONFIG, layers=(2, 0), heads=(1,)))
    assert some.by_text["entropy"].mean.shape == (2, 1)
    assert some.to_xarray().attrs["part"] == "layers 0, 2 of 3, head 1 of 6"


def test_what_does_not_add_up_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"statistics: \['weights_map'\] do not add up over texts"):
        measured(folder, tmp_path, config=replace(CONFIG, statistics=("entropy", "weights_map")))
    with pytest.raises(ValueError, match=r"expected one or more of single queries or keys of each head, got"):
        measured(folder, tmp_path / "other", config=replace(CONFIG, statistics=("weight_count", "hidden_norm")))


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32) | st.just(float("nan")), max_size=8), min_size=2, max_size=5))
def test_moments_of_parts_are_those_of_all(parts):
    whole = torch.tensor([[number for part in parts for number in part] or [float("nan")]])
    expected = Moments.of(whole, BINS["activation"])
    found = None
    for part in parts:
        one = Moments.of(torch.tensor([part or [float("nan")]]), BINS["activation"])
        found = one if found is None else found.merged(one)
    numbers = whole[~whole.isnan()].double().numpy()
    assert found.count.tolist() == [len(numbers)]
    if len(numbers):
        assert found.mean[0] == pytest.approx(numbers.mean(), rel=1e-9, abs=1e-9)
        assert found.std[0] == pytest.approx(numbers.std(), rel=1e-6, abs=1e-6)
        assert (found.low[0], found.high[0]) == (numbers.min(), numbers.max())
    for name in ("count", "low", "high", "histogram"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("bins", [*BINS.values(), OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_hold_their_lower_edges(bins, dtype):
    """And what is below them by rounding alone, such as a share of 1/2."""
    edges, draw = bins.edges, np.random.default_rng(0)
    values = np.concatenate(
        [edges, draw.normal(0, 30, 999), draw.exponential(3, 999), [0, -1, 1e30, -1e30, np.inf, -np.inf]]
    )
    values = torch.tensor(values, dtype=dtype)
    expected = np.searchsorted(edges, (values * RAISED).double().numpy(), side="right")
    np.testing.assert_array_equal(bins.place(values).numpy(), expected)
    positive = torch.tensor(edges[edges > 0], dtype=dtype)
    np.testing.assert_array_equal(bins.place(positive * (1 - 1e-6)).numpy(), bins.place(positive).numpy())
    assert (bins.place(positive * (1 - 1e-5)).numpy() < bins.place(positive).numpy()).all()
    assert bins.place(torch.tensor([float("nan")], dtype=dtype)).item() == len(edges)
    assert (np.float32(edges) == edges).all(), "the same in any precision"


def test_every_field_is_saved():
    """A field that is forgotten when files are written would come back empty."""
    from llama_attn.corpus import header, summary as module

    kept = {*module.COUNTS, *module.ARRAYS, *module.GROUPS, *module.PARTS, "about", "files", "strings"}
    assert {field.name for field in fields(CorpusSummary)} == kept
    arrays = {*module.ARRAYS, *(f"{name}/{field.name}" for name, of in module.PARTS.items() for field in fields(of))}
    assert {*header.FORM, "weight_count", "weight_mass"} == arrays
    assert {*header.MOMENTS, "histogram"} == {field.name for field in fields(Moments)}


def test_weights_are_told_apart():
    from llama_attn.corpus.weights import fingerprint

    same, other = tiny_model(), tiny_model()
    assert fingerprint(same) == fingerprint(other)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert fingerprint(same) != fingerprint(other)
    assert fingerprint(same) != fingerprint(tiny_model(dtype=torch.float64))


def test_progress_and_limit(folder, tmp_path):
    told = []
    started = run(folder, tmp_path, limit=25)
    started.begin()
    found = started.measure(lambda count, tokens: told.append((count, tokens)))
    assert found.texts == 25 == sum(count for count, _ in told)
    assert found.tokens == sum(tokens for _, tokens in told)
    again = []
    (tmp_path / "summary.safetensors").unlink()
    assert_same(started.measure(lambda count, tokens: again.append((count, tokens))), found)
    assert sum(count for count, _ in again) == 25
    assert not any(tokens for _, tokens in again), "nothing is measured twice"
