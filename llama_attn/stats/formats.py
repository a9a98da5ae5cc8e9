"""Which of the files that are written here one is: its metadata has a key that no other has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

STATS, SUMMARY = "llama_attn.AttentionStats", "llama_attn.CorpusSummary"
# What a file with the key holds, and what takes it.
HOLDS = {
    STATS: ("the statistics of one run", "AttentionStats.load, llama_attn.analysis and llama_attn.viz.report take it"),
    SUMMARY: (
        "the summary of a corpus",
        "llama_attn.corpus.CorpusSummary.load, llama_attn.corpus.compare and llama_attn.viz.corpus_report take it",
    ),
}


class OtherFileError(ValueError):
    """A file holds something else than what was asked for, or nothing of ours."""


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is there.

    Raises:
        FileNotFoundError: There is no such file, or it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"path: {str(path)!r} is a folder; give the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {str(path)!r}")
    return path


def header_of(path: Path, metadata: Mapping[str, str] | None, wanted: str) -> str:
    """The header of a file that holds what is wanted.

    Args:
        path: Of the file, for the message.
        metadata: Of the file.
        wanted: The key, one of `HOLDS`.

    Raises:
        OtherFileError: It holds something else; the message says what, and what takes it.
    """
    metadata = metadata or {}
    if wanted in metadata:
        return metadata[wanted]
    for key, (what, takes) in HOLDS.items():
        if key in metadata:
            raise OtherFileError(f"path: {str(path)!r} is {what}, not {HOLDS[wanted][0]}; {takes}")
    raise OtherFileError(f"path: {str(path)!r} was not written by {wanted.rpartition('.')[2]}.save")
