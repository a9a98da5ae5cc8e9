"""``llama-attn plot``, ``report`` and ``compare``, run as a user runs them."""

from __future__ import annotations

import csv
import functools
import re
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import tiny_model
from test_cli import invoke
from test_viz import Tokenizer

from llama_attn import AttentionStats, AttentionStatsConfig, viz
from llama_attn.analysis import compare
from llama_attn.cli.saved import OF_ONE_RUN, _pictures


@pytest.fixture
def saved(ids, tmp_path):
    """Two saved runs, of two models on the same text."""
    for seed, name in enumerate("ab"):
        parts = [["prompt"] * 30 + ["generated"] * 7] * 2
        config = AttentionStatsConfig(statistics="all", norms=True, rows=(-1,), segments=parts)
        with torch.no_grad():
            stats = tiny_model(seed=seed)(ids, output_attention_stats=config).attention_stats
        stats.with_tokens(Tokenizer(), torch.arange(74).view(2, 37)).save(tmp_path / f"{name}.safetensors")
    return tmp_path


def words(result) -> str:
    return " ".join(result.output.split())


def test_every_picture_can_be_named(saved):
    names = {name for name in viz.__all__ if name.startswith("plot_")} - {
        "plot_comparison",
        "plot_head_comparison",
        "plot_ablation",
        "plot_budget",
        "plot_image_rows",
    }
    assert {f"plot_{name.replace('-', '_')}" for name in _pictures("source")} == names
    assert tuple(_pictures("source")) == OF_ONE_RUN
    for what in _pictures("source"):
        result = invoke("plot", saved / "a.safetensors", "--what", what, "--dpi", 30)
        assert result.exit_code == 0, result.output
        assert matplotlib.image.imread(saved / f"a_{what}.png").size > 0


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_takes_options(suffix, saved):
    out = saved / f"new.{suffix}"
    result = invoke(
        "plot", saved / "a.safetensors", "--what", "attention-map", "--layer", 2, "--head", 5, "--batch", 1, "--kind", "logits",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000
    if suffix == "svg":
        assert "layer 2, head 5" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "map"], "--what: expected one of attention-map, coverage, distance-histogram, head-grid"),
        (["--what", "head-grid", "--head", "1"], "--head: head-grid takes --statistic, --batch"),
        (["--what", "head-grid", "--statistic", "entropie"], "--statistic: unknown 'entropie'; there are entropy,"),
        (["--what", "head-grid", "--statistic", "custom"], "--statistic: unknown 'custom'; there are entropy,"),
        (["--query-slice", "5:"], "--query-slice: attention-map takes --layer, --head, --batch, --kind"),
        (
            ["--what", "head-roles", "--query-slice", "5"],
            "--query-slice: expected positions like 65: or 65:129, got '5'",
        ),
        (["--what", "head-roles", "--query-slice", "-5:"], "--query-slice: expected positions like"),
        (["--what", "head-roles", "--query-slice", "99:"], "query_slice: "),
        (["--layer", "9"], "layer: 9 was not measured; there are [0, 1, 2]"),
        (["--kind", "scores"], "kind: expected one of"),
        (["--out", "picture.bmp"], "--out: expected a name that ends in .png, .svg, .pdf, got 'picture.bmp'"),
        (["--out", "/missing/a.png"], "the folder '/missing' does not exist"),
    ],
    ids=str,
)
def test_bad_requests_end_with_a_message(arguments, message, saved):
    before = sorted(saved.iterdir())
    result = invoke("plot", saved / "a.safetensors", *arguments)
    assert result.exit_code == 2, result.output
    assert message in words(result)
    assert sorted(saved.iterdir()) == before


