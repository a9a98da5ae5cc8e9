"""Files that anybody may have written: they load and can be looked at cheaply, or a ValueError says what is wrong."""

from __future__ import annotations

import copy
import re
import tracemalloc

import pytest
import torch
from conftest import tiny_model
from hostile import changed, outer_of, places, put, with_outer
from hypothesis import given, strategies as st
from test_container import Tokenizer

from llama_attn import AttentionStats, AttentionStatsConfig

MOST_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file that holds a bit of everything, and a name to write others under."""
    ids = torch.arange(3, 17).view(2, 7)
    config = AttentionStatsConfig(
        statistics="all", norms=True, layers=(2, 0), segments=[["a"] * 3 + ["b"] * 4] * 2, top_k=2, map_size=4
    )
    with torch.no_grad():
        stats = tiny_model()(ids, output_attention_stats=config).attention_stats.with_tokens(Tokenizer(), ids)
    path = tmp_path_factory.mktemp("hostile") / "run.safetensors"
    stats.save(path)
    # What is imported on the first use does not count.
    look_at(path)
    return path.read_bytes(), path


def look_at(path):
    """Load a file and do with it what is done first."""
    stats = AttentionStats.load(path)
    dataset = stats.to_xarray()
    part = stats.select(layers=stats.layers[:1], batch=0)
    return repr(stats), stats._repr_html_(), str(part), str(dataset.sizes)


def try_(data, path):
    """Whether the file is refused; either way cheaply, and in a message that names it."""
    path.write_bytes(data)
    refused = None
    tracemalloc.start()
    try:
        look_at(path)
    except ValueError as error:
        refused = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES
    if refused is None:
        return False
    assert refused.startswith("path: ")
    assert repr(str(path)) in refused
    assert refused.isprintable()
    assert len(refused) < 2000
    return True


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**70, 10**30, 0.0, 1.5, float("nan"), float("inf")])
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["layer", "query", "all", "\x1b[31m", "\ud800", "cross", "entropy", "visible_keys"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
def test_anything_anywhere_in_our_header(data, saved):
    whole, path = saved

    def change(header):
        new = header
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.sampled_from(list(places(new))[1:]))
            put(new, at, data.draw(JUNK))

    try_(changed(whole, change), path)


@given(data=st.data())
def test_anything_anywhere_in_the_list_of_tensors(data, saved):
    whole, path = saved
    header, rest = outer_of(whole)
    header = copy.deepcopy(header)
    tensors = {name: part for name, part in header.items() if name != "__metadata__"}
    at = data.draw(st.sampled_from(list(places(tensors))[1:]))
    new = data.draw(JUNK | st.sampled_from(["BF16", "F8_E4M3", "BOOL", "I64", "F64"]) | st.lists(st.integers(0, 9)))
    try_(with_outer(put(header, at, new), rest), path)


@given(data=st.data())
def test_bytes_that_are_missing_or_others(data, saved):
    whole, path = saved
    at, flip = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    assert try_(whole[:at], path)
    try_(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :], path)


def shape(name, *sizes):
    """A tensor that says it is of another shape, of which nothing has to be stored if one axis is empty."""

    def change(data):
        header, rest = outer_of(data)
        begin = header[name]["data_offsets"][0]
        header[name] |= {"shape": list(sizes), "data_offsets": [begin, begin]}
        return with_outer(header, rest)

    return change


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("heads", lambda h: h.update(heads=[*range(5), 10**8])),
        ("heads", lambda h: h.update(heads=[*range(5), 2**70])),
        ("head", lambda h: h.update(heads=[7] * 10**5, num_heads=0)),
        ("heads", lambda h: h.update(num_heads=3)),
        ("num_heads", lambda h: h.update(num_heads=2**70)),
        ("heads", lambda h: h["config"].update(heads=[7] * 10**5)),
        ("heads", lambda h: h.update(heads=[True, 1, 2, 3, 4, 5])),
        ("layers", lambda h: h.update(layers=[0, 3])),
        ("layers", lambda h: h.update(layers=[0, 0.0])),
        ("layer", lambda h: h.update(layers=[0], paths=[])),
        ("num_layers", lambda h: h.update(num_layers=-1)),
        ("num_layers", lambda h: h.update(num_layers=2**70)),
        ("without_attention", lambda h: h.update(without_attention=[7])),
        ("paths", lambda h: h.update(paths=["a"])),
        ("first_query", lambda h: h.update(first_query=5)),
        ("first_query", lambda h: h.update(first_query=2**70)),
        ("first_key", lambda h: h.update(first_key=2**31)),
        ("length", lambda h: h.update(length=2)),
        ("length", lambda h: h.update(length=2**70)),
        ("query_stride", lambda h: h["config"].update(query_stride=2**70)),
        ("top_k", lambda h: h["config"].update(top_k=2**70)),
        ("rank", lambda h: h["config"].update(top_k=10**9)),
        ("map_size", lambda h: h["config"].update(map_size=float("inf"))),
        ("query_bin", lambda h: h["config"].update(map_size=2)),
        ("config", lambda h: h["config"].update(segments=[["a"]])),
        ("statistics", lambda h: h["config"].update(statistics=[["entropy"]])),
        ("segment", lambda h: h.update(segments=["a"])),
        ("replayed", lambda h: h.update(replayed=1)),
        ("model", lambda h: h.update(model=["\x1b[31m"])),
        ("direction", lambda h: h.update(direction=["causal"])),
        ("tokens", lambda h: h.update(tokens=[["a"] * 7])),
        ("labels", lambda h: h["labels"]["entropy"].update(dims=["layer", "batch", "head", "key"])),
        ("labels", lambda h: h["labels"]["entropy"].update(unit=1)),
        ("labels", lambda h: h["labels"]["visible_keys"].update(dims=["query", "batch"])),
        ("labels", lambda h: h["labels"].pop("entropy")),
    ],
)
def test_what_is_wrong_is_named(field, change, saved):
    whole, path = saved
    assert try_(changed(whole, change), path)
    with pytest.raises(ValueError, match=re.escape("is damaged (") + rf"{field}\b"):
        AttentionStats.load(path)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("visible_queries", (0, 10**12)),
        ("visible_keys", (0, 2**62)),
        ("visible_keys", ()),
        ("entropy", (2, 2, 6, 0)),
        ("received", (0,)),
    ],
)
def test_axes_of_nothing(name, sizes, saved):
    whole, path = saved
    assert try_(shape(name, *sizes)(whole), path)


@pytest.mark.parametrize("value", [7, -2, 2**31 - 1])
def test_positions_that_are_none(value, saved):
    whole, path = saved
    path.write_bytes(whole)
    stats = AttentionStats.load(path)
    stats["topk_position"][0, 0, 0, 0, 0] = value
    stats.save(path)
    with pytest.raises(ValueError, match=r"damaged \(topk_position: expected"):
        AttentionStats.load(path)


def test_names_from_a_file_are_data(saved):
    """Neither a terminal nor a page is told what to do by a name, a unit or a path."""
    whole, path = saved
    evil = "a\x1b[31m\x9b2J\u202e\n<b>$x$[red]"

    def change(header):
        header |= {"model": evil, "engine": evil, "segments": [evil, "b"], "tokens": [[evil] * 7] * 2, "stack": evil}
        for label in header["labels"].values():
            label |= {"unit": evil, "meaning": evil, "source": evil}
        header["labels"][evil] = header["labels"].pop("entropy")

    header, rest = outer_of(changed(whole, change))
    header[evil] = header.pop("entropy")
    assert not try_(with_outer(header, rest), path)
    text, html, part, _ = look_at(path)
    for shown in (text, html, part):
        assert shown.replace("\n", "").isprintable()
        assert r"a\x1b[31m" in shown
    assert "<b>$" not in html
    assert len(text.splitlines()) == 3 + len(AttentionStats.load(path).values)
    with pytest.raises(KeyError) as refused:
        AttentionStats.load(path)["nothing"]
    assert str(refused.value).isprintable()
