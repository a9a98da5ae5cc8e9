"""Forward of every backend that runs here, statistics off and on."""

from __future__ import annotations

import pytest
import torch

from llama_attn import available_backends

BACKENDS = [name for name, reason in available_backends().items() if reason is None]


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("statistics", [False, True], ids=["off", "on"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward(benchmark, model, text, backend, statistics, length):
    ids = text(length)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(ids, logits_to_keep=1, use_cache=False).logits
        model.set_attn_implementation(backend)

        def forward():
            return model(ids, logits_to_keep=1, use_cache=False, output_attention_stats=statistics)

        output = forward()
        torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-3)
        if statistics:
            total = output.attention_stats["received"] * output.attention_stats.visible_queries
            torch.testing.assert_close(total.sum(-1), torch.full_like(total[..., 0], length), rtol=1e-4, atol=0)
        benchmark.group = f"forward, T = {length}"
        benchmark.extra_info.update(backend=backend, statistics=statistics, length=length, torch=torch.__version__)
        benchmark.pedantic(forward, rounds=3, warmup_rounds=0)
