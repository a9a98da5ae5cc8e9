"""Texts in batches of similar length, and what a model shows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llama_attn.corpus.examples import Text
from llama_attn.corpus.reading import summarize
from llama_attn.corpus.records import Record
from llama_attn.observe.options import known_options
from llama_attn.observe.recording import record
from llama_attn.stats.config import AttentionStatsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llama_attn.corpus.summary import CorpusSummary


@dataclass(frozen=True)
class Reader:
    """How texts are read.

    Args:
        module: What is run: a model, or the encoder of one.
        tokenizer: Its tokenizer.
        config: What is measured.
        weights: Hash of the weights.
        max_tokens: What longer texts are cut to.
        batch_tokens: Tokens of a batch at most, padding among them; a longer text is a batch of its own.
        examples: Texts that are kept of each head and statistic.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: AttentionStatsConfig
    weights: str
    max_tokens: int
    batch_tokens: int
    examples: int

    def read(
        self, records: Iterable[Record], progress: Callable[[int, int], None]
    ) -> tuple[CorpusSummary | None, list[Record]]:
        """The summary of some records, None if none of them could be read, and those that could not.

        Args:
            records: As many as are held in memory at once, so that batches are of similar length.
            progress: Told how many records and tokens are done.
        """
        skipped: list[Record] = []
        texts: list[Text] = []
        cut = 0
        for one in records:
            found = one.unreadable or self.tokenize(one)
            if isinstance(found, str):
                skipped.append(replace(one, unreadable=found))
            else:
                texts.append(found[0])
                cut += found[1]
        progress(len(skipped), 0)
        total: CorpusSummary | None = None
        for batch in self.batches(texts):
            part = self.measure(batch)
            total = part if total is None else total.merged(part)
            progress(len(batch), sum(len(text.ids) for text in batch))
        return None if total is None else replace(total, cut=cut, skipped=len(skipped)), skipped

    def tokenize(self, record: Record) -> tuple[Text, bool] | str:
        """The tokens of a record, and whether it was cut; or the reason why there are none."""
        try:
            ids = self._ids(record.text, self.max_tokens + 1)
            # Cut where it is, it ends as the tokenizer ends a text.
            if cut := len(ids) > self.max_tokens:
                ids = self._ids(record.text, self.max_tokens)
        except Exception as error:  # A tokenizer may fail in any way: it is said of the record, and the run goes on.
            return f"the tokenizer fails: {type(error).__name__}: {error}"
        if not ids:
            return "the tokenizer finds no token in it"
        return Text(record.file, record.line, record.digest, tuple(ids)), cut

    def _ids(self, text: str, most: int) -> list[int]:
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=most, verbose=False)["input_ids"]
        return ids

    def measure(self, texts: Sequence[Text]) -> CorpusSummary:
        """The summary of the texts of one batch."""
        ids, mask = padded(texts)
        device = next(self.module.parameters()).device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        options = known_options(self.module, use_cache=False, logits_to_keep=1)
        with torch.no_grad(), record(self.module, self.config) as recording:
            self.module(**inputs, **options)
        return summarize(
            recording.stats, texts, weights=self.weights, max_tokens=self.max_tokens, examples=self.examples
        )

    def batches(self, texts: Sequence[Text]) -> Iterator[list[Text]]:
        """Texts in batches of similar length, the shortest first."""
        batch: list[Text] = []
        for text in sorted(texts, key=lambda text: len(text.ids)):
            if batch and (len(batch) + 1) * len(text.ids) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch


def padded(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, padded on the right; which token stands there does not matter."""
    rows = [torch.tensor(text.ids) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask
