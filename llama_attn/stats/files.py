"""Writing files so that a name only ever stands for a complete one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def complete_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name in the same folder, which becomes ``path`` if the block ends well and vanishes if not.

    The name is its caller's own: threads and processes may write the same path, of which one ends last. The file gets
    the permissions of any new file (the user's umask), or keeps those of the file that it replaces.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: The path is a folder itself.
        FileExistsError: The path is a device or a pipe, which would be replaced.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"path: {str(path)!r} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"path: {str(path)!r} is a device or a pipe, not a file")
    # Short, since the name itself may be as long as the system allows.
    unfinished = path.with_name(f".{secrets.token_hex(8)}.part")
    # Made here and not by the block, so that the system says what a new file's permissions are.
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = unfinished.stat().st_mode
        yield unfinished
        with suppress(FileNotFoundError):
            mode = path.stat().st_mode
        # What writes into the name may have put a file of its own there: safetensors does, readable by its owner alone.
        unfinished.chmod(stat.S_IMODE(mode))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
