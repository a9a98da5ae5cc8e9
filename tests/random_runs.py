"""Runs of models that never were: who sees whom by a rule, weights by chance, tokens and names of any kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from hypothesis import strategies as st
from imagined import Rule, Text
from test_viz import TOKENS

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.stats.labels import VISIBILITY_LABELS, Label
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import Statistic, statistics_table

WORDS = [*TOKENS, "Ġparrot\n", "\t", "$\\frac{x$", "None", "nan", "a-b - c", "\u2028", "Ġthe", "日本", "}{", "%", "#"]
MODELS = ["", "org/a-model", "$x$_^{", "/home/me/a model/", "long-name" * 9, "two\nlines"]
PARTS = ["system", "$\\frac{", "a\nb", "🦜" * 40, "tools"]
CHANNELS, HIDDEN, NOT_A_TOKEN = 8, 20, 10**6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """Statistics, and who sees whom in them.

    Args:
        stats: All of the table, in float64.
        pairs: (layer, batch, query, key).
    """

    stats: AttentionStats = field(repr=False)
    pairs: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Shape:
    """What two runs that are compared have in common.

    Args:
        texts: Every row: padding, documents.
        rules: Who sees whom in every measured layer.
        num_heads: Heads and KV heads of the model.
        rows: Positions of the queries whose weights are held one by one.
        config: Of the statistics.
        about: What `AttentionStats` is told besides.
    """

    texts: list[Text]
    rules: list[Rule]
    num_heads: tuple[int, int]
    rows: tuple[int, ...]
    config: AttentionStatsConfig = field(repr=False)
    about: dict = field(repr=False)

    @property
    def length(self) -> int:
        return self.texts[0].length

    @cached_property
    def pairs(self) -> np.ndarray:
        return np.array([[rule.pairs(text) for text in self.texts] for rule in self.rules])

    @cached_property
    def real(self) -> torch.Tensor:
        return torch.tensor([text.real for text in self.texts])

    def run(self, seed: int, *, broken: str = "nothing", spread: float = 1.0, size: float = 1.0) -> Run:
        """The textbook's numbers of queries, keys and states by chance.

        Args:
            seed: Of all of them.
            broken: Of what no number is finite: "nothing", a "layer", a "head", or "some" numbers anywhere.
            spread: Of scores [logit].
            size: Of states and values [activation].
        """
        generator = torch.Generator().manual_seed(seed)
        # The residual stream has one more layer, the output.
        layers = [self._layer(seen, generator, spread, size) for seen in (*self.pairs, self.pairs[-1])]
        table = [each for each in statistics_table().values() if each.needs != "keep"]
        values = {statistic.name: self._values(statistic, layers) for statistic in table}
        labels = {statistic.name: Label.of(statistic) for statistic in table}
        for name, value in values.items():
            if value.is_floating_point():
                _break(value, labels[name].dims, broken, generator)
        same = all(np.array_equal(pairs, self.pairs[0]) for pairs in self.pairs)
        for (name, label), axis in zip(VISIBILITY_LABELS.items(), (-1, -2), strict=True):
            counts = torch.from_numpy(self.pairs.sum(axis)).int()
            values[name] = counts[0] if same else counts
            labels[name] = label if same else Label(("layer", *label.dims), label.unit, label.meaning, label.source)
        segments, names = self.config.segments_of((len(self.texts), self.length), CPU)
        values["key_segment"] = segments.int()
        labels["key_segment"] = Label(("batch", "key"), "segment", "", "")
        stats = AttentionStats(
            values, labels, self.config, first_query=0, segments=names, rows=self.rows, num_heads=self.num_heads[0],
            num_kv_heads=self.num_heads[1], **self.about,
        )  # fmt: skip
        return Run(stats, self.pairs)

    def _layer(self, seen: np.ndarray, generator: torch.Generator, spread: float, size: float) -> Reference:
        batch, length, (heads, kv_heads) = len(self.texts), self.length, self.num_heads

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden = draw(batch, length, HIDDEN) * size
        # Some of some tokens are massive.
        hidden[torch.rand(hidden.shape, generator=generator) < 0.01] *= 1e5
        rank = [[text.rank(key) if text.real[key] else NOT_A_TOKEN for key in range(length)] for text in self.texts]
        return Reference(
            query=draw(batch, heads, length, CHANNELS) * spread, key=draw(batch, kv_heads, length, CHANNELS),
            value=draw(batch, kv_heads, length, CHANNELS) * size, scaling=CHANNELS**-0.5,
            visible=torch.from_numpy(seen)[:, None], real_queries=torch.from_numpy(seen.any(-1)), rank=torch.tensor(rank),
            query_slots=torch.arange(length), config=self.config, bidirectional=self.about["direction"] != "causal",
            segments=self.config.segments_of((batch, length), CPU)[0], hidden=hidden,
            tokens=torch.randint(0, 5, (batch, length), generator=generator),
            output_weight=draw(HIDDEN, heads * CHANNELS),
        )  # fmt: skip

    def _values(self, statistic: Statistic, layers: list[Reference]) -> torch.Tensor:
        """The numbers of all layers, NaN or −1 where there is no real token."""
        dims = statistic.dims
        layers = layers if dims[0] == "hidden_layer" else layers[:-1]
        # The textbook has no segments of which there is no token.
        textbook = self._segment_mass if statistic.name == "segment_mass" else statistic.textbook
        values = torch.stack([textbook(each) for each in layers])
        if "head" in dims:
            values = values[:, :, list(self.about["heads"])]
        if "row" in dims:
            values = values[:, :, :, list(self.rows)]
        none = torch.nan if statistic.dtype is None else -1
        for axis in {"query", "row", "key"} & {*dims}:
            real = self.real[:, list(self.rows)] if axis == "row" else self.real
            real = real.expand(len(values), *real.shape)
            if dims[-1] == "key" and "row" not in dims and not statistic.is_norm:
                # What nobody looks at has received nothing.
                real = torch.from_numpy(self.pairs.any(-2))
            sizes = [
                size if dim in (dims[0], "batch", axis) else 1 for dim, size in zip(dims, values.shape, strict=True)
            ]
            values = values.masked_fill(~real.view(sizes), none)
        return values.to(statistic.dtype or torch.float64)

    def _segment_mass(self, layer: Reference) -> torch.Tensor:
        belongs = torch.nn.functional.one_hot(layer.segments + 1, 1 + len(self.config.numbered_segments[1]))
        return layer.weights @ belongs[:, None, :, 1:].double()


def _break(values: torch.Tensor, dims: tuple[str, ...], broken: str, generator: torch.Generator) -> None:
    if broken == "layer":
        values[0] = torch.nan
    elif broken == "head" and "head" in dims:
        values[:, :, 0] = torch.nan
    elif broken == "some" and (tokens := {"query", "key", "row", "query_bin"} & {*dims}):
        # Of a token, all.
        until = 1 + max(map(dims.index, tokens - ({"key"} if "row" in dims else set())))
        values[torch.rand(values.shape[:until], generator=generator) < 0.1] = torch.nan


@st.composite
def texts(draw, length: int, documents: list[int]) -> Text:
    """A row: whole, padded on some side, with holes, or nothing but padding."""
    kind = draw(st.sampled_from(["whole", "whole", "left", "right", "both", "holes", "nothing"]))
    start = draw(st.integers(0, length - 1)) if kind in ("left", "both") else 0
    stop = draw(st.integers(start + 1, length)) if kind in ("right", "both") else length
    real = [kind != "nothing" and start <= place < stop for place in range(length)]
    if kind == "holes":
        real = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return Text(real, documents)


@st.composite
def shapes(draw) -> Shape:
    length = draw(st.sampled_from([1, 2, 3, 5, 9, 14, 66]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    documents = (
        np.cumsum(rng.random(length) < 0.2).tolist() if draw(st.sampled_from([False, False, True])) else [0] * length
    )
    rows = draw(st.lists(texts(length, documents), min_size=1, max_size=3))
    direction = draw(st.sampled_from(["causal", "causal", "bidirectional"]))
    widths = st.sampled_from([None, None, 1, 3, 8])
    num_layers = draw(st.integers(1, 5))
    layers = draw(st.permutations(range(num_layers)))[: draw(st.integers(1, min(3, num_layers)))]
    if draw(st.booleans()):
        rules = [Rule(direction, window=draw(widths))] * len(layers)
    else:
        rules = [Rule(direction, window=draw(widths)) for _ in layers]
    num_heads = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
    heads = draw(st.permutations(range(num_heads[0])))[: draw(st.integers(1, num_heads[0]))]
    names = tuple(draw(st.permutations(PARTS)))[: draw(st.integers(1, 4))]
    new = draw(st.integers(0, length - 1))
    # From left to right, some tokens of none, as chats are; what was generated comes last.
    labels = [sorted(rng.integers(-1, len(names), length - new).tolist()) + [len(names)] * new for _ in rows]
    segments = torch.tensor(labels).masked_fill(~torch.tensor([text.real for text in rows]), -1)
    config = AttentionStatsConfig(
        statistics="all", norms=True, sink_tokens=draw(st.integers(1, 3)), window=draw(st.sampled_from([2, 64])),
        top_k=3, map_size=128, segments=(segments, (*names, "generated")), rows=slice(None),
    )  # fmt: skip
    held = draw(st.sampled_from([range(length), range(length - 1 - new, length), [length - 1]]))
    tokens = [rng.choice(np.array(WORDS, dtype=object), length).tolist() for _ in rows]
    about = {
        "layers": tuple(layers), "heads": tuple(heads), "num_layers": num_layers, "direction": direction,
        "model": draw(st.sampled_from(MODELS)), "tokens": draw(st.sampled_from([tokens, tokens, None])),
        "without_attention": tuple(sorted({*range(num_layers)} - {*layers})[: draw(st.integers(0, 1))]),
    }  # fmt: skip
    return Shape(rows, rules, num_heads, tuple(held), config, about)


NUMBERS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "broken": st.sampled_from(["nothing", "nothing", "layer", "head", "some"]),
        "spread": st.sampled_from([0.0, 1.0, 30.0]),
        "size": st.sampled_from([1.0, 1e-4, 1e6]),
    }
)