@pytest.mark.parametrize("command", [("plot",), ("report",), ("compare", "a.safetensors")])
def test_files_that_cannot_be_read(command, saved):
    (saved / "broken.safetensors").write_bytes(b"no")
    command = [command[0], *(saved / name for name in command[1:])]
    for name, message in (("missing", "there is no file"), ("broken.safetensors", "not a complete safetensors file")):
        result = invoke(*command, saved / name)
        assert result.exit_code == 2, result.output
        assert message in words(result)
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "written"),
    [(("plot",), "stats_attention-map.png"), (("report",), "stats.html"), (("compare", "a.safetensors"), None)],
)
def test_a_folder_stands_for_what_a_run_left_in_it(command, written, saved):
    command = [command[0], *(saved / name for name in command[1:])]
    folder = saved / "run"
    folder.mkdir()
    result = invoke(*command, folder)
    assert result.exit_code == 2
    assert "run is a folder; there is no summary.safetensors or stats.safetensors in it" in words(result)
    shutil.copy(saved / "b.safetensors", folder / "stats.safetensors")
    result = invoke(*command, folder)
    assert result.exit_code == 0, result.output
    assert result.output == invoke(*command, folder / "stats.safetensors").output
    assert written is None or (folder / written).stat().st_size > 0
    (folder / "summary.safetensors").touch()
    result = invoke(*command, folder)
    assert result.exit_code == 2
    assert "run is a folder with summary.safetensors and stats.safetensors; give one of them" in words(result)


def test_report(saved):
    result = invoke("report", saved / "a.safetensors")
    assert result.exit_code == 0, result.output
    assert (saved / "a.html").read_text().startswith("<!doctype html>")
    assert result.output.strip().endswith("a.html")
    result = invoke("report", saved / "a.safetensors", "--out", saved / "b.html", "--max-megabytes", 2.2, "--batch", 1)
    assert result.exit_code == 0, result.output
    assert (saved / "b.html").stat().st_size <= 2.2e6


def test_a_report_keeps_the_links_that_were_asked_for(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(viz, "report", lambda stats, path, **settings: asked.append(settings.get("exact")))
    for exact in ("-1", "3, 5,-2:", ":4,1:2"):
        assert invoke("report", saved / "a.safetensors", "--exact", exact).exit_code == 0
    assert invoke("report", saved / "a.safetensors").exit_code == 0
    assert asked == [[-1], [3, 5, slice(-2, None)], [slice(None, 4), slice(1, 2)], None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-megabytes", "1"], "max_megabytes: 1 is too small for this run"),
        (["--batch", "7"], "batch: 7 was not measured; there are [0, 1]"),
        (["--exact", "9999"], "exact: 9999 is no measured query"),
        (["--exact", "1:2:3"], "--exact: expected positions and slices like -1,6227 or -32:, got '1:2:3'"),
        (["--exact", "2,,3"], "--exact: expected positions and slices"),
        (["--exact", "last"], "--exact: expected positions and slices"),
        (["--out", "page.txt"], "--out: expected a name that ends in .html, got 'page.txt'"),
        (["--out", "/missing/a.html"], "the folder '/missing' does not exist"),
    ],
    ids=str,
)
def test_bad_requests_for_a_report(arguments, message, saved):
    before = sorted(saved.iterdir())
    result = invoke("report", saved / "a.safetensors", *arguments)
    assert result.exit_code == 2, result.output
    assert message in words(result)
    assert sorted(saved.iterdir()) == before


