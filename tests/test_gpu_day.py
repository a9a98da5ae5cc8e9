"""``benchmarks/gpu.py`` as far as it goes without a GPU."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"


# As if nobody else ran tests: beside other workers nothing is timed.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
ENVIRONMENT = ALONE | {"CUDA_VISIBLE_DEVICES": ""}


def rehearsed(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300)


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


def test_a_rehearsal_leaves_no_number():
    results = ROOT / "docs" / "benchmarks.json"
    before = results.read_bytes()
    said = rehearsed("--dry-run", "--only", "model")
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr
    assert said.stdout.splitlines()[-1].startswith("model    ok: 4 passed")
    assert results.read_bytes() == before


def test_models_are_observed(script):
    """A part of the checks; the rest of them is as the tests of the engines and of the oracle."""
    step = script["Step"]("exact", "a part", "tests/gpu_worker.py", ("-o", "addopts=", "-k", "padded and eager"))
    assert script["run"](step, 300, {"CUDA_VISIBLE_DEVICES": ""}).startswith("ok: 2 passed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_without_a_gpu():
    said = rehearsed()
    assert said.returncode == 2
    assert "there is no CUDA device here; --dry-run rehearses without" in said.stderr


@pytest.mark.parametrize(
    ("minutes", "names", "said"),
    [
        ("3", ("wrong", "right"), ("wrong    FAILED: 1 failed", "right    ok: 1 passed")),
        ("0.02", ("slow", "left"), ("slow     stopped: time is out", "left     not run: time is out")),
    ],
)
def test_what_fails_or_takes_too_long_is_said(minutes, names, said, script, tmp_path, monkeypatch, capsys):
    (tmp_path / "test_wrong.py").write_text("def test_wrong():\n    assert False\n")
    (tmp_path / "test_slow.py").write_text("import time\n\n\ndef test_slow():\n    time.sleep(60)\n")
    (tmp_path / "test_right.py").write_text("def test_right():\n    pass\n")
    steps = tuple(script["Step"](name, name, str(tmp_path / f"test_{name}.py")) for name in names)
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--minutes", minutes])
    assert main() == 1
    lines = capsys.readouterr().out.splitlines()[-len(said) :]
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
