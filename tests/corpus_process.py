"""What processes beside a corpus run do, apart from the tests so that they are quickly started."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from corpora import run
from filelock import FileLock


def measure(data: str, out: str, every: int, killed_after: float | None = None) -> None:
    """Take part in a run; kill -9 after some seconds."""
    if killed_after is not None:
        threading.Timer(killed_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    started = run(Path(data), Path(out), every=every)
    started.begin()
    started.measure(lambda texts, tokens: None)
    os._exit(0)


def hold(lock: str) -> None:
    """Keep a lock until somebody kills this process."""
    with FileLock(lock):
        time.sleep(600)
