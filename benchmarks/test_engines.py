"""One attention call by every engine that runs here, and what measuring less saves."""

from __future__ import annotations

import statistics

import pytest
import torch
from check import shrunk
from models import ours
from results import Row
from timing import Case, alternate, keep

from llama_attn import AttentionStatsConfig, available_backends
from llama_attn.engines import ENGINES, get_engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import wanted_statistics
from llama_attn.stats.visibility import Visibility

pytestmark = pytest.mark.benchmark(group="engines")

# Heads, KV heads, channels of a head, tokens.
SHAPES = {"SmolLM2": (9, 3, 64, 4096), "Llama-3-8B": (32, 8, 128, 2048)}


def engines_on(device):
    """Those that run here; the Triton engine has a benchmark of its own."""
    elsewhere = {"triton"} if device == "cpu" else {"triton", "native"}
    reasons = available_backends()
    return [name for name in ENGINES if name not in elsewhere and reasons[f"streaming_{name}"] is None]


@pytest.mark.parametrize("model_name", SHAPES)
@torch.no_grad()
def test_attention(benchmark, device, model_name):
    """Without a model around it: output alone, with the default statistics, and statistics alone."""
    heads, kv_heads, channels, length = SHAPES[model_name]
    length = shrunk(length)
    generator = torch.Generator().manual_seed(0)
    # Laid out as a model does it: the heads of a token side by side.
    query, key, value = (
        torch.randn(1, length, count, channels, generator=generator).to(device).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )
    scoring, config = Scoring(channels**-0.5), AttentionStatsConfig()
    visibility = Visibility(1, 0, length, query.device)
    wanted = Wanted(wanted_statistics(config, has_tokens=False), config)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    expected, cases = attend().transpose(1, 2), []
    for name in engines_on(device):
        engine = get_engine(name)
        walk = engine.walk(query, key, value, visibility, scoring, wanted)
        torch.testing.assert_close(walk.output, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(walk.raw["received"].sum(-1), torch.full((1, heads), float(length)).to(device))
        for what, arguments in {
            "output alone": (value, visibility, scoring),
            "output and statistics": (value, visibility, scoring, wanted),
            "statistics alone": (None, visibility, scoring, wanted),
        }.items():
            cases.append(Case(f"{name}: {what}", lambda e=engine, a=arguments: e.walk(query, key, *a)))
            cases[-1].call()
    shape = f"one call, {model_name}, float32, T {length:,}"
    alternate(benchmark, Case("scaled_dot_product_attention", attend), cases, shape=shape, rounds=7)


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@torch.no_grad()
def test_measuring_less(benchmark, model, text, backend):
    """A part of the queries, layers or heads, against no statistics; beside sdpa also over what all of them cost.

    Inside streaming, everything comes from blocks that exist anyway; a part of the queries or heads is observed beside it.
    """
    length = shrunk(2048)
    ids, network = text(length), ours(model, backend)
    parts = {
        "everything": AttentionStatsConfig(),
        "every 4th query": AttentionStatsConfig(query_stride=4),
        "every 16th query": AttentionStatsConfig(query_stride=16),
    }
    if backend == "sdpa":
        parts["every 3rd layer"] = AttentionStatsConfig(layers=range(0, model.config.num_hidden_layers, 3))
        parts["every 3rd head"] = AttentionStatsConfig(heads=range(0, model.config.num_attention_heads, 3))

    def forward(config):
        return network(ids, logits_to_keep=1, use_cache=False, output_attention_stats=config)

    off = Case(f"{backend}, no statistics", lambda: forward(None))
    cases = [Case(f"{backend}: {name}", lambda c=config: forward(c)) for name, config in parts.items()]
    shape = f"SmolLM2, float32, T {length:,}"
    for case in (off, *cases):
        case.call()
    rows, seconds = alternate(benchmark, off, cases, shape=shape)
    if backend == "sdpa":
        everything, *others = cases
        extra = {
            case.name: statistics.median(
                each - none for each, none in zip(seconds[case.name], seconds[off.name], strict=True)
            )
            for case in cases
        }
        rows += [
            Row.over(
                f"{case.name}, beyond none",
                shape,
                extra[case.name],
                "s",
                "everything, beyond none",
                extra[everything.name],
            )
            for case in others
        ]
        keep(benchmark, rows)
