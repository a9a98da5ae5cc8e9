"""A run of the tiny model and its attention written out in float64, which analysis is checked against."""

from __future__ import annotations

import numpy as np
import torch
from conftest import tiny_model
from oracle import capture, stock_of, visible_by_hand

from llama_attn import AttentionStatsConfig

BOUND = 1e-10


class Written:
    """A run of the tiny model in float64, and its attention written out: weights (layer, batch, head, query, key)."""

    def __init__(self, ids, real=None, config=None, model=None, visibility=None, **inputs):
        model = model or tiny_model(dtype=torch.float64)
        self.config = config or AttentionStatsConfig(statistics="all", norms=True, window=5)
        inputs = {"input_ids": ids, "attention_mask": real, **inputs}
        with torch.no_grad():
            self.stats = model(**inputs, output_attention_stats=self.config).attention_stats
        self.ds = self.stats.to_xarray()
        self.layers, self.last = capture(stock_of(model), **inputs)
        real = torch.ones_like(ids) if real is None else real
        visible, queries, self.rank, _ = visible_by_hand(real.bool(), ids.shape[1], **(visibility or {}))
        self.visible = (visible[:, 0] & queries[:, :, None]).numpy()
        scores = [
            torch.einsum("bhqd,bhkd->bhqk", layer.query, layer.key.repeat_interleave(3, 1)) * layer.scaling
            for layer in self.layers
        ]
        weights = torch.stack(scores).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0).numpy()
        self.weights = weights * self.visible[:, None]
        self.ids = ids.tolist()
        self.batch, self.length = ids.shape

    def queries(self, b, more_than=0):
        """Real queries of a row that see more than some keys."""
        return [i for i in range(self.length) if self.visible[b, i].sum() > more_than]

    def received(self, layer, b, head, key):
        seeing = [i for i in range(self.length) if self.visible[b, i, key]]
        return np.mean([self.weights[layer, b, head, i, key] for i in seeing]) if seeing else np.nan

    def heads(self):
        return [(layer, head) for layer in range(3) for head in range(6)]


def by_chance(expected, queries):
    """What exceeds its expectation so far that Bernstein's inequality gives it one row in 20: by bisection."""
    low, high = expected, expected + 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        over = middle - expected
        rare = queries * np.exp(-(over**2) / 2 / (expected + over / 3)) < 0.05
        low, high = (low, middle) if rare else (middle, high)
    return high


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=BOUND, atol=BOUND)
