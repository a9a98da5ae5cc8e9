"""Random shapes, masks, packing, caches and parameters, for properties of the engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from oracle import rounding_bound, visible_by_hand

from llama_attn import AttentionStatsConfig
from llama_attn.stats.block import Wanted
from llama_attn.stats.counts import Counts
from llama_attn.stats.labelling import mark_padding
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import wanted_statistics
from llama_attn.stats.visibility import Visibility


@dataclass(frozen=True)
class Case:
    """A call described by padding and documents, or by ``mask`` and what it adds alone; ``rows`` are measured."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    config: AttentionStatsConfig
    tokens: torch.Tensor
    sequences: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def statistics(self):
        return [s for s in wanted_statistics(self.config, has_tokens=True) if not s.is_norm]

    def known(self, engine):
        """What is measured of it by an engine."""
        return [statistic for statistic in self.statistics if engine.knows(statistic)]

    @property
    def bound(self) -> float:
        return rounding_bound(self.query, self.key)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.query.shape[-1] ** -0.5)

    def wanted(self, statistics) -> Wanted:
        segments = self.config.segments
        return Wanted(statistics, self.config, segments, int(segments.max()) + 1, self.tokens, keep=self.config.kept[0])

    def walk(self, engine, statistics=None, **sizes):
        wanted = self.wanted(self.known(engine) if statistics is None else statistics)
        return engine.walk(self.query, self.key, self.value, self.visibility, self.scoring, wanted, **sizes)

    def marked(self, statistic, value):
        """``value`` of one layer, marked where there is no real token."""
        return mark_padding(statistic, value[None].clone(), Counts.of(self.visibility))[0]

    def finished(self, raw, statistics=None):
        """Raw numbers as they are labelled, without a layer axis."""
        values, counts = {}, Counts.of(self.visibility)
        for statistic in statistics or self.statistics:
            value = raw[statistic.name]
            if statistic.finish is not None:
                value = statistic.finish(value[None], counts, self.config)[0]
            values[statistic.name] = self.marked(statistic, value)
        return values

    @property
    def real_queries(self):
        return self.reference().real_queries

    def reference(self) -> Reference:
        # As if every slot had a query, of which those of the measured ones are taken.
        visible, real_queries, rank, _ = visible_by_hand(
            self.visibility.real_keys, self.key.shape[2], self.sequences, self.visibility.causal, self.mask
        )
        slots = self.visibility.query_slots
        real_queries = real_queries[:, slots] if self.rows is None else real_queries[:, slots] & self.rows[:, None]
        return Reference(
            query=self.query, key=self.key, value=self.value, scaling=self.scoring.scale, visible=visible[:, :, slots],
            real_queries=real_queries, rank=rank, query_slots=slots, config=self.config,
            bidirectional=not self.visibility.causal, bias=self.bias, segments=self.config.segments,
            tokens=self.tokens, keep=self.config.kept[0],
        )  # fmt: skip

    def expected(self, statistics=None) -> dict[str, torch.Tensor]:
        """The textbook's numbers, finished like those of an engine, so that padding is marked in the same places."""
        reference, values = self.reference(), {}
        blind = ~reference.visible.any(-1)
        for statistic in statistics or self.statistics:
            value = self.marked(statistic, statistic.textbook(reference))
            if statistic.per_query:
                # Of a mask by head: one head of a real query may see nothing.
                shape = (*blind.shape, *[1] * (value.ndim - 3))
                value = value.masked_fill(blind.view(shape), torch.nan if statistic.dtype is None else -1)
            values[statistic.name] = value
        return values


@st.composite
def cases(draw, dtypes=(torch.float64,), cached=True, causal=None, padded=True):
    batch = draw(st.integers(1, 3))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (1, 4), (1, 8)]))
    queries = draw(st.integers(1, 40))
    # Packed and bidirectional attention do without a cache.
    offset = draw(st.just(0) | st.integers(1, 20)) if cached else 0
    keys, channels = offset + queries, draw(st.sampled_from([8, 24, 32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(dtypes))
    spread = draw(st.sampled_from([0.1, 1.0, 4.0]))

    def normal(heads, length):
        return (torch.randn(batch, heads, length, channels, generator=generator, dtype=torch.float64) * spread).to(
            dtype
        )

    kind = draw(st.sampled_from(["plain", "padded", "packed"] if padded else ["plain", "packed"]))
    real = sequences = None
    if kind == "padded":
        real = torch.ones(batch, keys, dtype=torch.bool)
        for row in range(batch):
            real[row, : draw(st.integers(0, keys))] = False
            real[row, keys - draw(st.integers(0, keys)) :] = False
        real = None if bool(real.all()) else real
    if kind == "packed" and offset == 0:
        starts = torch.rand(batch, keys, generator=generator) < 0.15
        sequences = starts.long().cumsum(-1)
    bidirectional = kind != "packed" and offset == 0 and causal is not True and draw(st.booleans())
    visibility = Visibility(
        batch, offset, keys, torch.device("cpu"), causal=not bidirectional, real=real, sequence=sequences
    )
    config = AttentionStatsConfig(
        statistics="all", sink_tokens=draw(st.integers(1, 5)), window=draw(st.integers(1, 50)),
        top_k=draw(st.integers(1, 12)), map_size=draw(st.integers(1, 70)),
        segments=torch.randint(0, 3, (batch, keys), generator=generator), rows=slice(None),
        keep=torch.rand(1, batch, kv_heads, keys, generator=generator) < torch.arange(keys).eq(0) + 0.5,
    )  # fmt: skip
    tokens = torch.randint(0, draw(st.integers(1, 9)), (batch, keys), generator=generator)
    return Case(
        normal(kv_heads * group, queries), normal(kv_heads, keys), normal(kv_heads, keys), visibility, config, tokens,
        sequences,
    )  # fmt: skip
