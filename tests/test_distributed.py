"""Models over two processes: the statistics of one, and gradients that do not know they were observed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.parametrize("case", ["tensor_parallel", "pipeline_parallel", "data_parallel", "fully_sharded", "corpus"])
def test_on_two_processes(case, tmp_path):
    write(tmp_path / "texts", count=20)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), case, str(tmp_path), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [output for process, output in zip(processes, outputs, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
