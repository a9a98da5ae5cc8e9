"""One field of a header says what is not true: it is refused by its name, before anything is made of it."""

from __future__ import annotations

import re

import pytest
from hostile import changed, corpus_file, run_file, with_ours
from trying import refused


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
def test_of_a_run(field, change, tmp_path):
    said = refused(changed(run_file(), change), tmp_path)
    assert re.search(re.escape("is damaged (") + rf"{field}\b", said), said


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("version", lambda h: h.update(version=2)),
        ("header", lambda h: h.pop("tokens")),
        ("header", lambda h: h.update(more=1)),
        ("texts", lambda h: h.update(texts=0)),
        ("texts", lambda h: h.update(texts=2**60)),
        ("texts", lambda h: h.update(texts=True)),
        ("skipped", lambda h: h.update(skipped=-1)),
        ("sample/digest", lambda h: h.update(texts=100)),
        ("files", lambda h: h.update(files=[1, 2, 3])),
        ("files", lambda h: h.update(files=["a", "a", "b"])),
        ("strongest/file", lambda h: h.update(files=["a"])),
        ("strings", lambda h: h.update(strings=[[1]])),
        ("strings", lambda h: h.update(strings=[["1", "a"]])),
        ("about", lambda h: h["about"].pop("roles")),
        ("layers", lambda h: h["about"].update(layers=[])),
        ("layers", lambda h: h["about"].update(layers=[0, 0])),
        ("layers", lambda h: h["about"].update(layers=[0, 3])),
        ("layer", lambda h: h["about"].update(layers=[0])),
        ("'layer'", lambda h: h["about"].update(layers=[*range(1000)], num_layers=1000)),
        ("heads", lambda h: h["about"].update(heads=[0, 2**70])),
        ("heads", lambda h: h["about"].update(num_heads=3)),
        ("num_layers", lambda h: h["about"].update(num_layers=2**20)),
        ("config", lambda h: h["about"].update(config="[" * 10**5)),
        ("statistics", lambda h: h["about"].update(config='{"statistics": 1}')),
        ("query_stride", lambda h: h["about"].update(config='{"statistics": "all", "query_stride": 0}')),
        ("direction", lambda h: h["about"].update(direction="up")),
        ("token", lambda h: h["about"].update(max_tokens=1)),
        ("'rank'", lambda h: h["about"].update(examples=1)),
        ("scores", lambda h: h["about"].update(scores=[])),
        ("examples_of", lambda h: h["about"].update(examples_of=["entropy"])),
        ("roles", lambda h: h["about"].update(roles=["a"] * 10)),
        ("roles", lambda h: h["about"]["roles"].append("\ud800")),
        ("labels", lambda h: h["about"].update(labels=[])),
        ("labels", lambda h: h["about"]["labels"].update({"\ud800": h["about"]["labels"]["entropy"]})),
        ("unit", lambda h: h["about"]["labels"]["entropy"].update(unit=1)),
        ("statistics", lambda h: h["about"]["labels"]["entropy"].update(dims=["layer", "batch", "row"])),
        ("bins", lambda h: h["about"]["labels"]["entropy"].update(unit="tokens")),
        ("arrays", lambda h: h["about"]["labels"].pop("hidden_norm")),
        ("labels", lambda h: h["about"]["labels"].update(position=h["about"]["labels"]["hidden_norm"])),
        ("labels", lambda h: h["about"]["labels"].update(hidden_norm_text=h["about"]["labels"]["hidden_norm"])),
    ],
)
def test_of_a_corpus(field, change, tmp_path):
    said = refused(changed(corpus_file(), change), tmp_path)
    assert re.search(rf"no summary of a corpus: .*{field}(?!\w)", said), said


@pytest.mark.parametrize("whole", [run_file, corpus_file])
def test_lists_in_lists(whole, tmp_path):
    """More deeply than Python's stack."""
    assert "nested too deeply" in refused(with_ours(whole(), "[" * 10**5), tmp_path)
