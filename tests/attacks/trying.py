"""Trying a file: refused in a message that names it or looked at, and cheaply in both cases."""

from __future__ import annotations

import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import hostile

MOST_BYTES = 16 * 2**20


@contextmanager
def little_memory(most: int = MOST_BYTES):
    """At no time within the block more than so many bytes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak / 2**20:.0f} MiB"


def refused(data: bytes, folder: Path) -> str | None:
    """Why a file is refused; None if it loads and can be looked at."""
    path, kind = folder / "hostile.safetensors", hostile.format_of(hostile.run_file())
    for whole in (hostile.run_file(), hostile.corpus_file()):
        if hostile.format_of(whole).encode() in data:
            kind = hostile.format_of(whole)
            # What is imported on the first use does not count.
            path.write_bytes(whole)
            hostile.look_at(path, kind)
    path.write_bytes(data)
    with little_memory():
        try:
            hostile.look_at(path, kind)
        except ValueError as error:
            said = str(error)
        else:
            return None
    assert said.startswith("path: ")
    assert repr(str(path)) in said
    assert said.isprintable()
    assert len(said) < 2000
    return said
