"""What measuring a corpus costs beside reading it: time per token, and memory that must not grow with the texts."""

from __future__ import annotations

import pytest
import torch
from check import shrunk
from memory import many_texts
from models import ours, stock
from timing import Case, alternate, keep

from llama_attn import AttentionStatsConfig
from llama_attn.corpus.batches import Reader, padded
from llama_attn.corpus.examples import Text

pytestmark = pytest.mark.benchmark(group="corpus")

# Texts after which the peak is noted, and all of them: of the full number, `corpus_process.py FOLDER 200 2000` tells.
SOME, ALL = shrunk(100), shrunk(300)
# MiB that the others may add.
MOST_ADDED = 50


@torch.no_grad()
def test_tokens_per_second(benchmark, model, text):
    """Batches of texts of 512 tokens and a few shorter ones, default statistics, examples, roles and all."""
    most = shrunk(512)
    long = text(16 * most)[0]
    ids = [long[row * most : (row + 1) * most - shrunk(8) * row] for row in range(16)]
    texts = [Text("texts", line, hash(tuple(row.tolist())), tuple(row.tolist())) for line, row in enumerate(ids)]
    plain = stock(model)
    reader = Reader(ours(model, "streaming"), None, AttentionStatsConfig(offload="cpu"), "", 512, 4096, 4)
    batches = list(reader.batches(texts))

    def bare() -> None:
        for batch in batches:
            rows, mask = padded(batch)
            plain(rows, attention_mask=mask, logits_to_keep=1, use_cache=False)

    def measured():
        total = None
        for batch in batches:
            part = reader.measure(batch)
            total = part if total is None else total.merged(part)
        return total

    bare()
    assert measured().texts == len(texts)
    # At least 0.9 of the tokens per second.
    cases = [Case("a corpus, default statistics", measured, 1 / 0.9)]
    alternate(benchmark, Case("stock sdpa, nothing measured", bare), cases, shape="SmolLM2, float32, 16 texts, T 512")


def test_memory(benchmark, tmp_path):
    row = benchmark.pedantic(many_texts, args=(tmp_path, SOME, ALL, MOST_ADDED), rounds=1)
    keep(benchmark, [row])
