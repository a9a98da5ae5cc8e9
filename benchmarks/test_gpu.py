"""Llama-3-8B's shape with random weights in bfloat16 on a CUDA device: what statistics cost, and how much memory."""

from __future__ import annotations

import pytest
import torch
from check import CHECK, shrunk
from models import llama_3_8b, ours, stock
from results import Row
from timing import Case, alternate, keep

from llama_attn import available_backends

pytestmark = [
    pytest.mark.benchmark(group="gpu"),
    pytest.mark.skipif(not CHECK and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS, FEW_LAYERS = (2, 1) if CHECK else (32, 2)
BACKENDS = [name for name in ("streaming_triton", "streaming_torch", "sdpa") if available_backends()[name] is None]
STOCK = "stock sdpa, no statistics"


def loaded(device, layers):
    """Made where it runs: a model of this size takes minutes to draw on a CPU."""
    with torch.device(device):
        return llama_3_8b(layers).to(torch.bfloat16)


def tokens(device, length):
    """At most 128 in check mode, where kernels are interpreted."""
    length = shrunk(min(length, 4096) if CHECK else length)
    return torch.randint(1024, (1, length), generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture(scope="module")
def network(device):
    return loaded(device, LAYERS)


@pytest.mark.parametrize("length", [2048, 8192])
@torch.no_grad()
def test_forward(benchmark, device, network, length):
    """The whole model; statistics of every backend that runs here."""
    ids, options = tokens(device, length), {"logits_to_keep": 1, "use_cache": False}
    plain, cases = stock(network), []
    expected = plain(ids, **options).logits
    for backend in BACKENDS:
        measuring = ours(network, backend)
        output = measuring(ids, **options, output_attention_stats=True)
        # The layers round to bfloat16 at other places, and the differences add up.
        assert (output.logits - expected).float().norm() <= 0.1 * expected.float().norm()
        engine = output.attention_stats.engine
        cases.append(
            Case(
                f"{backend} ({engine}), statistics", lambda m=measuring: m(ids, **options, output_attention_stats=True)
            )
        )
    shape = f"Llama-3-8B's shape, {LAYERS} layers, bfloat16, T {length:,}"
    alternate(benchmark, Case(STOCK, lambda: plain(ids, **options)), cases, shape=shape, rounds=5)


@pytest.mark.parametrize("length", [32_768, 131_072])
@torch.no_grad()
def test_memory(benchmark, device, length):
    """Most memory that was held at once in a forward, weights included."""
    network = loaded(device, FEW_LAYERS)
    ids, options = tokens(device, length), {"logits_to_keep": 1, "use_cache": False}
    plain = peak(lambda: stock(network)(ids, **options))
    shape, rows = f"Llama-3-8B's shape, {FEW_LAYERS} layers, bfloat16, T {length:,}", []
    for backend in BACKENDS:
        model = ours(network, backend)
        measured = peak(lambda m=model: m(ids, **options, output_attention_stats=True))
        rows.append(Row.over(f"{backend}, statistics", shape, measured, "MiB", STOCK, plain))
    benchmark.pedantic(lambda: stock(network)(ids, **options), rounds=1)
    keep(benchmark, rows)


def peak(call) -> float:
    """MiB on the device; of a rehearsal without one, nothing that would be kept."""
    if not torch.cuda.is_available():
        call()
        return 1.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20
