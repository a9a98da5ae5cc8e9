"""A step of datatrove's pipelines, which run on one machine, on Slurm and on Ray."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from llama_attn.corpus.batches import Reader
from llama_attn.corpus.records import Record
from llama_attn.corpus.run import SHARDS, SKIPPED, as_lines
from llama_attn.corpus.summary import CorpusSummary
from llama_attn.corpus.weights import fingerprint
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.files import complete_file

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError("llama_attn.corpus.datatrove needs datatrove: pip install 'llama_attn[datatrove]'") from error

# How datatrove's readers name a document that has no id of its own: its file, and its place in it from 0.
UNNAMED = re.compile(r"(?P<file>.*)/(?P<place>\d+)")


class MeasureAttention(PipelineStep):
    """Measures every document that passes, and passes it on; each task writes the summary of its own.

    `llama-attn merge FOLDER` makes one summary of them.

    Args:
        folder: Where to, a folder that all tasks share.
        load: Gives the module that is run and its tokenizer; called once in each task, so that no model has to be sent.
        config: What is measured; None for the default statistics.
        max_tokens: What longer texts are cut to.
        batch_tokens: Tokens of a batch at most.
        records: Documents that are held at once, so that batches are of similar length.
        examples: Texts that are kept of each head and statistic.

    Examples:
        >>> from datatrove.executor import LocalPipelineExecutor
        >>> from datatrove.pipeline.readers import JsonlReader
        >>> from llama_attn.corpus.datatrove import MeasureAttention
        >>> LocalPipelineExecutor([JsonlReader("texts"), MeasureAttention("out", load)], tasks=8, workers=2).run()
    """

    name, type = "attention statistics", "llama_attn"

    def __init__(
        self,
        folder: str | Path,
        load: Callable[[], tuple[nn.Module, Any]],
        config: AttentionStatsConfig | None = None,
        *,
        max_tokens: int = 512,
        batch_tokens: int = 4096,
        records: int = 64,
        examples: int = 4,
    ) -> None:
        super().__init__()
        self.folder, self.load = Path(folder), load
        self.config = AttentionStatsConfig(offload="cpu") if config is None else config
        self.max_tokens, self.batch_tokens, self.records, self.examples = max_tokens, batch_tokens, records, examples

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Measure the documents of one task."""
        module, tokenizer = self.load()
        reader = Reader(
            module, tokenizer, self.config, fingerprint(module), self.max_tokens, self.batch_tokens, self.examples
        )
        total: CorpusSummary | None = None
        skipped: list[Record] = []
        documents = iter(data)
        while held := list(islice(documents, self.records)):
            with self.track_time(unit="batch"):
                part, lost = reader.read([_record(document) for document in held], self._count)
            skipped += lost
            if part is not None:
                total = part if total is None else total.merged(part)
            yield from held
        shards = self.folder / SHARDS
        shards.mkdir(parents=True, exist_ok=True)
        name = f"task-{rank:05}-of-{world_size:05}"
        with complete_file(shards / f"{name}.{SKIPPED}") as unfinished:
            unfinished.write_text(as_lines(skipped), encoding="utf-8")
        if total is not None:
            total.with_strings(tokenizer).save(shards / f"{name}.safetensors")

    def _count(self, texts: int, tokens: int) -> None:
        self.stat_update("texts", value=texts)
        self.stat_update("tokens", value=tokens, unit="batch")


def _record(document: Any) -> Record:
    """A document, by the file and line that it comes from where its id says so."""
    place = UNNAMED.fullmatch(str(document.id))
    file, line = (place["file"], int(place["place"]) + 1) if place else (str(document.id), 0)
    if not document.text.strip():
        return Record(file, line, unreadable="no text in it")
    return Record(file, line, document.text)
