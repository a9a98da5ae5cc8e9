"""Attention of imagined models, written out: who sees whom in each layer, random weights, and their statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import xarray


@dataclass
class Text:
    """One row: which tokens are real, where documents begin, and what is held and measured."""

    real: list[bool]
    documents: list[int]
    first_query: int = 0
    stride: int = 1
    dropped: int = 0

    @property
    def length(self) -> int:
        return len(self.real)

    @property
    def queries(self) -> list[int]:
        begin = -(-self.first_query // self.stride) * self.stride
        return list(range(begin, self.length, self.stride))

    def rank(self, key: int) -> int:
        """How many real tokens of its document come before a key, held or not."""
        return sum(self.real[j] and self.documents[j] == self.documents[key] for j in range(key))


@dataclass
class Rule:
    """Who sees whom in one layer."""

    direction: str = "causal"
    window: int | None = None
    chunk: int | None = None
    images: list[range] = field(default_factory=list)

    def sees(self, text: Text, i: int, j: int) -> bool:
        if not text.real[i] or not text.real[j] or text.documents[i] != text.documents[j]:
            return False
        if self.window is not None and (i - j if self.direction == "causal" else abs(i - j)) >= self.window:
            return False
        if self.chunk is not None and i // self.chunk != j // self.chunk:
            return False
        return j <= i or self.direction != "causal" or any(i in image and j in image for image in self.images)

    def pairs(self, text: Text) -> np.ndarray:
        """(query, key), of those that are measured and held."""
        rows = [[self.sees(text, i, j) for j in range(text.dropped, text.length)] for i in text.queries]
        return np.array(rows, bool).reshape(len(text.queries), text.length - text.dropped)


@dataclass
class Model:
    """A text under one rule per layer with attention: weights (layer, head, query, key) and what is said of them."""

    text: Text
    rules: dict[int, Rule]
    num_layers: int
    heads: int = 3
    sink_tokens: int = 2
    window: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        text = self.text
        self.keys, self.queries = range(text.dropped, text.length), text.queries
        self.layers = list(self.rules)
        (self.direction,) = {rule.direction for rule in self.rules.values()}
        self.masks = np.array([rule.pairs(text) for rule in self.rules.values()])
        scores = np.random.default_rng(self.seed).normal(size=(len(self.layers), self.heads, *self.masks.shape[1:])) * 2
        weights = np.exp(scores) * self.masks[:, None]
        self.weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        self.distance = np.abs(np.array(self.queries)[:, None] - np.array(self.keys))
        self.rank = np.array([text.rank(key) for key in self.keys])

    def dataset(self, **attrs) -> xarray.Dataset:
        """The statistics as ``to_xarray`` labels them, of one row."""
        w, real, seen = self.weights, self.masks.any(-1)[:, None], self.masks.any(-2)[:, None]
        length = self.text.length
        of_query = {
            "entropy": -np.where(w > 0, w * np.log(np.maximum(w, 1e-300)), 0).sum(-1),
            "max_weight": w.max(-1),
            "sink_mass": (w * (self.rank < self.sink_tokens)).sum(-1),
            "local_mass": (w * (self.distance < self.window)).sum(-1),
            "mean_distance": (w * self.distance).sum(-1),
            "previous_token": (w * (np.array(self.queries)[:, None] - 1 == np.array(self.keys))).sum(-1),
        }
        of_query |= {"duplicate_token": of_query["max_weight"] / 3, "induction": of_query["max_weight"] / 4}
        maps = np.zeros((len(self.layers), 1, self.heads, length, length), np.float32)
        maps[:, 0][:, :, self.queries, self.text.dropped :] = w
        maps[:, 0][:, :, np.setdiff1d(range(length), self.queries)] = np.nan
        bins = [
            (w * ((self.distance >= 2**b - 1) & (self.distance < 2 ** (b + 1) - 1))).sum((-2, -1))
            for b in range(length.bit_length())
        ]
        order = np.argsort(-w, axis=-1, kind="stable")[..., :4]
        hidden_layers = [*self.layers, self.num_layers]
        states = np.abs(np.random.default_rng(1).normal(size=(len(hidden_layers), 1, len(self.queries), 40)))
        # Of the first token that is real; padding has no states.
        real_queries = self.masks.any((0, 2))
        states[1:, 0, real_queries.argmax(), 7], states[1:, 0, real_queries.argmax(), 30] = 5000, 4000
        top = np.sort(states, -1)[..., ::-1][..., :4]
        with np.errstate(all="ignore"):
            variables = {
                name: (("layer", "batch", "head", "query"), np.where(real, values, np.nan)[:, None])
                for name, values in of_query.items()
            }
            variables |= {
                "received": (("layer", "batch", "head", "key"), (w.sum(-2) / self.masks.sum(-2)[:, None])[:, None]),
                "received_total": (("layer", "batch", "head", "key"), np.where(seen, w.sum(-2), np.nan)[:, None]),
                "distance_histogram": (
                    ("layer", "batch", "head", "distance_bin"),
                    (np.stack(bins, -1) / self.masks.any(-1).sum(-1)[:, None, None])[:, None],
                ),
                "weights_map": (("layer", "batch", "head", "query_bin", "key_bin"), maps),
                "topk_weight": (
                    ("layer", "batch", "head", "query", "rank"), np.take_along_axis(w, order, -1)[:, None]
                ),
                "topk_position": (
                    ("layer", "batch", "head", "query", "rank"), (order + self.text.dropped)[:, None].astype(np.int32)
                ),
                "key_norm": (("layer", "batch", "kv_head", "key"), np.where(seen, 1.0, np.nan)[:, None]),
                "value_norm": (("layer", "batch", "kv_head", "key"), np.where(seen, 2.0, np.nan)[:, None]),
                "hidden_norm": (("hidden_layer", "batch", "query"), np.sqrt((states**2).sum(-1))),
                "hidden_max": (("hidden_layer", "batch", "query"), states.max(-1)),
                "hidden_max_channel": (("hidden_layer", "batch", "query"), states.argmax(-1).astype(np.int32)),
                "hidden_median": (("hidden_layer", "batch", "query"), np.median(states, -1)),
                "hidden_top": (("hidden_layer", "batch", "query", "rank"), top),
                "hidden_top_channel": (
                    ("hidden_layer", "batch", "query", "rank"), np.argsort(-states, -1)[..., :4].astype(np.int32)
                ),
                "hidden_layer_median": (("hidden_layer", "batch"), np.median(states, (-2, -1))),
            }  # fmt: skip
        counts = {
            "visible_keys": (("layer", "batch", "query"), self.masks.sum(-1)[:, None].astype(np.int32)),
            "visible_queries": (("layer", "batch", "key"), self.masks.sum(-2)[:, None].astype(np.int32)),
        }
        if all(np.array_equal(mask, self.masks[0]) for mask in self.masks):
            counts = {name: (dims[1:], values[0]) for name, (dims, values) in counts.items()}
        variables = {
            name: (*each, {"units": "probability" if name in ("received", "sink_mass", "local_mass") else "?"})
            for name, each in (variables | counts).items()
        }
        tokens = [[f"t{position}" for position in axis] for axis in (self.keys, self.queries)]
        coordinates = {
            "layer": self.layers, "hidden_layer": hidden_layers, "batch": [0], "head": range(self.heads),
            "kv_head": [0], "query": self.queries, "key": self.keys, "query_bin": range(length),
            "key_bin": range(length), "distance_bin": [2**b - 1 for b in range(length.bit_length())], "rank": range(4),
            "key_token": (("batch", "key"), [tokens[0]]), "query_token": (("batch", "query"), [tokens[1]]),
        }  # fmt: skip
        config = {"sink_tokens": self.sink_tokens, "window": self.window, "top_k": 4, "map_size": 64}
        config["query_stride"] = self.text.stride
        about = {"num_layers": self.num_layers, "direction": self.direction, "config": json.dumps(config)}
        return xarray.Dataset(variables, coordinates, about | attrs)
