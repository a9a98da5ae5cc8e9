"""What `record` costs around transformers' own classes, and what a window saves."""

from __future__ import annotations

import pytest
import torch
from check import shrunk
from models import mistral, ours, stock
from timing import Case, alternate

from llama_attn import record

pytestmark = pytest.mark.benchmark(group="record")


@torch.no_grad()
def test_around_stock(benchmark, model, text):
    """The same forward on sdpa, observed from outside and by our class."""
    length = shrunk(2048)
    ids, plain, mine = text(length), stock(model), ours(model, "sdpa")

    def recorded():
        with record(plain) as recording:
            plain(ids, logits_to_keep=1, use_cache=False)
        return recording.stats

    def observed():
        return mine(ids, logits_to_keep=1, use_cache=False, output_attention_stats=True).attention_stats

    expected, found = observed(), recorded()
    for name in expected.names:
        torch.testing.assert_close(found[name], expected[name])
    cases = [Case("record around stock, sdpa", recorded, 1.03)]
    alternate(benchmark, Case("our class, sdpa, statistics", observed), cases, shape=f"SmolLM2, float32, T {length:,}")


@torch.no_grad()
def test_window(benchmark, device):
    """A window of 1,024: stock sdpa computes all scores and hides most of them."""
    length, window = shrunk(8192), shrunk(1024)
    plain, streaming = mistral(window, "sdpa").to(device), mistral(window, "streaming").to(device)
    streaming.load_state_dict(plain.state_dict(), assign=True)
    ids = torch.randint(1024, (1, length), generator=torch.Generator().manual_seed(0)).to(device)

    def forward(network):
        return network(ids, logits_to_keep=1, use_cache=False).logits

    def recorded():
        with record(streaming) as recording:
            logits = forward(streaming)
        return logits, recording.stats

    logits, stats = recorded()
    torch.testing.assert_close(logits, forward(plain), rtol=1e-3, atol=1e-3)
    assert (stats.visible_keys == torch.arange(1, length + 1).clamp(max=window)).all()
    alternate(
        benchmark,
        Case("stock sdpa, no statistics", lambda: forward(plain)),
        [Case(f"streaming ({stats.engine}), statistics", recorded, 1.0)],
        shape=f"Mistral's proportions, 4 layers, window {window:,}, float32, T {length:,}",
        rounds=3,
    )
