"""The pages on analysis and figures name everything there is."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
from functools import cached_property, partial
from pathlib import Path

import pytest

from llama_attn import analysis, viz
from llama_attn.demo import HUB_ID

DOCS = Path(__file__).parent.parent / "docs"
PLOTS = [name for name in viz.__all__ if name.startswith("plot_")]
GALLERY = DOCS / "gallery"
# One file per picture, in the folder of its question.
PICTURES = sorted(GALLERY.rglob("*.py"))


@pytest.mark.parametrize("name", PLOTS)
def test_every_figure_is_in_the_gallery(name):
    name = name.removeprefix("plot_")
    assert [path.stem for path in PICTURES].count(name) == 1, f"docs/gallery has no file, or several, named {name}.py"
    assert 5_000 < (DOCS / "images" / "gallery" / f"{name}.png").stat().st_size < 200_000


def test_the_gallery_has_no_other_pictures():
    names = {name.removeprefix("plot_") for name in PLOTS}
    assert {path.stem for path in PICTURES} == names
    assert {path.stem for path in (DOCS / "images" / "gallery").iterdir()} == names


def test_tutorials_show_what_their_code_draws():
    pages = {path.stem: path.read_text() for path in (DOCS / "tutorials").glob("*.md")}
    drawing = {name for name, page in pages.items() if ".savefig(" in page}
    assert drawing == {path.stem for path in (DOCS / "images" / "tutorials").iterdir()}
    assert drawing == set(runpy.run_path(str(DOCS / "make_tutorials.py"))["DRAWN"])
    assert [name for name in drawing if f"](../images/tutorials/{name}.png)" not in pages[name]] == []


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_a_picture_answers_a_question_and_says_how_to_read_it(picture):
    assert re.fullmatch(r"\d_[a-z]+(_[a-z]+)+", str(picture.parent.relative_to(GALLERY))), "its folder is a question"
    module = ast.parse(picture.read_text())
    title, _, reading = (ast.get_docstring(module) or "").partition("\n\n")
    assert re.fullmatch(r"[A-Z].{3,40}\.", title)
    assert len(re.findall(r"[.?](?=\s|$)", reading)) > 1, "two sentences or more"
    assert reading.endswith(".")
    [call] = [node.value for node in module.body if isinstance(node, ast.Assign) and node.targets[0].id == "figure"]
    assert call.func.id == f"plot_{picture.stem}"


def test_a_picture_measures_the_runs_that_it_shows_and_no_others(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    kinds = vars(importlib.import_module("measured_runs").Runs).items()
    names = {name for name, value in kinds if isinstance(value, cached_property) and not name.startswith("_")}
    read_by = runpy.run_path(str(DOCS / "make_gallery.py"))["read_by"]
    measured: dict[str, list[str]] = {path.stem: [] for path in PICTURES}
    for path in PICTURES:

        def measure(_, name, stem=path.stem):
            measured[stem].append(name)
            return f"the {name}"

        runs = type("Runs", (), {name: property(partial(measure, name=name)) for name in names})
        assert read_by(path, runs()) == {name: f"the {name}" for name in measured[path.stem]}
    assert measured["attention_map"] == ["beginning"]
    assert measured["image_rows"] == ["pictured"]
    assert measured["comparison"] == ["beginning", "other"]
    assert {name for each in measured.values() for name in each} == names, "each is measured for some picture"
    assert all(measured.values())


def test_the_page_of_the_gallery_is_up_to_date():
    page = runpy.run_path(str(DOCS / "make_gallery.py"))["gallery_page"]()
    assert (DOCS / "gallery.md").read_text() == page, "run python docs/make_gallery.py --page"


def test_every_question_is_explained():
    page = (DOCS / "analysis.md").read_text()
    for name in set(analysis.__all__) - {"as_dataset", "require"}:
        assert f"`{name}(" in page, name


def test_every_number_of_the_benchmarks_was_measured():
    page = runpy.run_path(str(DOCS / "make_benchmarks.py"))["page"]
    measured = json.loads((DOCS / "benchmarks.json").read_text())
    assert (DOCS / "benchmarks.md").read_text() == page(measured), "run python docs/make_benchmarks.py"


def test_how_much_longer_the_torch_engine_takes_is_as_measured():
    measured = json.loads((DOCS / "benchmarks.json").read_text())

    def longer(test, native, torch):
        rows = {row["case"]: row["value"] for row in measured[test]["rows"]}
        return f"{rows[torch] / rows[native]:.2f}"

    calls = [
        longer(
            f"test_engines.py::test_attention[{model}]", *(f"{x}: output and statistics" for x in ("native", "torch"))
        )
        for model in ("SmolLM2", "Llama-3-8B")
    ]
    forward = "streaming (native), statistics", "streaming_torch, statistics"
    whole = longer("test_forward.py::test_smollm2[4096-float32]", *forward)
    page = " ".join((DOCS / "limits.md").read_text().split())
    assert (
        f"{min(calls)} to {max(calls)} times as long, and a forward of SmolLM2 over 4,096 tokens {whole} times" in page
    )


@pytest.mark.smollm2
def test_the_pictures_call_the_model_as_the_command_line_does(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    model, _ = runpy.run_path(str(DOCS / "measured_runs.py"))["load"]()
    assert model.config.name_or_path == HUB_ID
