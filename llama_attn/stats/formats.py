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
    """A file holds something else than what was asked for, or nothing of ours. The message says in Python what takes it.

    Args:
        found: What was expected and found, in words.
        holds: The key that the file has, one of `HOLDS`; None if it has none.
    """

    def __init__(self, found: str, holds: str | None = None) -> None:
        self.found, self.holds = found, holds
        # What it can be made of again, so that it can be pickled.
        super().__init__(found, holds)

    def __str__(self) -> str:
        return self.found if self.holds is None else self.advising(HOLDS[self.holds][1])

    def advising(self, advice: str) -> str:
        """The message with other advice."""
        return f"{self.found}; {advice}"


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
    for key, (what, _) in HOLDS.items():
        if key in metadata:
            raise OtherFileError(f"path: {str(path)!r} is {what}, not {HOLDS[wanted][0]}", key)
    raise OtherFileError(f"path: {str(path)!r} was not written by {wanted.rpartition('.')[2]}.save")
