"""What a user's program sees of the library: it runs; mypy at its strictest accepts it, see pyproject.toml."""

from __future__ import annotations

import pytest
from corpora import measured, write
from downstream.program import main


def test_it_runs(tmp_path):
    write(tmp_path / "texts", count=9)
    summary = measured(tmp_path / "texts", tmp_path / "run")
    numbers = main([tmp_path / "run" / "summary.safetensors"], tmp_path)
    assert numbers["layers"] == 2
    assert numbers["bytes"] > 10_000
    assert numbers["corpus"] == summary.texts + len(summary.about.scores) * 18
    assert numbers["entropy"] == pytest.approx(numbers["mine"], rel=0.5)
