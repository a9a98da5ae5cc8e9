"""What a run shows, worked out from attention weights and states in float64, and the reading of sentences about it."""

from __future__ import annotations

import re

import numpy as np
from written_out import by_chance

ROLES = {"first_token_sink": 0.3, "sink": 0.3, "previous_token": 0.3, "duplicate_token": 0.3, "induction": 0.3,
         "local": 0.5, "uniform": 0.9, "streaming": 0.9}  # fmt: skip
# Distances below this are local where nothing else is asked for.
WINDOW = 64
NUMBER = r"(\d[\d,]*(?:\.\d+)?%?)"


def says(text, template, *values):
    """Check that a text begins as the template says, with each {} a number as near as its digits tell; the rest of it."""
    pattern = "".join(NUMBER if part == "{}" else re.escape(part) for part in re.split(r"(\{\})", template))
    found = re.match(pattern, text)
    assert found, f"expected {template!r}, got {text[:200]!r}"
    for shown, value in zip(found.groups(), values, strict=True):
        digits = shown.rstrip("%").replace(",", "")
        unit = 10.0 ** -len(digits.partition(".")[2]) * (0.01 if "%" in shown else 1)
        number = float(digits) * (0.01 if "%" in shown else 1)
        assert abs(number - value) <= 0.5 * unit + 1e-5 * (1 + abs(value)), (template, shown, value)
    return text[found.end() :]


class Truth:
    """One row of a run: weights (layer, head, query, key) of its real queries, and who sees whom (query, key).

    Args:
        weights: Attention weights of the measured layers and heads, in float64.
        visible: Which keys each measured query sees; one that sees none is padding.
        positions: Position of each measured query.
        ids: Token of each position.
        layers: Number of each layer.
        heads: Number of each head.
        states: Magnitudes of the residual stream that enters each of these layers, and leaves the last layer of the
            model, at the measured queries.
    """

    def __init__(self, weights, visible, positions, ids, layers, heads, states, num_layers=30):
        real = visible.any(1)
        self.weights, self.visible, self.positions = weights[:, :, real], visible[real], positions[real]
        # Of what lies between a layer and the output of a later one nothing is known.
        states = states if num_layers - 1 in layers else states[:-1]
        self.states = [state[real] for state in states]
        self.ids, self.layers, self.heads, self.num_layers = ids, layers, heads, num_layers
        self.first = int(np.flatnonzero(visible.any(0))[0])
        self.count = self.visible.sum(1)
        self.several = self.count > 1
        self.uniform = self.visible / self.count[:, None]
        self.distance = self.positions[:, None] - np.arange(visible.shape[1])
        # Of keys.
        self.seen = self.visible.sum(0)
        self.total = self.weights.sum(2)
        self.share = self.total / len(self.positions)
        with np.errstate(invalid="ignore"):
            self.alpha = self.total / self.seen
            self.boost = self.total / self.uniform.sum(0)
        queries = len(self.positions)
        self.needed = min(int(np.ceil(by_chance(1, queries) / 0.3)), queries)
        by_uniform = [by_chance(max(1.0, u), queries) for u in self.uniform.sum(0)]
        self.named = ((self.total.mean(1) > by_uniform) & (self.seen >= self.needed)).any(0)

    def mean(self, per_query, rows=None):
        """Mean over queries, (layer, head)."""
        return per_query[..., self.several if rows is None else rows].mean(-1)

    def entropy(self):
        return -(self.weights * np.log(np.where(self.weights > 0, self.weights, 1))).sum(-1)

    def scores(self):
        """The score of every role, (layer, head)."""
        before, keys = np.array([-1, *self.ids[:-1]]), np.arange(len(self.ids))
        before[self.first] = -1
        same = np.array([self.ids[i] for i in self.positions])[:, None]
        far, uniform_far = (self.mean((part * self.distance).sum(-1)) for part in (self.weights, self.uniform))
        with np.errstate(divide="ignore", invalid="ignore"):
            flat = self.entropy() / np.log(self.count)
        masks = {
            "sink": self.named[None], "previous_token": self.distance == 1,
            "duplicate_token": (np.array(self.ids) == same) & (keys < self.positions[:, None]), "induction": before == same,
        }  # fmt: skip
        return {
            "first_token_sink": self.mean(self.weights[..., self.first], self.several & self.visible[:, self.first]),
            "local": 1 - far / uniform_far,
            "uniform": self.mean(flat),
            "streaming": self.streaming(),
        } | {role: self.mean((self.weights * mask).sum(-1)) for role, mask in masks.items()}

    def streaming(self):
        """Mean mass on the first token and what is near, (layer, head), of queries that see more; NaN if none does."""
        outside = self.visible & (self.distance >= WINDOW)
        outside[:, self.first] = False
        if not outside.any():
            return np.full((len(self.layers), len(self.heads)), np.nan)
        return 1 - self.mean((self.weights * outside).sum(-1), outside.any(1))

    def roles(self):
        """The role of every head."""
        scores = self.scores()
        roles = []
        for at in np.ndindex(len(self.layers), len(self.heads)):
            strength = {role: scores[role][at] / ROLES[role] for role in ROLES if scores[role][at] > ROLES[role]}
            on_first = scores["first_token_sink"][at] >= scores["sink"][at] / 2
            if "first_token_sink" in strength and on_first:
                strength.pop("sink", None)
                strength["first_token_sink"] = max(scores[role][at] for role in ("first_token_sink", "sink")) / 0.3
            roles.append(max(strength, key=strength.get) if strength else "mixed")
        return roles

    def massive(self, medians):
        """Which channels of the states are massive."""
        return [(state > 100) & (state >= 1000 * median) for state, median in zip(self.states, medians, strict=True)]
