"""Uniform attention: what the counts give equals the textbook statistics of 1 / n on the mask written out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray
from hypothesis import given, settings, strategies as st
from imagined import Rule, Text

from llama_attn.analysis.uniform import DISTANCES, OF_DISTANCES, OF_KEYS, OF_QUERIES, uniform_attention
from llama_attn.analysis.who_sees import runs_of


def dataset(masks: list[list[np.ndarray]], queries, keys, direction, *, layered, sink_tokens=2, window=3):
    """What the statistics say of masks (layer, batch) of (query, key)."""
    counts = [np.array([[mask.sum(axis) for mask in rows] for rows in masks], np.int32) for axis in (1, 0)]
    dims = ("layer", "batch") if layered else ("batch",)
    counts = [each if layered else each[0] for each in counts]
    config = {"sink_tokens": sink_tokens, "window": window}
    return xarray.Dataset(
        {"visible_keys": ((*dims, "query"), counts[0]), "visible_queries": ((*dims, "key"), counts[1])},
        {"layer": [5 * at for at in range(len(masks))], "batch": range(len(masks[0])), "query": queries, "key": keys},
        {"direction": direction, "config": json.dumps(config)},
    )


def textbook(mask, queries, keys, ranks, length, *, sink_tokens=2, window=3):
    """The statistics of weights 1 / n on the pairs of ``mask``."""
    weights = mask / np.maximum(mask.sum(1, keepdims=True), 1)
    distance = np.abs(np.array(queries)[:, None] - np.array(keys))
    with np.errstate(all="ignore"):
        found = {
            "received_total": np.where(mask.any(0), weights.sum(0), np.nan),
            "received": weights.sum(0) / mask.sum(0),
            "entropy": -np.where(weights > 0, weights * np.log(weights), 0).sum(1),
            "sink_mass": (weights * (np.array(ranks) < sink_tokens)).sum(1),
            "local_mass": (weights * (distance < window)).sum(1),
            "mean_distance": (weights * distance).sum(1),
            "previous_token": (weights * (np.array(queries)[:, None] - 1 == np.array(keys))).sum(1),
        }
        for name in OF_QUERIES:
            found[name] = np.where(mask.any(1), found[name], np.nan)
        bins = [
            (weights * ((distance >= 2**b - 1) & (distance < 2 ** (b + 1) - 1))).sum() / mask.any(1).sum()
            for b in range(length.bit_length())
        ]
    found["distance_histogram"] = np.array(bins)
    return found


def close(found, expected, name):
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12, err_msg=name)


@st.composite
def texts(draw, *, packed=True, cached=True):
    length = draw(st.integers(1, 22))
    real = [True] * length
    kind = draw(st.sampled_from(["all", "left", "right", "holes"]))
    if kind == "left":
        start = draw(st.integers(0, length))
        real = [i >= start for i in range(length)]
    if kind == "right":
        stop = draw(st.integers(0, length))
        real = [i < stop for i in range(length)]
    if kind == "holes":
        real = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    starts = draw(st.lists(st.booleans(), min_size=length, max_size=length)) if packed and draw(st.booleans()) else []
    documents = np.cumsum(starts).tolist() if starts else [0] * length
    text = Text(real, documents, stride=draw(st.sampled_from([1, 1, 1, 2, 5])))
    if cached:
        text.first_query = draw(st.sampled_from([0, 0, length // 2, length - 1]))
    return text if text.queries else Text(real, documents)


WINDOWS = st.sampled_from([None, 1, 2, 4, 9])


@st.composite
def rules(draw, direction):
    if direction == "cross":
        return Rule(direction)
    if direction == "causal" and draw(st.booleans()):
        return Rule(direction, chunk=draw(st.integers(1, 9)))
    return Rule(direction, window=draw(WINDOWS))


@st.composite
def cases(draw):
    direction = draw(st.sampled_from(["causal", "causal", "bidirectional"]))
    text = draw(texts())
    chosen = draw(st.lists(rules(direction), min_size=1, max_size=3))
    # A cache that drops keys holds what the widest window still needs.
    widths = [rule.window or rule.chunk or text.length for rule in chosen]
    if direction == "causal" and draw(st.booleans()):
        text.dropped = max(0, text.queries[0] - max(widths) + 1)
    return direction, text, chosen


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_statistic_of_uniform_attention(case):
    direction, text, chosen = case
    keys = range(text.dropped, text.length)
    masks = [rule.pairs(text) for rule in chosen]
    layered = len(chosen) > 1
    ds = dataset([[mask] for mask in masks], text.queries, keys, direction, layered=layered)
    found = uniform_attention(ds).isel(batch=0)
    assert ("layer" in found.dims) == layered
    ranks = [text.rank(key) for key in keys]
    for at, mask in enumerate(masks):
        of_layer = found.isel(layer=at) if layered else found
        expected = textbook(mask, text.queries, keys, ranks, text.length)
        for name, values in expected.items():
            if name == "sink_mass":
                # Known or NaN, never wrong.
                values = np.where(np.isnan(of_layer[name]), np.nan, values)
            close(of_layer[name], values, name)


@settings(max_examples=100, deadline=None)
@given(texts(packed=False, cached=False), st.lists(st.sampled_from([None, 2, 4, 9]), min_size=1, max_size=3),
       st.sampled_from(["causal", "bidirectional"]))  # fmt: skip
def test_the_sink_is_known_in_one_text_that_was_measured_whole(text, windows, direction):
    text.stride = 1
    masks = [Rule(direction, window=window).pairs(text) for window in windows]
    ds = dataset([[mask] for mask in masks], text.queries, range(text.length), direction, layered=True)
    found = uniform_attention(ds).isel(batch=0)
    ranks = [text.rank(key) for key in range(text.length)]
    # Padding within the text, wider than every window, might as well lie between documents.
    real = np.flatnonzero(text.real)
    gaps = np.diff(real).max(initial=1)
    if gaps > 1 and all(window is not None and gaps >= window for window in windows):
        return
    for at, mask in enumerate(masks):
        expected = textbook(mask, text.queries, range(text.length), ranks, text.length)
        close(found.sink_mass[at], expected["sink_mass"], "sink_mass")


def test_a_full_layer_says_that_chunks_are_of_one_text():
    text, rule = Text([True] * 12, [0] * 12), Rule(chunk=4)
    chunks, full = rule.pairs(text), Rule().pairs(text)
    alone = uniform_attention(dataset([[chunks]], range(12), range(12), "causal", layered=False))
    assert alone.sink_mass[0, :4].notnull().all()
    assert alone.sink_mass[0, 4:].isnull().all(), "they might be documents"
    beside = uniform_attention(dataset([[chunks], [full]], range(12), range(12), "causal", layered=True))
    assert beside.sink_mass[0, 0].values.tolist() == [1, 1, 2 / 3, 1 / 2] + [0] * 8


def test_blocks_of_an_image_see_one_another():
    """Causal but for two blocks, as in Gemma 3, in a full layer and in one with a window."""
    text = Text([True] * 20, [0] * 20)
    masks = []
    for window in (None, 6):
        rule = Rule("causal", window=window, images=[range(3, 8), range(12, 15)])
        masks.append([rule.pairs(text)])
    found = uniform_attention(dataset(masks, range(20), range(20), "causal", layered=True)).isel(batch=0)
    for at, (mask,) in enumerate(masks):
        assert np.triu(mask, 1).any()
        for name, values in textbook(mask, range(20), range(20), range(20), 20).items():
            close(found[name][at], values, name)


@pytest.mark.parametrize("padding", [0, 3])
def test_cross_attention_has_no_distances(padding):
    keys, queries = 9, 14
    mask = np.ones((queries, keys), bool)
    mask[:, :padding] = False
    mask[-2:] = False
    found = uniform_attention(dataset([[mask]], range(queries), range(keys), "cross", layered=False)).isel(batch=0)
    expected = textbook(mask, range(queries), range(keys), np.arange(keys) - padding, keys)
    expected["sink_mass"] = np.where(mask.any(1), 2 / (keys - padding), np.nan)
    for name, values in expected.items():
        if name in DISTANCES:
            assert found[name].isnull().all()
        else:
            close(found[name], values, name)


def test_old_files_are_causal():
    text = Text([True] * 9, [0] * 9)
    ds = dataset([[Rule(window=4).pairs(text)]], range(9), range(9), "causal", layered=False)
    del ds.attrs["direction"]
    close(uniform_attention(ds).entropy[0], np.log(np.minimum(np.arange(9) + 1, 4)), "entropy")
    with pytest.raises(ValueError, match=r"expected attrs\['direction'\] to be .* got 'sideways'"):
        uniform_attention(ds.assign_attrs(direction="sideways"))


def test_a_causal_row_need_not_move_forwards():
    """A mask of the user's own, of which each query sees the last few keys, now more and now fewer."""
    lengths = [1, 2, 1, 4, 2, 5, 1, 8, 3]
    mask = np.array([[i - length < j <= i for j in range(9)] for i, length in enumerate(lengths)])
    found = uniform_attention(dataset([[mask]], range(9), range(9), "causal", layered=False)).isel(batch=0)
    for name, values in textbook(mask, range(9), range(9), range(9), 9).items():
        if name != "sink_mass":
            close(found[name], values, name)


