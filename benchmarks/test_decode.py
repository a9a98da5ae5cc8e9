"""What statistics cost per generated token behind a cache of 1,000 tokens."""

from __future__ import annotations

import pytest
import torch
from check import shrunk
from models import ours, stock
from timing import Case, alternate

pytestmark = pytest.mark.benchmark(group="decode")

CACHED, NEW = shrunk(1000), 20
# Backend, whether it measures, and the most it may take of the time of stock sdpa.
CASES = [("streaming", True, 1.03), ("streaming_torch", True, None), ("sdpa", True, None), ("sdpa", False, None)]


@torch.no_grad()
def test_forward_per_token(benchmark, model, text):
    """One token at a time, each with statistics of its own; turns are short, since a token takes little time."""
    ids = text(CACHED + 1)

    def decoder(network, **arguments):
        """Feeds one token; the cache ends as it began."""
        cache = network(ids[:, :CACHED], use_cache=True, logits_to_keep=1).past_key_values

        def decode():
            output = network(ids[:, CACHED:], past_key_values=cache, **arguments)
            cache.crop(-1)
            return output

        return decode

    baseline = decoder(stock(model))
    expected, cases = baseline().logits, []
    for backend, measures, goal in CASES:
        decode = decoder(ours(model, backend), output_attention_stats=measures)
        output = decode()
        torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-3)
        name = f"{backend}, no statistics"
        if measures:
            stats = output.attention_stats
            assert stats["entropy"].shape[-1] == 1
            assert stats["received"].shape[-1] == CACHED + 1
            name = f"{backend} ({stats.engine}), statistics" if backend == "streaming" else f"{backend}, statistics"
        cases.append(Case(name, decode, goal))
    shape = f"SmolLM2, float32, one token behind {CACHED:,}"
    alternate(benchmark, Case("stock sdpa, no statistics", baseline), cases, shape=shape, rounds=61)


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
