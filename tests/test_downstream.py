"""What a user's program sees of the types: mypy at its strictest accepts it, and it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from corpora import measured, write
from downstream.program import main

PROGRAM = Path(__file__).parent / "downstream" / "program.py"


def strict(program: Path, folder: Path) -> str:
    """What mypy says of a program, from a folder without settings."""
    # transformers' own types are beside the point; no module of ours may be skipped.
    (folder / "mypy.ini").write_text("[mypy]\n[mypy-transformers.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", folder / "mypy.ini", "--cache-dir",
               folder / "cache", program]  # fmt: skip
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


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
