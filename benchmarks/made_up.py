"""Statistics that nobody measured, for what is made of statistics."""

from __future__ import annotations

import torch

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.stats.container import VISIBILITY_LABELS, Label
from llama_attn.stats.table import default_statistics, statistics_table

LAYERS, HEADS, KV_HEADS = 30, 9, 3


def made_up(length: int) -> AttentionStats:
    """Statistics of SmolLM2's shape with random numbers, which no compression makes smaller."""
    config = AttentionStatsConfig(
        statistics=(*default_statistics(), "weights_map", "topk_weight", "topk_position"), norms=True
    )
    table = statistics_table()
    names = [*config.statistics, *(name for name, statistic in table.items() if statistic.is_norm)]
    bins = -(-length // config.bin_width(length))
    sizes = {
        "layer": LAYERS, "hidden_layer": LAYERS + 1, "batch": 1, "head": HEADS, "kv_head": KV_HEADS, "query": length,
        "key": length, "query_bin": bins, "key_bin": bins, "rank": config.top_k,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    values, labels = {}, {}
    for name in names:
        shape = [sizes[dim] for dim in table[name].dims]
        labels[name] = Label.of(table[name])
        numbers = torch.randn(shape, generator=generator).exp_()
        if name == "topk_position":
            reach = torch.arange(length)[:, None] + 1
            values[name] = (torch.rand(shape, generator=generator) * reach).int()
        elif name == "hidden_max_channel":
            values[name] = torch.randint(576, shape, generator=generator, dtype=torch.int32)
        elif labels[name].unit == "probability":
            values[name] = numbers / (1 + numbers) / (1 if "bin" in str(labels[name].dims) else 10)
        else:
            values[name] = numbers
    values["weights_map"] = values["weights_map"].tril()
    values["visible_keys"] = torch.arange(1, length + 1, dtype=torch.int32)[None]
    values["visible_queries"] = values["visible_keys"].flip(1)
    words = [f"Ġword{i % 997}" for i in range(length)]
    return AttentionStats(
        values, labels | VISIBILITY_LABELS, config, tuple(range(LAYERS)), tuple(range(HEADS)), LAYERS, 0, [words]
    )  # fmt: skip
