"""Datasets of the Hugging Face hub, read as a stream: nothing is downloaded that is not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_attn.corpus.records import Record, Source, of_field

NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset.

    Args:
        name: Its id on the hub, or a folder.
        subset: Name of its configuration; None for the only one.
        split: Name of the split.
    """

    name: str
    subset: str | None
    split: str

    def survey(self, every: int, limit: int | None) -> Source:
        """What is known of it before it is read.

        Args:
            every: Of how many records the beginning is noted.
            limit: Records that are read at most, which is needed where the hub does not know how many there are.

        Raises:
            ImportError: datasets is not installed.
            ValueError: There is no such dataset or split, or nobody knows how many records there are.
        """
        try:
            builder = _datasets().load_dataset_builder(self.name, self.subset)
            known = {name: split.num_examples for name, split in (builder.info.splits or {}).items()}
        except (OSError, ValueError) as error:
            raise ValueError(f"DATA: there is no dataset {self.name}: {error}") from error
        if known and self.split not in known:
            raise ValueError(f"--split: {self.name} has {', '.join(sorted(known))}, got {self.split!r}")
        records = known.get(self.split) or limit
        if records is None:
            raise ValueError(f"--limit: nobody knows how many records {self.name} has; say how many to read")
        name = ":".join(part for part in (self.name, self.subset, self.split) if part)
        starts = tuple((first, first) for first in range(0, records, every))
        return Source(name, self, 0, str(builder.hash), starts, records)

    def read(self, source: Source, first: int, count: int, field: str) -> Iterator[Record]:
        """Some of its records."""
        stream = _datasets().load_dataset(self.name, self.subset, split=self.split, streaming=True)
        for line, row in enumerate(stream.skip(first).take(count), first + 1):
            if field in row:
                yield of_field(source.name, line, row[field], field)
            else:
                yield Record(source.name, line, unreadable=f"no field {field!r}; there are {sorted(row)[:8]}")


def is_hub_dataset(given: str) -> bool:
    """Whether it can only be the id of a dataset."""
    return not Path(given).exists() and NAME.fullmatch(given) is not None and not Path(given).suffix


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("datasets of the hub need datasets: pip install 'llama_attn[corpus]'") from error
    return datasets
