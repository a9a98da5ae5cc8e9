"""`torch.compile`: the tests of compiled.py and compiled_record.py, in a process where nothing wraps the functions that Dynamo traces.

Here every function of the package is wrapped to check the shapes of its arguments.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("compiled.py", "generate or breaks"),
        ("compiled.py", "not generate and not breaks"),
        ("compiled_record.py", "a_compiled_model"),
        ("compiled_record.py", "not a_compiled_model"),
    ],
)
def test_compiled(file, chosen):
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-k", chosen]
    result = subprocess.run([*command, file], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:]
