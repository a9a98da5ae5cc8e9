"""Files of labelled arrays: safetensors, with a checksum of everything in them that tells of damage."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llama_attn.stats.files import complete_file
from llama_attn.stats.formats import SUMMARY, OtherFileError, existing, header_of
from llama_attn.stats.token_text import printable

Arrays = dict[str, np.ndarray]


def write(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a file, which appears under its name only once it is complete.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    text = json.dumps(header)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with complete_file(path) as unfinished:
        save_file(arrays, unfinished, {SUMMARY: text, "checksum": _checksum(text, arrays)})


def read(path: str | os.PathLike[str]) -> tuple[Any, Arrays]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or was not written by `write`.
    """
    path = existing(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            text = header_of(path, metadata, SUMMARY)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if _checksum(text, arrays) != metadata.get("checksum"):
            raise ValueError("its checksum is not that of its content")
        header = json.loads(text)
    except OtherFileError:
        raise
    except RecursionError:
        raise ValueError(damaged(path, "its header is nested too deeply")) from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(damaged(path, error)) from error
    return header, arrays


def is_summary(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it holds a summary; nothing else of it is read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return SUMMARY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def damaged(path: str | os.PathLike[str], error: object) -> str:
    """What is said of a file that cannot be read."""
    # Parts of it may be quoted: on one line, and no more than that.
    return f"path: {os.fspath(path)!r} is damaged or no summary of a corpus: {printable(str(error)[:500])}"


def _checksum(header: str, arrays: Arrays) -> str:
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()
