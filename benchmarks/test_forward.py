"""What statistics cost in a whole forward: ours against transformers' own class on sdpa, which measures nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from check import once, shrunk
from models import llama_3_8b, stock
from timing import alternate
from workloads import COMPARED, forwards

from llama_attn import available_backends

pytestmark = pytest.mark.benchmark(group="forward")

# Backend, whether it measures, and the most it may take of the time of stock sdpa.
SHAPES = {
    # The same operations as stock, so that only many short turns could show a difference.
    (512, "float32"): [("sdpa", False, 1.03)],
    (2048, "float32"): [("streaming", True, 1.05)],
    (4096, "float32"): [("streaming", True, 1.05), ("streaming_torch", True, 1.45), ("sdpa", True, 1.30)],
    (8192, "float32"): [("streaming", True, 1.10)],
    (4096, "bfloat16"): [("streaming", True, 1.05)],
}
SHAPE_8B = [("streaming", True, 1.02), ("streaming_torch", True, 1.08), ("sdpa", True, 1.05)]


def with_gpu(cases, device, dtype):
    """The cases, and on a GPU those that run nowhere else."""
    if device != "cuda" or dtype == "float32":
        return cases
    extra = [name for name in ("streaming_triton", "flash_attention_2") if available_backends()[name] is None]
    return [*cases, *((name, True, None) for name in extra)]


def compare_forwards(benchmark, model, ids, cases, shape, truth=None):
    """Time all cases in turns with stock, once they are checked."""
    baseline, timed = forwards(model, ids, cases, truth)
    alternate(benchmark, baseline, timed, shape=shape, rounds=31 if ids.shape[1] < 1000 else 5)


@pytest.mark.parametrize(("length", "dtype"), SHAPES)
def test_smollm2(benchmark, model, text, device, length, dtype):
    ids, truth = text(shrunk(length)), None
    if dtype != "float32":
        with torch.no_grad():
            truth = stock(model)(ids, logits_to_keep=COMPARED, use_cache=False).logits
        model = copy.deepcopy(model).to(getattr(torch, dtype))
    cases = with_gpu(SHAPES[length, dtype], device, dtype)
    compare_forwards(benchmark, model, ids, cases, f"SmolLM2, {dtype}, T {length:,}", truth)


def test_llama_3_8b_shape(benchmark, device):
    """Two layers with random weights."""
    length, model = shrunk(2048), llama_3_8b(num_layers=once(2)).to(device)
    ids = torch.randint(1024, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    compare_forwards(benchmark, model, ids, SHAPE_8B, f"Llama-3-8B, two layers, float32, T {length:,}")