OWN_MASKS = {
    "dilated": lambda i, j: j <= i and (i - j) % 2 == 0 and i - j < 6,
    "sink and window": lambda i, j: j <= i and (j == 0 or i - j < 3),
    "global tokens": lambda i, j: abs(i - j) < 3 or 0 in (i, j),
    "the last only": lambda i, j: j == min(i + 1, 15),
}


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("rule", OWN_MASKS)
def test_what_the_counts_do_not_tell_is_unknown(rule, direction):
    mask = np.array([[OWN_MASKS[rule](i, j) for j in range(16)] for i in range(16)])
    causal = np.tril(np.ones((16, 16), bool))
    found = uniform_attention(dataset([[mask, causal]], range(16), range(16), direction, layered=False))
    for name in (*OF_QUERIES, *OF_KEYS, *OF_DISTANCES):
        assert found[name].sel(batch=0).isnull().all(), name
        assert found[name].sel(batch=1).notnull().all(), name


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_counts_have_one_solution_whose_ends_move_forwards(data):
    """Any such runs, not only those of rules, are found again."""
    queries = data.draw(st.integers(1, 12))
    steps = st.lists(st.integers(0, 3), min_size=queries, max_size=queries)
    first, stop = np.cumsum(data.draw(steps)), np.cumsum(data.draw(steps)) + 1
    first = np.minimum(first, stop - 1)
    keys = int(stop.max())
    mask = (np.arange(keys) >= first[:, None]) & (np.arange(keys) < stop[:, None])
    seen = mask.any(0)
    found = runs_of(np.arange(queries), np.arange(keys), mask.sum(1), mask.sum(0), "cross")
    assert found is not None
    np.testing.assert_array_equal(
        (np.arange(seen.sum()) >= found.first[:, None]) & (np.arange(seen.sum()) < found.stop[:, None]), mask[:, seen]
    )
