"""`torch.compile`: the tests of compiled.py and compiled_record.py, in a process where nothing wraps the functions that Dynamo traces.

Here every function of the package is wrapped to check the shapes of its arguments.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("file", ["compiled.py", "compiled_record.py"])
def test_compiled(file):
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", file]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:]
