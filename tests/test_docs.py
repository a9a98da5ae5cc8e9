"""The pages on analysis and figures name everything there is."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from llama_attn import analysis, viz
from llama_attn.demo import HUB_ID

DOCS = Path(__file__).parent.parent / "docs"
PLOTS = [name for name in viz.__all__ if name.startswith("plot_")]


@pytest.mark.parametrize("name", PLOTS)
def test_every_figure_is_in_the_gallery(name):
    page = (DOCS / "gallery.md").read_text()
    picture = f"images/gallery/{name.removeprefix('plot_')}.png"
    assert f"viz.{name}(" in page
    assert picture in page
    assert 5_000 < (DOCS / picture).stat().st_size < 200_000


def test_the_gallery_has_no_other_pictures():
    names = {path.stem for path in (DOCS / "images" / "gallery").iterdir()}
    assert names == {name.removeprefix("plot_") for name in PLOTS}


def test_every_question_is_explained():
    page = (DOCS / "analysis.md").read_text()
    for name in set(analysis.__all__) - {"as_dataset", "require"}:
        assert f"`{name}(" in page, name


def test_every_number_of_the_benchmarks_was_measured():
    page = runpy.run_path(str(DOCS / "make_benchmarks.py"))["page"]
    measured = json.loads((DOCS / "benchmarks.json").read_text())
    assert (DOCS / "benchmarks.md").read_text() == page(measured), "run python docs/make_benchmarks.py"


@pytest.mark.smollm2
def test_the_pictures_call_the_model_as_the_command_line_does(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    model, _ = runpy.run_path(str(DOCS / "measured_runs.py"))["load"]()
    assert model.config.name_or_path == HUB_ID
