"""One attention layer on the Triton engine against PyTorch's, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from timing import Case, alternate

from llama_attn import AttentionStatsConfig
from llama_attn.engines import triton as engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import wanted_statistics
from llama_attn.stats.visibility import Visibility

pytestmark = [
    pytest.mark.benchmark(group="triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, KV_HEADS, ROUNDS = 32, 8, 20


def layer(device, length, head_dim):
    """Query, key and value of a layer in bfloat16, who sees whom, how scores are made, and the default statistics."""
    tensors = [
        torch.randn(1, heads, length, head_dim, device=device, dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    visibility = Visibility(1, 0, length, tensors[0].device)
    config = AttentionStatsConfig()
    return tensors, visibility, Scoring(head_dim**-0.5), Wanted(wanted_statistics(config, has_tokens=False), config)


def attend(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("length", [2048, 8192, 32768])
@pytest.mark.parametrize("head_dim", engine.HEAD_DIMS)
@torch.no_grad()
def test_forward(benchmark, device, head_dim, length):
    (query, key, value), visibility, scoring, wanted = layer(device, length, head_dim)
    walk = engine.walk(query, key, value, visibility, scoring, wanted)
    torch.testing.assert_close(walk.output.transpose(1, 2), attend(query, key, value), rtol=0.02, atol=0.02)
    total = walk.raw["received"].sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, length), rtol=0.01, atol=0)
    cases = {
        "output alone": (value, visibility, scoring),
        "output and statistics": (value, visibility, scoring, wanted),
        "statistics alone": (None, visibility, scoring, wanted),
    }
    alternate(
        benchmark,
        Case("scaled_dot_product_attention", lambda: attend(query, key, value)),
        [Case(f"triton: {what}", lambda a=arguments: engine.walk(query, key, *a)) for what, arguments in cases.items()],
        shape=f"one call, {HEADS} heads of {head_dim}, bfloat16, T {length:,}",
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("length", [2048, 8192, 32768])
@pytest.mark.parametrize("head_dim", engine.HEAD_DIMS)
def test_backward(benchmark, device, head_dim, length):
    tensors, visibility, scoring, _ = layer(device, length, head_dim)
    walk = engine.walk(*tensors, visibility, scoring)
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    attended = attend(*inputs)
    gradient = torch.randn_like(walk.output)

    def theirs():
        return torch.autograd.grad(attended, inputs, gradient.transpose(1, 2), retain_graph=True)

    def measured():
        return engine.backward(gradient, *tensors, walk.output, walk.logsumexp, visibility, scoring)

    for ours, stock in zip(measured()[:3], theirs(), strict=True):
        # Both round to bfloat16, so they may differ by some of it.
        assert (ours - stock).float().norm() <= 0.02 * stock.float().norm()
    alternate(
        benchmark,
        Case("scaled_dot_product_attention, backward", theirs),
        [Case("triton: backward", measured)],
        shape=f"one call, {HEADS} heads of {head_dim}, bfloat16, T {length:,}",
        rounds=ROUNDS,
    )
