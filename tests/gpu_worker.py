"""The torch engine, backends and models on a CUDA device against float64, for ``make gpu``; elsewhere on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from engines import On
from oracle import capture, errors, expected, rounding_bound
from test_engine_scoring import test_every_kind  # noqa: F401

from llama_attn import AttentionStatsConfig, available_backends, record
from llama_attn.engines import torch as torch_engine
from llama_attn.testing import assert_matches_reference

# What transformers asks of flex_attention is deprecated in torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The native engine is the CPU's, and there torch compiles flex_attention for minutes.
LEFT_OUT = ("streaming_native",) if torch.cuda.is_available() else ("streaming_native", "flex_attention")
BACKENDS = [name for name, why in available_backends().items() if why is None and name not in LEFT_OUT]


def dtypes(backend):
    """FlashAttention takes half precision alone."""
    return [torch.bfloat16] if backend.startswith("flash_") else [torch.float32, torch.bfloat16]


CASES = [pytest.param(name, dtype, id=f"{name} {dtype}") for name in BACKENDS for dtype in dtypes(name)]


@pytest.fixture
def engine():
    """Of the tests that every engine passes."""
    return On(torch_engine, DEVICE)


# The tiny heads of these situations are none that the triton engine or FlashAttention know; models below have others.
@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in ("eager", "sdpa", "flex_attention", "streaming")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs(backend, dtype):
    assert_matches_reference(backend, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_model_is_observed(backend, dtype, padded):
    """Statistics of what each layer really saw, in float64; outputs are the same bits as unobserved."""
    model = tiny_model(backend, dtype, hidden_size=256, num_attention_heads=4, head_dim=64).to(DEVICE)
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0 if padded else 1
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if padded else {})
    with torch.no_grad():
        plain = model(**inputs).logits
        with record(model, AttentionStatsConfig()) as recording:
            logits = model(**inputs).logits
        layers, last = capture(model, **inputs)
    assert torch.equal(logits, plain)
    for layer in layers:
        for name in ("query", "key", "value", "hidden", "output_weight"):
            setattr(layer, name, getattr(layer, name).cpu())
    stats = recording.stats
    right = expected(layers, last.cpu(), AttentionStatsConfig(), stats.names, real=mask.cpu().bool())
    bound = max(rounding_bound(layer.query, layer.key) for layer in layers)
    assert max(errors(stats, right).values()) <= bound
