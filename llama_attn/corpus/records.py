"""Records of a corpus: text in files of lines, JSON lines or Parquet, and in datasets of the hub."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

SUFFIXES = (".txt", ".jsonl", ".parquet")
# A longer line is no text that somebody wrote, and is not read into memory.
LONGEST_LINE = 64 * 2**20
# Read at once while lines are counted.
CHUNK = 2**20


@dataclass(frozen=True)
class Record:
    """One text as it was found; or the reason why there is none.

    Args:
        file: Name of the file, relative to what was given.
        line: Line of the file, or row of the table, from 1.
        text: The text; empty where there is none.
        unreadable: Why it cannot be read; empty if it can.
    """

    file: str
    line: int
    text: str = ""
    unreadable: str = ""

    @property
    def digest(self) -> int:
        """Hash of the text, a signed integer of 64 bits."""
        return int.from_bytes(
            hashlib.blake2b(self.text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True
        )


class Dataset(Protocol):
    """What is no file and has records nevertheless."""

    def read(self, source: Source, first: int, count: int, field: str) -> Iterator[Record]:
        """Some of its records."""


@dataclass(frozen=True)
class Source:
    """A file of texts, as it was when it was counted.

    Args:
        name: Its name, relative to what was given.
        path: Where it lies; or what reads it, where it is no file.
        size: How long it is [byte].
        checksum: Hash of its content.
        starts: Where every ``every``-th record begins: byte and number of lines before it; rows of a table.
        records: How many records there are: lines that are not blank, or rows.
        unreadable: Why none of it can be read; empty if it can.
    """

    name: str
    path: Path | Dataset
    size: int
    checksum: str
    starts: tuple[tuple[int, int], ...]
    records: int
    unreadable: str = ""


def find_files(data: list[str]) -> list[tuple[str, Path]]:
    """The files of a list of files and folders, by the names that they are known by: relative to what was given.

    Raises:
        ValueError: Something is not there, or of another kind; a folder has none; or two have the same name.
    """
    found: dict[str, Path] = {}
    for given in data:
        root = Path(given)
        if root.is_dir():
            paths = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
            if not paths:
                raise ValueError(f"DATA: the folder {given} has no file that ends in {', '.join(SUFFIXES)}")
            named = {path.relative_to(root).as_posix(): path for path in paths}
        elif not root.is_file():
            raise ValueError(f"DATA: there is no file or folder {given}")
        elif root.suffix not in SUFFIXES:
            raise ValueError(f"DATA: expected a file that ends in {', '.join(SUFFIXES)}, got {given}")
        else:
            named = {root.name: root}
        if twice := sorted({*named} & {*found}):
            raise ValueError(f"DATA: two files are called {twice[0]}; give the folder that both are in")
        found |= named
    return sorted(found.items())


def survey(name: str, path: Path, every: int) -> Source:
    """Count the records of a file and hash it, in one go.

    Args:
        name: What it is called.
        path: Where it lies.
        every: Of how many records the beginning is noted.
    """
    digest, size = hashlib.blake2b(digest_size=16), 0
    if path.suffix == ".parquet":
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        rows, unreadable = _rows(path)
        starts = tuple((first, first) for first in range(0, rows, every))
        return Source(name, path, size, digest.hexdigest(), starts, rows, unreadable)
    noted: list[tuple[int, int]] = []
    records = lines = 0
    with path.open("rb") as file:
        while True:
            begin, blank, length = size, True, 0
            # A line may be longer than memory.
            while part := file.readline(CHUNK):
                digest.update(part)
                length += len(part)
                blank = blank and not part.strip()
                if part.endswith(b"\n"):
                    break
            if not length:
                break
            size += length
            if not blank:
                if records % every == 0:
                    noted.append((begin, lines))
                records += 1
            lines += 1
    return Source(name, path, size, digest.hexdigest(), tuple(noted), records)


def read(source: Source, start: tuple[int, int], count: int, field: str) -> Iterator[Record]:
    """Some records of a file.

    Args:
        source: The file.
        start: One of its starts.
        count: How many records.
        field: Name of the field, or column, that holds the text.
    """
    path = source.path
    if not isinstance(path, Path):
        yield from path.read(source, start[0], count, field)
        return
    if path.suffix == ".parquet":
        yield from _read_rows(source, path, start[0], count, field)
        return
    with path.open("rb") as file:
        file.seek(start[0])
        line, left = start[1], count
        while left:
            text = _line(file)
            line += 1
            if isinstance(text, bytes) and not text.strip():
                if not text:
                    raise OSError(f"{path} has become shorter while it was read")
                continue
            left -= 1
            yield _record(source.name, line, text, None if path.suffix == ".txt" else field)


def _line(file: BinaryIO) -> bytes | int:
    """The next line; or how long it is, if that is too long."""
    text = file.readline(LONGEST_LINE + 1)
    if len(text) <= LONGEST_LINE:
        return text
    length = len(text)
    while not text.endswith(b"\n") and (text := file.readline(CHUNK)):
        length += len(text)
    return length


def _record(name: str, line: int, text: bytes | int, field: str | None) -> Record:
    """The record of a line, of which the whole is text if there is no field."""

    def unreadable(why: str) -> Record:
        return Record(name, line, unreadable=why)

    if isinstance(text, int):
        return unreadable(f"a line of {text:,} bytes, more than {LONGEST_LINE:,}")
    if line == 1:
        text = text.removeprefix(codecs.BOM_UTF8)
    try:
        decoded = text.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return unreadable(f"not UTF-8: byte {error.start} is 0x{text[error.start]:02x}")
    if field is None:
        return Record(name, line, decoded)
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return unreadable(f"not JSON: {error}")
    if not isinstance(value, dict):
        return unreadable(f"expected an object with the field {field!r}, got {type(value).__name__}")
    if field not in value:
        return unreadable(f"no field {field!r}; there are {sorted(value)[:8]}")
    return of_field(name, line, value[field], field)


def of_field(name: str, line: int, value: Any, field: str) -> Record:
    """The record that a field holds.

    Args:
        name: What its file is called.
        line: Its line.
        value: The field.
        field: Its name.
    """
    if not isinstance(value, str):
        return Record(name, line, unreadable=f"field {field!r}: expected text, got {type(value).__name__}")
    if not value.strip():
        return Record(name, line, unreadable=f"field {field!r}: no text in it")
    return Record(name, line, value)


def _of_cell(name: str, line: int, cell: Any, field: str) -> Record:
    try:
        value = cell.as_py()
    except UnicodeDecodeError as error:
        return Record(name, line, unreadable=f"field {field!r}: not UTF-8: {error.reason}")
    return of_field(name, line, value, field)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'llama_attn[corpus]'") from error
    return parquet


def _rows(path: Path) -> tuple[int, str]:
    """How many rows a table has, and why it cannot be read."""
    parquet = _parquet()
    try:
        with parquet.ParquetFile(path) as table:
            return int(table.metadata.num_rows), ""
    except (OSError, ValueError) as error:
        # pyarrow's own errors are of these kinds.
        return 0, str(error).strip().splitlines()[0]


def _read_rows(source: Source, path: Path, first: int, count: int, field: str) -> Iterator[Record]:
    with _parquet().ParquetFile(path) as table:
        if field not in table.schema_arrow.names:
            for line in range(first, min(first + count, source.records)):
                yield Record(
                    source.name, line + 1, unreadable=f"no column {field!r}; there are {table.schema_arrow.names[:8]}"
                )
            return
        begin = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            skipped, begin = begin, begin + rows
            if begin <= first or skipped >= first + count:
                continue
            line = skipped
            try:
                for batch in table.iter_batches(row_groups=[group], columns=[field]):
                    for value in batch.column(0):
                        if first <= line < first + count:
                            yield _of_cell(source.name, line + 1, value, field)
                        line += 1
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                for lost in range(max(line, first), min(begin, first + count)):
                    yield Record(source.name, lost + 1, unreadable=reason)
