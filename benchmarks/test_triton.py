"""One attention layer on the Triton engine against the kernels that PyTorch has for a CUDA device."""

from __future__ import annotations

import pytest
import torch
from check import CHECK, shrunk
from timing import Case, alternate
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_attn import AttentionStatsConfig
from llama_attn.engines import triton as engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import wanted_statistics
from llama_attn.stats.visibility import Visibility

pytestmark = [
    pytest.mark.benchmark(group="triton"),
    pytest.mark.skipif(engine.unavailable() is not None, reason="needs a CUDA device, and Triton"),
]
HEADS, KV_HEADS = (4, 1) if CHECK else (32, 8)
ROUNDS = 20
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
lengths = pytest.mark.parametrize("length", [2048, 8192, 32768])
head_dims = pytest.mark.parametrize("head_dim", engine.HEAD_DIMS)
kernels = pytest.mark.parametrize("kernel", KERNELS)


def layer(device, length, head_dim):
    """Query, key and value of a layer in bfloat16, who sees whom, how scores are made, and the default statistics."""
    tensors = [
        torch.randn(1, heads, length, head_dim, device=device, dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    visibility = Visibility(1, 0, length, tensors[0].device)
    config = AttentionStatsConfig()
    return tensors, visibility, Scoring(head_dim**-0.5), Wanted(wanted_statistics(config, has_tokens=False), config)


def attend(kernel, query, key, value):
    with sdpa_kernel(KERNELS[kernel]):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def attended(kernel, *tensors):
    """The output of a kernel; a device or a torch without it has nothing to compare with."""
    try:
        return attend(kernel, *tensors)
    except RuntimeError as error:
        pytest.skip(f"no {kernel} kernel for this call: {str(error).splitlines()[0]}")


@kernels
@lengths
@head_dims
@torch.no_grad()
def test_forward(benchmark, device, head_dim, length, kernel):
    (query, key, value), visibility, scoring, wanted = layer(device, shrunk(length), head_dim)
    expected = attended(kernel, query, key, value)
    walk = engine.walk(query, key, value, visibility, scoring, wanted)
    torch.testing.assert_close(walk.output.transpose(1, 2), expected, rtol=0.02, atol=0.02)
    total = walk.raw["received"].sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, shrunk(length)), rtol=0.01, atol=0)
    cases = {
        "output alone": (value, visibility, scoring),
        "output and statistics": (value, visibility, scoring, wanted),
        "statistics alone": (None, visibility, scoring, wanted),
    }
    alternate(
        benchmark,
        Case(f"sdpa, {kernel} kernel", lambda: attend(kernel, query, key, value)),
        [Case(f"triton: {what}", lambda a=arguments: engine.walk(query, key, *a)) for what, arguments in cases.items()],
        shape=f"one call, {HEADS} heads of {head_dim}, bfloat16, T {length:,}",
        rounds=ROUNDS,
    )


@kernels
@lengths
@head_dims
def test_backward(benchmark, device, head_dim, length, kernel):
    tensors, visibility, scoring, _ = layer(device, shrunk(length), head_dim)
    walk = engine.walk(*tensors, visibility, scoring)
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    output = attended(kernel, *inputs)
    gradient = torch.randn_like(walk.output)

    def theirs():
        return torch.autograd.grad(output, inputs, gradient.transpose(1, 2), retain_graph=True)

    def measured():
        return engine.backward(gradient, *tensors, walk.output, walk.logsumexp, visibility, scoring)

    for ours, stock in zip(measured()[:3], theirs(), strict=True):
        # Both round to bfloat16, so they may differ by some of it.
        assert (ours - stock).float().norm() <= 0.02 * stock.float().norm()
    alternate(
        benchmark,
        Case(f"sdpa, {kernel} kernel, backward", theirs),
        [Case("triton: backward", measured)],
        shape=f"one call, {HEADS} heads of {head_dim}, bfloat16, T {length:,}",
        rounds=ROUNDS,
    )
