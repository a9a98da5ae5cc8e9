"""What a process of a corpus run does, apart from the tests so that it is quickly started."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import torch
from corpora import run


def measure(data: str, out: str, every: int, killed_after: float | None = None) -> None:
    """Take part in a run; kill -9 after some seconds."""
    torch.set_num_threads(1)
    if killed_after is not None:
        threading.Timer(killed_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    started = run(Path(data), Path(out), every=every)
    started.begin()
    started.measure(lambda texts, tokens: None)
    os._exit(0)
