"""Writing files so that a name only ever stands for a complete one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name in the same folder, which becomes ``path`` if the block ends well and vanishes if not.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: The path is a folder itself.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"path: {str(path)!r} is a folder, not a file")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
