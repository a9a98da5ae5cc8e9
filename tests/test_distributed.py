"""Models over two processes: the statistics of one, and gradients that do not know they were observed."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import write
from forked import Python

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.parametrize("case", ["tensor_parallel", "pipeline_parallel", "data_parallel", "fully_sharded", "corpus"])
def test_on_two_processes(case, tmp_path):
    write(tmp_path / "texts", count=20)
    processes = [Python(WORKER, case, tmp_path, rank) for rank in range(2)]
    ended = [process.ended(120) for process in processes]
    failed = [said for code, said in ended if code]
    assert not failed, "\n".join(failed)
