"""A file that is ours, given to what takes files of another kind: the error says what it is, and what takes it."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from conftest import tiny_model
from corpora import measured, write
from test_cli import invoke

from llama_attn import AttentionStats, analysis, viz
from llama_attn.corpus import CorpusSummary, compare

# What functions of a saved run need besides.
MORE = {"statistic": "entropy", "policy": "h2o", "budget": 4, "needle": (1, 3), "image": None, "segments": None}
OF_A_RUN = {
    name: function
    for module in (analysis, viz)
    for name in module.__all__
    if callable(function := getattr(module, name))
    and {*inspect.signature(function).parameters} & {"ds", "source", "a", "stats"}
    and name != "require"
}
IS_A_SUMMARY = (
    "is the summary of a corpus, not the statistics of one run; llama_attn.corpus.CorpusSummary.load, "
    "llama_attn.corpus.compare and llama_attn.viz.corpus_report take it"
)
IS_A_RUN = (
    "is the statistics of one run, not the summary of a corpus; AttentionStats.load, llama_attn.analysis and "
    "llama_attn.viz.report take it"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with ``stats.safetensors`` and ``summary.safetensors``."""
    folder = tmp_path_factory.mktemp("saved")
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stats = tiny_model()(ids, output_attention_stats=True).attention_stats
    stats.save(folder / "stats.safetensors")
    write(folder / "texts", parts=1, count=4)
    measured(folder / "texts", folder / "run").save(folder / "summary.safetensors")
    return folder


def test_what_is_tried():
    assert {"sink_rate", "compare", "keep_mask", "plot_attention_map", "plot_comparison", "report"} <= {*OF_A_RUN}
    assert len(OF_A_RUN) > 30


@pytest.mark.parametrize("name", ["load", *OF_A_RUN])
def test_a_summary_is_no_run(name, saved, tmp_path):
    function, path = OF_A_RUN.get(name, AttentionStats.load), saved / "summary.safetensors"
    given = (
        MORE
        | dict.fromkeys(("ds", "source", "a", "b", "stats"), path)
        | {"path": tmp_path / "o.html", "directory": tmp_path}
    )
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    arguments = [path] if name == "load" else [given[parameter] for parameter in needed]
    with pytest.raises(ValueError, match=re.escape(f"path: {str(path)!r} {IS_A_SUMMARY}")):
        function(*arguments)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["load", "compare", "corpus_report", "corpus_json"])
def test_a_run_is_no_summary(name, saved, tmp_path):
    path, out = saved / "stats.safetensors", tmp_path / "out"
    calls = {
        "load": lambda: CorpusSummary.load(path), "compare": lambda: compare(saved / "summary.safetensors", path),
        "corpus_report": lambda: viz.corpus_report(path, out), "corpus_json": lambda: viz.corpus_json(path, out),
    }  # fmt: skip
    with pytest.raises(ValueError, match="^" + re.escape(f"path: {str(path)!r} {IS_A_RUN}")):
        calls[name]()
    assert not out.exists()


def test_a_run_that_is_no_file(saved):
    with pytest.raises(ValueError, match=r"^b: expected a CorpusSummary or the path of one, got a AttentionStats"):
        compare(saved / "summary.safetensors", AttentionStats.load(saved / "stats.safetensors"))


@pytest.mark.parametrize("load", [AttentionStats.load, CorpusSummary.load])
def test_what_is_neither(load, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; give the file in it"):
        load(saved)
    for content in (b"layer,head,loss\n0,0,1.5\n", b'{"layers": [0]}', b"<!doctype html><title>report</title>"):
        (tmp_path / "table.csv").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"table.csv' is (not a complete safetensors file, which|damaged or no summary)"
        ):
            load(tmp_path / "table.csv")


def test_commands(saved, tmp_path):
    """In words of the command line."""
    result = invoke("merge", saved / "summary.safetensors", saved / "stats.safetensors", "--out", tmp_path / "all")
    assert result.exit_code == 2
    assert (
        "stats.safetensors' is the statistics of one run, not the summary of a corpus; llama-attn plot, report and "
        in " ".join(result.output.split())
    )
    assert "AttentionStats" not in result.output
    assert [*tmp_path.iterdir()] == []
