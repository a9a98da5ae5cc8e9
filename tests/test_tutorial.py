"""The tutorial runs, and the copy in the repository shows what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
PICTURES = 10


def shown(notebook) -> list[list[set[str]]]:
    """Kinds of output of every cell."""
    return [
        [set(output.get("data", {output.output_type: None})) for output in cell.get("outputs", [])]
        for cell in notebook.cells
    ]


@pytest.fixture
def stored():
    return nbformat.read(TUTORIAL, as_version=4)


def statistics(notebook) -> list[list[str]]:
    """What tables of statistics list."""
    pages = [
        output.get("data", {}).get("text/html", "") for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    return [found for page in pages if (found := re.findall(r"<tr><td>(\w+)</td><td>\w+: \d", page))]


def check(notebook):
    """Statistics and pictures are there, and nothing went to the error stream."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    data = [output.get("data", {}) for output in outputs]
    pages = [each["text/html"] for each in data if "AttentionStats" in each.get("text/html", "")]
    assert len(pages) == 1
    assert "30 layers × 9 heads, batch 1, 34 queries, 34 keys" in pages[0]
    assert "&lt;|im_start|&gt;" in pages[0]
    assert sum("image/png" in each for each in data) == PICTURES
    assert all(cell.outputs for cell in notebook.cells[4:] if cell.cell_type == "code"), "each shows something"


@pytest.mark.smollm2
def test_every_cell_runs(stored, tmp_path):
    fresh = nbformat.from_dict(stored)
    for cell in fresh.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(
        fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    check(fresh)
    run_again = "run: jupyter execute --inplace docs/tutorial.ipynb"
    written = nbformat.read(TUTORIAL, as_version=4)
    assert shown(fresh) == shown(written), run_again
    assert statistics(fresh) == statistics(written), run_again
    assert len(statistics(fresh)) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_stored_copy_has_its_outputs(stored):
    nbformat.validate(stored)
    check(stored)
    assert TUTORIAL.stat().st_size < 1_000_000
    assert str(Path.home()) not in TUTORIAL.read_text()
    assert "site-packages" not in TUTORIAL.read_text(), "no path of the machine that ran it"
