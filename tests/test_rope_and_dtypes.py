"""Every RoPE type, awkward head sizes, and every dtype of model."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from oracle import capture, errors, expected, stock_of

from llama_attn import AttentionStatsConfig

LONG = torch.linspace(1.0, 4.0, 4).tolist()
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": LONG,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 500_000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
EVERYTHING = AttentionStatsConfig(statistics="all", norms=True, map_size=10)


def check(model, ids, bound):
    with torch.no_grad():
        stats = model(ids, output_attention_stats=EVERYTHING).attention_stats
    layers, last = capture(stock_of(model), input_ids=ids)
    wanted = expected(layers, last, EVERYTHING, stats.names, real=torch.ones_like(ids, dtype=torch.bool), tokens=ids)
    found = errors(stats, wanted)
    assert max(found.values()) <= bound, {name: error for name, error in found.items() if error > bound}
    return stats


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("kind", ROPE)
def test_rope_types(kind, backend, ids):
    model = tiny_model(backend, torch.float64, rope_parameters=ROPE[kind], max_position_embeddings=32)
    assert ids.shape[1] > model.config.max_position_embeddings, "beyond the length where dynamic types change"
    check(model, ids, 1e-10)


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("head_dim", [8, 20, 24, 40])
def test_head_sizes(head_dim, backend, ids):
    check(tiny_model(backend, torch.float64, head_dim=head_dim), ids, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype, ids):
    """q and k are exact in float32, so the bound is that of float32; the model's own rounding is in both sides."""
    stats = check(tiny_model("sdpa", dtype), ids, 1e-5)
    assert stats["entropy"].dtype == torch.float32
    model = tiny_model("streaming", dtype)
    with torch.no_grad():
        streaming = model(ids, output_attention_stats=True)
    assert streaming.logits.dtype == dtype
    # Layer 0 sees the same q and k on every backend; later layers inherit the backend's rounding.
    torch.testing.assert_close(streaming.attention_stats["entropy"][0], stats["entropy"][0], rtol=1e-5, atol=1e-5)


def test_autocast(ids):
    """Under autocast the scores of the engine stay float32: its error is not that of bfloat16."""
    for backend in ("sdpa", "streaming"):
        model = tiny_model(backend)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            stats = model(ids, output_attention_stats=EVERYTHING, use_cache=False).attention_stats
            layers, last = capture(stock_of(model), input_ids=ids, use_cache=False)
        real = torch.ones_like(ids, dtype=torch.bool)
        wanted = expected(layers, last, EVERYTHING, stats.names, real=real, tokens=ids)
        found = errors(stats.select(layers=0), {
            name: value[:1] for name, value in wanted.items() if stats.labels[name].dims[0] == "layer"
        })  # fmt: skip
        # value_output_norm reads float32 weights, but values that autocast rounded to bfloat16.
        assert max(found.values()) <= 1e-5, (backend, found)
