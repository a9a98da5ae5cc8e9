"""What statistics cost per generated token behind a cache of 1,000 tokens."""

from __future__ import annotations

import pytest
import torch
from check import shrunk
from models import ours, stock
from timing import Case, alternate
from workloads import decoding

pytestmark = pytest.mark.benchmark(group="decode")

CACHED, NEW = shrunk(1000), 20
# Backend, whether it measures, and the most it may take of the time of stock sdpa.
CASES = [("streaming", True, 1.03), ("streaming_torch", True, None), ("sdpa", True, None), ("sdpa", False, None)]


def test_forward_per_token(benchmark, model, text):
    """One token at a time, in many turns: what is looked for is less than they differ by."""
    baseline, cases = decoding(model, text(CACHED + 1), CASES)
    alternate(benchmark, baseline, cases, shape=f"SmolLM2, float32, one token behind {CACHED:,}", rounds=201)


@torch.no_grad()
def test_generate(benchmark, model, text):
    """`generate` as a whole, the prompt included: one container of statistics for all of it."""
    prompt = {"input_ids": text(CACHED), "attention_mask": torch.ones_like(text(CACHED))}
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    plain, streaming = stock(model), ours(model, "streaming")
    expected = plain.generate(**prompt, **settings)

    def generate():
        return streaming.generate(**prompt, **settings, output_attention_stats=True, return_dict_in_generate=True)

    output = generate()
    assert torch.equal(output.sequences, expected)
    stats = output.attention_stats
    assert stats["entropy"].shape[-1] == CACHED + NEW - 1
    alternate(
        benchmark,
        Case("stock sdpa, no statistics", lambda: plain.generate(**prompt, **settings)),
        [Case(f"streaming ({stats.engine}), statistics", generate)],
        shape=f"SmolLM2, float32, generating {NEW} tokens after {CACHED:,}, prompt included",
    )
