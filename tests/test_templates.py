"""Each template, put into a copy of the package, is seen by the tests, the documentation and the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cli_models
import pytest
from forked import Python

ROOT = Path(__file__).parent.parent
CLI = ("-c", "from llama_attn.cli import app; app()")
# What is neither code nor what the tests of code read.
LEFT_OUT = shutil.ignore_patterns("*.so", "*.ipynb", "__pycache__", "experiments", "upstream", "attacks")


@pytest.fixture
def copy(tmp_path):
    """The package, its tests and its pages."""
    for part in ("llama_attn", "tests", "docs"):
        shutil.copytree(ROOT / part, tmp_path / "copy" / part, ignore=LEFT_OUT)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path / "copy" / file)
    return tmp_path / "copy"


@pytest.fixture
def run(copy):
    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "200"}
        return Python(*arguments, folder=copy, environment=environment).ended()

    return run


def pytested(run, *chosen):
    # Plugins of pytest that transformers needs too.
    imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    return run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", imported, *chosen)


def insert(file, before, new):
    """New text, in front of the first of its like."""
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, new + before, 1))


def test_a_statistic(copy, run, tmp_path):
    shutil.copy(ROOT / "templates" / "statistic.py", copy / "llama_attn" / "stats" / "second.py")
    table = copy / "llama_attn" / "stats" / "__init__.py"
    table.write_text(table.read_text().replace("rows, ", "rows, second, "))
    # In every test of all statistics, on two backends; and those that know all names ask what this one is.
    code, said = pytested(run, "tests/test_exactness.py", "-k", "every_statistic_of_a_padded_batch")
    assert code == 0, said[-4000:]
    code, said = pytested(run, "tests/test_table.py", "-k", "test_the_table")
    assert code == 1, said[-4000:]
    assert "second_weight" in said
    page = copy / "docs" / "statistics.md"
    assert "second_weight" not in page.read_text()
    assert run("docs/make_tables.py")[0] == 0
    assert "| `second_weight` | layer × batch × head × query | probability |" in page.read_text()
    folder = cli_models.save("llama", tmp_path / "llama")
    code, said = run(
        *CLI, "run", folder, "--prompt", "the cat sat", "--statistics", "second_weight", "--out", tmp_path / "out"
    )  # fmt: skip
    assert code == 0, said[-4000:]
    check = "from llama_attn import AttentionStats; import sys; print(AttentionStats.load(sys.argv[1]).names)"
    code, said = run("-c", check, tmp_path / "out" / "stats.safetensors")
    assert "second_weight" in said


def test_a_backend(copy, run, tmp_path):
    shutil.copy(ROOT / "templates" / "backend.py", copy / "llama_attn" / "backends" / "plain.py")
    check = "from llama_attn.testing import assert_matches_reference as check; check('plain')"
    code, said = run("-c", check)
    assert code == 0, said[-4000:]
    code, said = run(*CLI, "backends")
    assert any(line.split()[1:4:2] == ["plain", "yes"] for line in said.splitlines() if "plain" in line), said
    folder = cli_models.save("llama", tmp_path / "llama")
    for backend in ("plain", "eager"):
        code, said = run(
            *CLI, "run", folder, "--prompt", "the cat sat", "--attn", backend, "--out", tmp_path / backend
        )  # fmt: skip
        assert code == 0, said[-4000:]
    check = (
        "from llama_attn import AttentionStats; import sys, torch\n"
        "plain, eager = map(AttentionStats.load, sys.argv[1:])\n"
        "assert plain.backend == 'plain'\n"
        "for name in eager.names: torch.testing.assert_close(plain[name], eager[name], rtol=1e-3, atol=1e-3, equal_nan=True)"
    )
    code, said = run("-c", check, *(tmp_path / backend / "stats.safetensors" for backend in ("plain", "eager")))
    assert code == 0, said[-4000:]


def test_a_figure(copy, run, tmp_path):
    shutil.copy(ROOT / "templates" / "figure.py", copy / "llama_attn" / "viz" / "figures" / "sink_growth.py")
    exports = copy / "llama_attn" / "viz" / "__init__.py"
    insert(
        exports,
        "from llama_attn.viz.figures.sources",
        "from llama_attn.viz.figures.sink_growth import plot_sink_growth\n",
    )
    insert(exports, '    "plot_sources"', '    "plot_sink_growth",\n')
    # The gallery is asked for its picture.
    code, said = pytested(run, "tests/test_docs.py", "-k", "gallery")
    assert code == 1, said[-4000:]
    assert "FAILED tests/test_docs.py::test_every_figure_is_in_the_gallery[plot_sink_growth]" in said
    folder = cli_models.save("llama", tmp_path / "llama")
    assert run(*CLI, "run", folder, "--prompt", "the cat sat", "--out", tmp_path / "out")[0] == 0
    code, said = run(
        *CLI, "plot", tmp_path / "out" / "stats.safetensors", "--what", "sink-growth", "--layer", "1",
        "--out", tmp_path / "sink.png",
    )  # fmt: skip
    assert code == 0, said[-4000:]
    assert (tmp_path / "sink.png").stat().st_size > 5_000
    # Its file is found in its folder, and drawn; here of a smaller model than the gallery's.
    [question] = (copy / "docs" / "gallery").glob("*_where_does_attention_go")
    shutil.copy(ROOT / "templates" / "picture.py", question / "sink_growth.py")
    assert run("docs/make_gallery.py", "--page")[0] == 0
    check = (
        "import runpy, sys; made = runpy.run_path('docs/make_gallery.py')\n"
        "made['draw'](made['PICTURES']['sink_growth'], {'text': sys.argv[1]})"
    )
    code, said = run("-c", check, tmp_path / "out" / "stats.safetensors")
    assert code == 0, said[-4000:]
    code, said = pytested(run, "tests/test_docs.py", "-k", "gallery or sink_growth")
    assert code == 0, said[-4000:]
    page = (copy / "docs" / "gallery.md").read_text()
    assert "### Sink growth\n\n![sink growth](images/gallery/sink_growth.png)" in page


def test_templates_are_clean():
    """As the code that they become."""
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, ROOT / "templates"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
    # All but the picture, whose names come from the figure and from the runs of the gallery.
    typed = sorted(set((ROOT / "templates").glob("*.py")) - {ROOT / "templates" / "picture.py"})
    done = subprocess.run([sys.executable, "-m", "mypy", *typed], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
