"""A run over a corpus: shard by shard, each written when it is done, on any number of processes at once.

A shard is a run of records of one file. Whoever finds it undone and unlocked measures it; its summary appears under its
name once it is complete. The result is the merge of all of them, so that going on after a crash, more processes or
other machines change nothing in it. A lock only saves work: two who measured the same shard would write the same file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from torch import distributed

from llama_attn.corpus.batches import Reader
from llama_attn.corpus.records import Record, Source, read
from llama_attn.corpus.summary import CorpusSummary
from llama_attn.stats.files import complete_file

MANIFEST, SUMMARY, SKIPPED, SHARDS = "run.json", "summary.safetensors", "skipped.jsonl", "shards"
# How often it is looked whether others are done [seconds].
PATIENCE = 0.5
Progress = Callable[[int, int], None]
Decision = TypeVar("Decision")


@dataclass(frozen=True)
class Shard:
    """Some records of one file.

    Args:
        number: Its place among all shards.
        source: The file.
        start: Where they begin, one of its ``starts``.
        records: How many.
    """

    number: int
    source: Source
    start: tuple[int, int]
    records: int


@dataclass(frozen=True)
class Run:
    """What is measured, and where the results go.

    Args:
        folder: Where to.
        reader: How texts are read.
        sources: The files.
        field: Name of the field that holds the text.
        every: Records of a shard.
        limit: Records that are read at most; None for all.
        settings: What else must be equal to go on, such as the dtype.
        group: Processes that share one model and read every text together; None for a model of one's own.
    """

    folder: Path
    reader: Reader
    sources: Sequence[Source]
    field: str
    every: int
    limit: int | None
    settings: dict[str, Any]
    group: distributed.ProcessGroup | None = None

    @property
    def shards(self) -> list[Shard]:
        """All shards."""
        found: list[Shard] = []
        left = self.limit
        for source in self.sources:
            for at, start in enumerate(source.starts):
                records = min(self.every, source.records - at * self.every)
                records = records if left is None else min(records, left)
                left = None if left is None else left - records
                if records:
                    found.append(Shard(len(found), source, start, records))
        return found

    @property
    def manifest(self) -> dict[str, Any]:
        """Everything that must be equal to go on."""
        reader = self.reader
        files = [
            {"name": source.name, "size": source.size, "checksum": source.checksum, "records": source.records}
            for source in self.sources
        ]
        return {
            **self.settings, "weights": reader.weights, "config": reader.config.to_json(), "field": self.field,
            "max_tokens": reader.max_tokens, "examples": reader.examples, "shard_records": self.every,
            "limit": self.limit, "files": files,
        }  # fmt: skip

    def begin(self) -> None:
        """Make the folder, or check that it is of the same run.

        Raises:
            ValueError: It is of another; the message has both values.
            OSError: Nothing can be written there.
        """
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        path, manifest = self.folder / MANIFEST, json.loads(json.dumps(self.manifest))
        if not path.exists():
            with complete_file(path) as unfinished:
                unfinished.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged, so that it cannot be known what the run is of: {error}") from error
        for name in {**known, **manifest}:
            if known.get(name) != manifest.get(name):
                if name == "files" and isinstance(known.get(name), list):
                    changed = _changed(known[name], manifest[name])
                    raise ValueError(f"{self.folder} is of other texts: {changed}; choose another --out")
                was, now = _difference(known.get(name), manifest.get(name))
                raise ValueError(
                    f"{self.folder} is of another run: {name} was {was}, and is now {now}; choose another --out"
                )

    @property
    def complete(self) -> int:
        """How many shards are measured, by whichever process."""
        return sum(1 for _ in (self.folder / SHARDS).glob("*.safetensors"))

    def finished(self) -> CorpusSummary | None:
        """The summary, if the run has ended."""
        try:
            return CorpusSummary.load(self.folder / SUMMARY)
        except (FileNotFoundError, ValueError):
            # Damaged, it is merged again.
            return None

    def measure(self, progress: Progress) -> CorpusSummary | None:
        """Measure what is left, wait for what others measure, and merge; None if no record could be read.

        Args:
            progress: Told how many records and tokens are done.
        """
        shards, told = self.shards, set[int]()
        while True:
            left = self._agreed(self._left(shards, told, progress))
            done = False
            for number in left:
                if self._claim(shards[number], progress):
                    done = True
                    told.add(number)
                    self._left(shards, told, progress)
            if not left:
                merged = self._agreed(self._merge(shards) if self._leads else None)
                if merged is not None:
                    return self.finished() if merged else None
            elif not done:
                time.sleep(PATIENCE)

    def _left(self, shards: Sequence[Shard], told: set[int], progress: Progress) -> list[int]:
        """Shards that nobody has measured yet; tells the progress of those that others have, each of them once."""
        left = [shard.number for shard in shards if not self._is_done(shard)]
        for number in sorted(set(range(len(shards))) - set(left) - told):
            progress(shards[number].records, 0)
            told.add(number)
        return left

    @property
    def _leads(self) -> bool:
        """Whether this process decides and writes."""
        return self.group is None or distributed.get_rank(self.group) == 0

    def _agreed(self, value: Decision) -> Decision:
        """What the process says that leads the group."""
        if self.group is None:
            return value
        said = [value]
        distributed.broadcast_object_list(said, group=self.group, group_src=0)
        return said[0]

    def _path(self, shard: Shard, ending: str) -> Path:
        return self.folder / SHARDS / f"{shard.number:06}.{ending}"

    def _is_done(self, shard: Shard) -> bool:
        return any(self._path(shard, ending).exists() for ending in ("safetensors", "empty"))

    def _claim(self, shard: Shard, progress: Progress) -> bool:
        """Measure a shard, unless somebody else does. A lock goes with the process that holds it, even killed."""
        lock, is_ours = FileLock(self._path(shard, "lock"), timeout=0), False
        if self._leads:
            with suppress(Timeout):
                lock.acquire()
                is_ours = not self._is_done(shard)
        try:
            is_ours = self._agreed(is_ours)
            if is_ours:
                self._measure(shard, progress)
        finally:
            lock.release()
        return is_ours

    def _measure(self, shard: Shard, progress: Progress) -> None:
        records = read(shard.source, shard.start, shard.records, self.field)
        summary, skipped = self.reader.read(records, progress)
        if not self._leads:
            return
        with complete_file(self._path(shard, SKIPPED)) as unfinished:
            unfinished.write_text(as_lines(skipped), encoding="utf-8")
        # Last, since with it the shard is done.
        if summary is None:
            self._path(shard, "empty").touch()
        else:
            summary.save(path := self._path(shard, "safetensors"))
            # What is refused would be taken for damaged, and measured again and again.
            CorpusSummary.load(path)

    def _merge(self, shards: Sequence[Shard]) -> bool | None:
        """Write the merge of all shards; False if there is no text in them, None if one is to be measured again."""
        with FileLock(self.folder / f"{SUMMARY}.lock"):
            summary, damaged = None, False
            for shard in shards:
                path = self._path(shard, "safetensors")
                if not path.exists():
                    continue
                try:
                    part = CorpusSummary.load(path)
                except ValueError:
                    path.unlink()
                    damaged = True
                    continue
                summary = part if summary is None else summary.merged(part)
            if damaged:
                return None
            lost = [
                Record(source.name, 0, unreadable=source.unreadable) for source in self.sources if source.unreadable
            ]
            parts = (self._path(shard, SKIPPED).read_text(encoding="utf-8") for shard in shards)
            skipped = "".join([as_lines(lost), *parts])
            with complete_file(self.folder / SKIPPED) as unfinished:
                unfinished.write_text(skipped, encoding="utf-8")
            if summary is None:
                return False
            summary = replace(summary, skipped=skipped.count("\n")).with_strings(self.reader.tokenizer)
            summary.save(self.folder / SUMMARY)
            return True


def as_lines(skipped: Iterable[Record]) -> str:
    """Records that cannot be read, as JSON lines."""
    entries = ({"file": record.file, "line": record.line, "reason": record.unreadable} for record in skipped)
    return "".join(f"{json.dumps(entry)}\n" for entry in entries)


def _changed(was: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str:
    """What is different in the files, in words: the first of them."""
    before, after = ({file["name"]: file for file in files} for files in (was, now))
    if gone := sorted({*before} - {*after}):
        return f"{gone[0]} was among them, and is not now"
    if new := sorted({*after} - {*before}):
        alone = "what is new can be measured by itself, and llama-attn merge takes both results"
        return f"{new[0]} was not among them, and is now ({alone})"
    name = next((name for name, file in after.items() if file != before[name]), None)
    if name is None:
        return "they are in another order"
    for unit, key in (("bytes", "size"), ("records", "records")):
        if before[name][key] != after[name][key]:
            return f"{name} has {after[name][key]:,} {unit}, and had {before[name][key]:,}"
    return f"{name} has another content than it had"


def _difference(was: Any, now: Any) -> tuple[Any, Any]:
    """Where two values differ: of lists and objects only that part."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                return {name: was.get(name)}, {name: now.get(name)}
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return next(_difference(one, two) for one, two in zip(was, now, strict=True) if one != two)
    return was, now
