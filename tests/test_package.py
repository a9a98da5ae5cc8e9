"""The house: who imports whom, how large files are, and what an import costs."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llama_attn
from llama_attn.cli import app

PACKAGE = Path(llama_attn.__file__).parent
OPTIONAL = {"matplotlib", "plotly", "xarray", "pandas", "triton"}

# Who may know transformers; `backends/*` are the upstream wrappers and the registry.
KNOW_TRANSFORMERS = {"modeling_llama.py", "registration.py", "demo.py"}
ROOMS_THAT_KNOW_TRANSFORMERS = {"backends", "cli", "corpus", "observe", "testing"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Modules that the code imports when it runs; those for the type checker alone do not count."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> tuple[str, set[str]]:
    relative = path.relative_to(PACKAGE)
    return str(relative), imported(ast.parse(path.read_text()))


def violations(relative: str, names: set[str]) -> list[str]:
    """Which imports of a file point the wrong way."""
    room = relative.split("/")[0]
    bad = []
    for name in names:
        root, *rest = name.split(".")
        ours = rest[0] if root == "llama_attn" and rest else ""
        # What backends share lies in private modules.
        other_backend = (
            relative.startswith("backends/")
            and ours == "backends"
            and len(rest) > 1
            and not rest[1].startswith("_")
            and "registry" not in relative
        )
        # What engines share, and the kernels of one, lie in private modules.
        other_engine = (
            relative.startswith("engines/")
            and ours == "engines"
            and len(rest) > 1
            and not rest[1].startswith("_")
            and relative not in ("engines/_fused.py", "engines/_operator.py")
        )
        if (
            (root == "transformers" and relative not in KNOW_TRANSFORMERS and room not in ROOMS_THAT_KNOW_TRANSFORMERS)
            or (root == "triton" and relative != "engines/_triton_kernels.py")
            or (root in ("matplotlib", "plotly") and room != "viz")
            or (root in ("torch", "transformers") and room in ("viz", "analysis"))
            or (room == "viz" and ours and name not in ALLOWED_TO_VIZ and ours not in ("viz", "analysis"))
            or (room == "analysis" and ours and name not in ALLOWED_TO_ANALYSIS and ours != "analysis")
            or (room == "engines" and ours and ours not in ("stats", "engines"))
            or (room == "stats" and ours and ours != "stats")
            or other_backend
            or other_engine
        ):
            bad.append(f"{relative} imports {name}")
    return bad


ALLOWED_TO_ANALYSIS = {
    "llama_attn.stats.container", "llama_attn.stats.container.AttentionStats",
    "llama_attn.stats.integers", "llama_attn.stats.integers.is_integer",
    "llama_attn.stats.runs", "llama_attn.stats.runs.Runs", "llama_attn.stats.runs.runs_of",
    "llama_attn.stats.runs.sum_of_runs",
    "llama_attn.stats.table", "llama_attn.stats.table.TAKEN", "llama_attn.stats.table.WHOLE_HAVE_NO_MEAN",
    "llama_attn.stats.table.statistics_table",
}  # fmt: skip
ALLOWED_TO_VIZ = {
    "llama_attn.corpus.bins", "llama_attn.corpus.bins.position_starts", "llama_attn.corpus.bins.value_bins",
    "llama_attn.corpus.examples", "llama_attn.corpus.examples.AROUND", "llama_attn.corpus.examples.NO_TOKEN",
    "llama_attn.corpus.moments", "llama_attn.corpus.moments.Moments",
    "llama_attn.corpus.summary", "llama_attn.corpus.summary.CorpusSummary", "llama_attn.corpus.summary.summary_of",
    "llama_attn.stats.files", "llama_attn.stats.files.complete_file",
    "llama_attn.stats.images", "llama_attn.stats.images.ImageSegments", "llama_attn.stats.images.ImageSpan",
    "llama_attn.stats.integers", "llama_attn.stats.integers.is_integer",
    "llama_attn.stats.shares", "llama_attn.stats.shares.percent",
    "llama_attn.stats.token_text", "llama_attn.stats.token_text.readable", "llama_attn.stats.token_text.drawn",
    "llama_attn.stats.token_text.printable",
}  # fmt: skip


def test_imports_point_one_way():
    assert [line for path in modules() for line in violations(*rooms(path))] == []


@pytest.mark.parametrize(
    ("relative", "code"),
    [
        ("viz/figures/attention.py", "import torch"),
        ("viz/figures/attention.py", "from llama_attn.modeling_llama import LlamaModel"),
        ("analysis/summary.py", "from llama_attn.viz.style import readable"),
        ("engines/torch.py", "def f():\n    from transformers import LlamaConfig"),
        ("engines/torch.py", "from llama_attn.engines.native import walk"),
        ("engines/triton.py", "import triton"),
        ("stats/rows.py", "from llama_attn.engines import get_engine"),
        ("backends/sdpa.py", "from llama_attn.backends import eager"),
        ("stats/container.py", "import transformers"),
        ("cli/run.py", "import matplotlib.pyplot"),
        ("viz/style.py", "from llama_attn.stats.config import AttentionStatsConfig"),
    ],
)
def test_the_check_of_imports_can_fail(relative, code):
    assert violations(relative, imported(ast.parse(code)))


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    reached = {name: set(targets) for name, targets in graph.items()}
    for _ in graph:
        grown = {name: seen | {far for near in seen for far in reached.get(near, ())} for name, seen in reached.items()}
        if grown == reached:
            break
        reached = grown
    return sorted(name for name, seen in reached.items() if name in seen)


def module_graph() -> dict[str, set[str]]:
    names = {".".join(("llama_attn", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in modules()}
    graph = {}
    for name, path in names.items():
        wanted = imported(ast.parse(path.read_text())) & set(names)
        graph[name] = {other for other in wanted if not other.endswith("__init__")} - {name}
    return graph


def test_no_file_imports_itself_by_way_of_others():
    assert circles(module_graph()) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"], "the check can fail"


def test_no_file_is_long_and_none_asserts_or_prints():
    for path in modules():
        source = path.read_text()
        assert len(source.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.Assert), f"{path} asserts"
            assert getattr(getattr(node, "func", None), "id", "") != "print", f"{path} prints"
    assert not list(PACKAGE.rglob("utils.py"))


def test_the_page_of_the_report_is_made_of_short_files():
    pages = sorted((PACKAGE / "viz" / "report" / "page").iterdir())
    assert {path.suffix for path in pages} == {".css", ".html", ".js"}
    for path in pages:
        source = path.read_text()
        assert len(source.splitlines()) < 400, path
        assert "innerHTML" not in source, f"{path} reads text as HTML"
        assert not re.search(r"https?://", source), f"{path} names an address"


def modules_after(*statements: str) -> list[set[str]]:
    """What one process has imported after each of them."""
    shown = "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    script = "\n".join(["import sys, json", *(f"{statement}\n{shown}" for statement in statements)])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [set(json.loads(line)) for line in result.stdout.splitlines() if line.startswith("[")]


def test_importing_brings_no_optional_package():
    # Where triton is installed, torch imports it for transformers' own Llama.
    before, library, commands, drawing = modules_after(
        "import transformers.models.llama.modeling_llama",
        "import llama_attn",
        "import llama_attn.cli, llama_attn.analysis, llama_attn.viz",
        "import matplotlib",
    )
    optional = OPTIONAL - before
    assert not optional & library
    assert not optional & commands
    assert {"matplotlib", "plotly", "xarray", "pandas"} <= optional
    assert "matplotlib" in drawing, "the check can fail"


def test_public_names():
    for name in llama_attn.__all__:
        assert getattr(llama_attn, name) is not None
    assert (PACKAGE / "py.typed").is_file()
    assert llama_attn.__version__ in (PACKAGE.parent / "CHANGELOG.md").read_text()


def test_the_page_of_statistics_is_up_to_date():
    docs = PACKAGE.parent / "docs"
    page = runpy.run_path(str(docs / "make_tables.py"))["statistics_page"]()
    assert (docs / "statistics.md").read_text() == page, "run python docs/make_tables.py"


def test_the_page_of_models_is_up_to_date():
    docs = PACKAGE.parent / "docs"
    page = runpy.run_path(str(docs / "make_models.py"))["models_page"]()
    assert (docs / "models.md").read_text() == page, "run python docs/make_models.py"


def test_the_page_of_commands_is_up_to_date():
    docs = PACKAGE.parent / "docs"
    page = runpy.run_path(str(docs / "make_cli.py"))["cli_page"]()
    assert (docs / "reference" / "cli.md").read_text() == page, "run python docs/make_cli.py"


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_the_page_of_commands_has_every_option_of_the_help(command):
    page = (PACKAGE.parent / "docs" / "reference" / "cli.md").read_text()
    section = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", page, flags=re.M | re.S)[1]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).stdout
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", section.split("\n- ", 1)[-1]))
    listed = set(re.findall(r"^[\W_]*(--[a-z][a-z-]*)", shown, flags=re.M)) - {"--help"}
    assert listed <= options, shown
