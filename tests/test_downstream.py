"""What a user's program sees of the types: mypy at its strictest accepts it, and it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import measured, write
from downstream.program import main

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "downstream" / "program.py"


# Errors in the library's own lines, or in transformers', are none of the program's, as where they are installed.
SETTINGS = """
[mypy]
[mypy-llama_attn.*]
follow_imports = silent
[mypy-transformers.*]
follow_imports = skip
"""


def strict(program: Path, folder: Path) -> str:
    """What mypy says of a program, from a folder without other settings."""
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "--cache-dir", "cache", program]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout


def test_a_program_is_typed(tmp_path):
    assert "Success: no issues found in 1 source file" in strict(PROGRAM, tmp_path)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from llama_attn.corpus import CorpusSummary\nnumber: str = CorpusSummary.load('a').texts\n")
    assert 'has type "int", variable has type "str"' in strict(wrong, tmp_path), "the check can fail"


def test_it_runs(tmp_path):
    write(tmp_path / "texts", count=9)
    summary = measured(tmp_path / "texts", tmp_path / "run")
    numbers = main([tmp_path / "run" / "summary.safetensors"], tmp_path)
    assert numbers["layers"] == 2
    assert numbers["bytes"] > 10_000
    assert numbers["corpus"] == summary.texts + len(summary.about.scores) * 18
    assert numbers["entropy"] == pytest.approx(numbers["mine"], rel=0.5)