def test_compare(saved):
    a, b = saved / "a.safetensors", saved / "b.safetensors"
    frame = compare(a, b)
    result = invoke("compare", a, b, "--top", 5, "--out", saved / "all.csv")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if re.match(r"\s+\w+…?\s+\d+\s", line)]
    shown = [line[0].rstrip("…") for line in lines]
    assert len(shown) == 5
    assert all(name.startswith(part) for name, part in zip(frame.statistic, shown, strict=False))
    assert lines[0][1] == str(frame.layer[0])
    assert f"{frame.effect[0]:.3g}" in lines[0]
    assert f"5 of {len(frame)} lines" in words(result)
    with (saved / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(frame)
    assert float(rows[0]["effect"]) == frame.effect[0]
    result = invoke("compare", a, b, "--statistic", "entropy")
    assert result.exit_code == 0, result.output
    assert "18 of 18 lines" in words(result)
    result = invoke("compare", a, b, "--statistic", "entropie")
    assert result.exit_code == 2
    assert "--statistic: expected one of distance_histogram," in words(result)
    result = invoke("compare", a, b, "--out", saved / "missing" / "all.csv")
    assert result.exit_code == 2
    assert "--out:" in words(result)


def test_the_warning_of_texts_with_little_in_common_is_said_once(saved, ids, recwarn):
    other = ids.clone()
    other[:, 5:] = 2
    for tokens, name in ((ids, "c"), (other, "d")):
        with torch.no_grad():
            stats = tiny_model()(tokens, output_attention_stats=True).attention_stats
        stats.with_tokens(Tokenizer(), tokens).save(saved / f"{name}.safetensors")
    result = invoke("compare", saved / "c.safetensors", saved / "d.safetensors", "--plot", saved / "picture.png")
    assert result.exit_code == 0, result.output
    assert words(result).count("warning: the texts have little in common") == 1
    assert not len(recwarn), "none from inside of the library"


def test_compare_what_cannot_be_compared(saved, ids):
    with torch.no_grad():
        tiny_model()(ids[:1], output_attention_stats=True).attention_stats.save(saved / "c.safetensors")
    result = invoke("compare", saved / "a.safetensors", saved / "c.safetensors")
    assert result.exit_code == 2
    assert "b: expected 2 rows as in a, got 1" in words(result)


def captured(monkeypatch, name):
    """What a picture was asked for; it draws as ever."""
    calls = []
    function = getattr(viz, name)

    @functools.wraps(function)
    def remember(*sources, **options):
        calls.append((sources, options))
        return function(*sources, **options)

    monkeypatch.setattr(viz, name, remember)
    return calls


@pytest.mark.parametrize(
    ("text", "expected"), [("20:", slice(20, None)), (":9", slice(None, 9)), ("5:9", slice(5, 9)), (":", slice(None))]
)
def test_roles_of_some_queries(text, expected, saved, monkeypatch):
    calls = captured(monkeypatch, "plot_head_roles")
    result = invoke("plot", saved / "a.safetensors", "--what", "head-roles", "--query-slice", text)
    assert result.exit_code == 0, result.output
    assert calls[0][1] == {"query_slice": expected}


@pytest.mark.parametrize(
    ("arguments", "name", "options"),
    [
        ([], "plot_head_comparison", {}),
        (["--statistic", "sink_mass"], "plot_head_comparison", {"statistic": "sink_mass"}),
        (["--what", "comparison", "--statistic", "sink_mass"], "plot_comparison", {}),
        (
            ["--what", "comparison", "--layer", "2", "--head", "1", "--batch", "1", "--kind", "logits"],
            "plot_comparison",
            {"layer": 2, "head": 1, "batch": 1, "kind": "logits"},
        ),
    ],
    ids=str,
)
def test_compare_draws(arguments, name, options, saved, monkeypatch):
    calls = captured(monkeypatch, name)
    a, b, picture = saved / "a.safetensors", saved / "b.safetensors", saved / "difference.png"
    result = invoke("compare", a, b, "--plot", picture, *arguments)
    assert result.exit_code == 0, result.output
    assert "difference.png" in result.output
    assert " lines" in result.output
    assert matplotlib.image.imread(picture).size > 0
    ((sources, given),) = calls
    assert given == options
    for source, path in zip(sources, (a, b), strict=True):
        assert (source["entropy"] == AttentionStats.load(path)["entropy"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "2"], "--layer: head-comparison takes no such option"),
        (["--what", "comparison", "--layer", "2"], "--layer: it is for the picture; name a file with --plot"),
        (["--what", "head-grid"], "--what: expected one of comparison, head-comparison, got 'head-grid'"),
        (["--what", "comparison"], "--what: it is for the picture; name a file with --plot"),
        (["--what", "head-comparison"], "--what: it is for the picture; name a file with --plot"),
        (["--dpi", "120"], "--dpi: it is for the picture; name a file with --plot"),
        (["--plot", "a.jpg"], "--plot: expected a name that ends in .png, .svg, .pdf, got 'a.jpg'"),
        (["--plot", "/missing/a.png"], "the folder '/missing' does not exist"),
        (["--plot", "a.png", "--what", "comparison", "--layer", "9"], "layer: 9 was not measured; there are [0, 1, 2]"),
        (["--plot", "a.png", "--statistic", "hidden_norm"], "statistic: expected one with heads, got 'hidden_norm'"),
        (["--plot", "a.png", "--statistic", "entropie"], "--statistic: expected one of distance_histogram,"),
    ],
    ids=str,
)
def test_bad_pictures_of_comparisons(arguments, message, saved):
    before = sorted(saved.iterdir())
    result = invoke("compare", saved / "a.safetensors", saved / "b.safetensors", *arguments)
    assert result.exit_code == 2, result.output
    assert message in words(result)
    assert sorted(saved.iterdir()) == before
    assert not Path("a.png").exists()
