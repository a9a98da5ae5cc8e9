"""``llama-attn corpus`` ends with a report, and ``llama-attn report`` writes one of a summary."""

from __future__ import annotations

import json

import cli_models
import pytest
from conftest import tiny_model
from corpora import measured, write
from report_page import Page
from test_cli import invoke

from llama_attn import viz
from llama_attn.cli import terminal
from llama_attn.corpus import CorpusSummary
from llama_attn.demo import HUB_ID


@pytest.fixture
def saved(tmp_path):
    write(tmp_path / "texts", count=8)
    measured(tmp_path / "texts", tmp_path / "run").save(tmp_path / "summary.safetensors")
    return tmp_path / "summary.safetensors"


def test_a_run_ends_with_its_report(tmp_path, monkeypatch):
    checkpoint = cli_models.save("llama", tmp_path / "model")
    write(tmp_path / "texts", count=8)
    command = ("corpus", checkpoint, tmp_path / "texts", "--out", tmp_path / "out", "--max-tokens", 16)
    with monkeypatch.context() as without:
        without.setattr(terminal, "missing", lambda packages: ["plotly"] if "plotly" in packages else [])
        result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "no report: pictures need plotly" in result.output
    assert not (tmp_path / "out" / "report.html").exists()
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith("report.html")
    summary = CorpusSummary.load(tmp_path / "out" / "summary.safetensors")
    page = Page(tmp_path / "out" / "report.html")
    assert page.about["texts"] == summary.texts == 11
    assert page.about["model"] == "model"
    page.check("score entropy", summary.by_text["entropy"].mean)


@pytest.mark.smollm2
def test_the_demo_model_is_called_by_its_id(tmp_path):
    (tmp_path / "texts.txt").write_text("Ahoy there, ye landlubbers\n")
    result = invoke("corpus", HUB_ID, tmp_path / "texts.txt", "--out", tmp_path / "out", "--layers", "0")
    assert result.exit_code == 0, result.output
    assert Page(tmp_path / "out" / "report.html").about["model"] == HUB_ID


def test_a_report_of_a_summary(saved):
    result = invoke("report", saved)
    assert result.exit_code == 0, result.output
    assert Page(saved.with_suffix(".html")).about["texts"] == 11
    result = invoke("report", saved, "--out", saved.with_name("small.html"), "--max-megabytes", 2.06)
    assert result.exit_code == 0, result.output
    assert saved.with_name("small.html").stat().st_size <= 2.06e6
    result = invoke("report", saved, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(saved.with_suffix(".json").read_text())["texts"] == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", 0], "--batch: the report of a corpus has no such option"),
        (["--exact", "-1"], "--exact: the report of a corpus has no such option"),
        (["--json", "--max-megabytes", 3], "--max-megabytes: JSON has no such option"),
        (["--json", "--out", "a.html"], "--out: expected a name that ends in .json, got 'a.html'"),
        (["--out", "a.json"], "--out: expected a name that ends in .html, got 'a.json'"),
        (["--max-megabytes", 1], "max_megabytes: 1 is too small for this corpus"),
        (["--out", "/missing/a.html"], "the folder '/missing' does not exist"),
    ],
    ids=str,
)
def test_bad_requests(arguments, message, saved):
    before = sorted(saved.parent.iterdir())
    result = invoke("report", saved, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert sorted(saved.parent.iterdir()) == before


def test_files_that_are_no_summaries(saved, ids, tmp_path):
    stats = tiny_model()(ids, output_attention_stats=True).attention_stats
    stats.save(tmp_path / "run.safetensors")
    result = invoke("report", tmp_path / "run.safetensors", "--json")
    assert result.exit_code == 2
    assert "it is of summaries of a corpus" in result.output
    saved.write_bytes(saved.read_bytes()[:-7])
    result = invoke("report", saved)
    assert result.exit_code == 2
    assert f"cannot read {saved}" in " ".join(result.output.split())
    assert invoke("report", tmp_path / "none.safetensors").exit_code == 2


def test_a_summary_is_drawn_by_its_report(saved):
    result = invoke("plot", saved)
    assert result.exit_code == 2
    assert f"is the summary of a corpus, which has a report: llama-attn report {saved}" in result.output


@pytest.mark.parametrize(
    "option", [("--plot", "a.png"), ("--what", "comparison"), ("--layer", 1), ("--kind", "logits"), ("--dpi", 120)]
)
def test_pictures_of_comparisons_are_of_runs(option, saved):
    result = invoke("compare", saved, saved, *option)
    assert result.exit_code == 2
    assert f"{option[0]}: it is of two runs, and these are summaries of corpora" in result.output


def test_what_is_asked_for_is_what_is_drawn(saved, ids, tmp_path, monkeypatch):
    """A run keeps its own report, with the defaults of the function where nothing is said."""
    tiny_model()(ids, output_attention_stats=True).attention_stats.save(tmp_path / "run.safetensors")
    asked = []
    for name in ("report", "corpus_report", "corpus_json"):
        monkeypatch.setattr(viz, name, lambda source, path, name=name, **settings: asked.append((name, settings)))
    for arguments in (["run.safetensors"], ["run.safetensors", "--batch", 1], ["summary.safetensors"]):
        assert invoke("report", tmp_path / arguments[0], *arguments[1:]).exit_code == 0
    assert asked == [("report", {}), ("report", {"batch": 1}), ("corpus_report", {})]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--split", "train"), "--split: it is of datasets on the hub, and DATA names none"),
        (("--subset", "en"), "--subset: it is of datasets on the hub, and DATA names none"),
        (("--field", "text"), "--field: it is of JSON lines and tables, and DATA has lines of plain text alone"),
    ],
)
def test_options_of_other_data_are_refused(option, message, tmp_path):
    (tmp_path / "texts.txt").write_text("a line\n")
    result = invoke("corpus", "no/model", tmp_path / "texts.txt", "--out", tmp_path / "out", *option)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()
