"""Attention calls of every kind, and who sees whom in them written out pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from llama_attn import AttentionStatsConfig
from llama_attn.stats.block import Wanted
from llama_attn.stats.counts import Counts
from llama_attn.stats.labelling import mark_padding
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import wanted_statistics
from llama_attn.stats.visibility import Visibility

CPU = torch.device("cpu")
SPANS = ("none", "window", "chunk", "both sides", "random")
NOT_A_TOKEN = 10**6
# What rounding may do, by the error budget.
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
KINDS = {
    "window": {"spans": "window"},
    "window over padding": {"spans": "window", "padding": True},
    "window of one": {"spans": "window", "width": 1},
    "window wider than the row": {"spans": "window", "width": 100},
    "window, the cache has dropped keys": {"spans": "window", "before": 4, "offset": 31, "padding": True},
    "window, one step of decoding": {"spans": "window", "queries": 1, "before": 4, "offset": 18},
    "window in a static cache": {"spans": "window", "before": 4, "after": 6},
    "window over documents": {"spans": "window", "packed": True},
    "every third query of a window": {"spans": "window", "stride": 3, "offset": 4, "before": 3},
    "chunks": {"spans": "chunk"},
    "chunks, the cache has dropped keys": {"spans": "chunk", "before": 7, "offset": 9},
    "chunks both ways": {"spans": "chunk", "causal": False},
    "window both ways": {"spans": "both sides", "padding": True},
    "random spans": {"spans": "random", "padding": True, "queries": 40},
    "full, the cache has dropped keys": {"before": 3, "offset": 40, "padding": True},
    "sinks": {"sinks": (-2.0, 3.0)},
    "sinks far above and below": {"sinks": (-300.0, 300.0), "padding": True},
    "sinks in a window": {"spans": "window", "sinks": (-2.0, 3.0), "packed": True},
    "soft-cap": {"softcap": 1.5, "spread": 3.0},
    "soft-cap, bias and sinks": {"softcap": 5.0, "bias": (2, 4), "sinks": (-1.0, 2.0), "padding": True},
    "bias of all heads": {"bias": (1, 1), "causal": False},
    "bias in a window": {"bias": (1, 4), "spans": "both sides"},
    "a mask in a window": {"mask": "bool", "spans": "window", "padding": True},
    "an additive mask and a bias": {"mask": "additive", "bias": (2, 1), "stride": 2},
    "wider values": {"value_channels": 80},
    "narrower values": {"channels": 24, "value_channels": 8, "spans": "window"},
    "head size 576": {"channels": 576, "value_channels": 512, "kv_heads": 1},
    "cross-attention": {"aligned": False, "after": 9, "padding": True},
    "cross-attention to few keys": {"aligned": False, "queries": 40, "after": -35},
    "cross-attention with sinks and a bias": {"aligned": False, "after": 3, "sinks": (-1.0, 1.0), "bias": (1, 4)},
}  # fmt: skip
# Of 140 queries if nothing else is said: several blocks of every engine, rows that see nothing, windows that begin within one.
LARGE = {
    "causal": {},
    "causal, left padding": {"padding": True},
    "window": {"spans": "window", "width": 9},
    "window wider than a block": {"spans": "window", "width": 90},
    "window, the cache has dropped keys": {"spans": "window", "width": 90, "queries": 70, "before": 70, "offset": 99},
    "chunks": {"spans": "chunk", "width": 33, "padding": True},
    "window both ways": {"spans": "both sides", "width": 40},
    "random spans": {"spans": "random", "padding": True},
    "documents": {"packed": True, "spans": "window", "width": 30},
    "every third query": {"spans": "window", "width": 70, "stride": 3},
    "cross-attention": {"aligned": False, "after": 60, "padding": True},
    "cross-attention to few keys": {"aligned": False, "after": -100},
    "a token": {"queries": 1, "before": 400, "padding": True},
    "a token, window": {"queries": 1, "before": 400, "spans": "window", "width": 250},
    "a token, the cache is not full": {"queries": 1, "before": 230, "after": 170},
    "a token of cross-attention": {"queries": 1, "aligned": False, "after": 300, "padding": True},
}
EVERYTHING = {"softcap": 3.0, "sinks": (-1.0, 2.0), "bias": (1, 4), "spread": 1.5}


@dataclass(frozen=True)
class Call:
    """One call of an engine; the rest is what was written out by hand.

    ``sees`` is (batch, query, key) over the measured queries, whose slots are ``slots``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    scoring: Scoring
    config: AttentionStatsConfig
    tokens: torch.Tensor
    token_before: torch.Tensor | None
    sees: torch.Tensor
    real_queries: torch.Tensor
    rank: torch.Tensor
    slots: list[int]

    @property
    def bias(self):
        """What is added to scores: the position bias and the additive mask."""
        mask = self.visibility.mask
        terms = [self.scoring.position_bias, mask if mask is not None and mask.is_floating_point() else None]
        terms = [term for term in terms if term is not None]
        return sum(terms) if terms else None

    @property
    def statistics(self):
        """Everything, but distances only where there are any."""
        chosen = wanted_statistics(self.config, has_tokens=True)
        return [s for s in chosen if not s.is_norm and (self.visibility.aligned or not s.of_distance)]

    def wanted(self, statistics=None) -> Wanted:
        segments = self.config.segments
        return Wanted(
            self.statistics if statistics is None else statistics,
            self.config,
            segments,
            int(segments.max()) + 1,
            self.tokens,
            self.token_before,
            self.config.kept[0],
        )

    def known(self, engine):
        """What is measured of it by an engine."""
        return [statistic for statistic in self.statistics if engine.knows(statistic)]

    def walk(self, engine, statistics=None, **sizes):
        wanted = self.wanted(self.known(engine) if statistics is None else statistics)
        return engine.walk(self.query, self.key, self.value, self.visibility, self.scoring, wanted, **sizes)

    def finished(self, raw, statistics=None):
        """Raw numbers as the recorder finishes them, without a layer axis."""
        values, counts = {}, Counts.of(self.visibility)
        for statistic in statistics or self.statistics:
            value = raw[statistic.name][None]
            if statistic.finish is not None:
                value = statistic.finish(value, counts, self.config)
            values[statistic.name] = mark_padding(statistic, value.clone(), counts)[0]
        return values

    def reference(self, **leaves) -> Reference:
        tensors = {"query": self.query, "key": self.key, "value": self.value, "bias": self.bias}
        return Reference(
            **tensors | {"sinks": self.scoring.sinks} | leaves, scaling=self.scoring.scale, visible=self.sees[:, None],
            real_queries=self.real_queries, rank=self.rank, query_slots=torch.tensor(self.slots),
            config=self.config, bidirectional=not self.visibility.causal, softcap=self.scoring.softcap,
            offset=self.visibility.offset, length=self.visibility.length, segments=self.config.segments,
            tokens=self.tokens, token_before=self.token_before, keep=self.config.kept[0],
        )  # fmt: skip

    def expected(self, statistics=None) -> dict[str, torch.Tensor]:
        """The textbook's numbers, with NaN or −1 where there is no real token."""
        reference, values = self.reference(), {}
        seen = (self.sees & self.real_queries[..., None]).any(1)
        for statistic in statistics or self.statistics:
            value, none = statistic.textbook(reference), torch.nan if statistic.dtype is None else -1
            if "query" in statistic.dims or "key" in statistic.dims:
                of_keys = self.rank < NOT_A_TOKEN if "row" in statistic.dims else seen
                marks = self.real_queries if "query" in statistic.dims else of_keys
                shape = [
                    n if dim in ("batch", "query", "key") else 1
                    for dim, n in zip(statistic.dims[1:], value.shape, strict=True)
                ]
                value = value.masked_fill(~marks.view(shape), none)
            values[statistic.name] = value
        return values

    def written_out(self, query, key, value, bias, sinks):
        """The output as differentiable functions of float64 tensors, (batch, query, head, channel)."""
        group, scoring = query.shape[1] // key.shape[1], self.scoring
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
        scores = query @ key.mT * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if bias is not None:
            scores = scores + bias
        if self.visibility.mask is not None and self.visibility.mask.is_floating_point():
            scores = scores + self.visibility.mask
        visible = self.sees[:, None]
        # Finite, so that a query that sees nothing has no NaN in its gradient.
        scores = scores.masked_fill(~visible, -1e30)
        if sinks is not None:
            scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., : key.shape[2]] * visible
        return (weights @ value).transpose(1, 2)


def make_call(
    *,
    spans="none",
    width=5,
    batch=2,
    heads=4,
    kv_heads=2,
    queries=23,
    before=0,
    after=0,
    offset=0,
    channels=64,
    value_channels=64,
    padding=False,
    packed=False,
    causal=True,
    aligned=True,
    stride=1,
    softcap=None,
    bias=None,
    sinks=None,
    mask=None,
    spread=1.0,
    dtype=torch.float64,
    seed=0,
    **config,
) -> Call:
    """A random call.

    Args:
        spans: One of `SPANS`; "both sides" is a window that looks both ways.
        width: Of the window or chunk [token].
        before: Keys before the first query, from a cache.
        after: Keys behind the last query, of a static cache.
        offset: Keys that the cache has dropped.
        bias: Batch and heads of a position bias.
        sinks: Learned sinks of even and of odd heads.
        mask: "bool" or "additive", besides all else.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = before + queries + after
    causal = causal and aligned and spans != "both sides"

    def draw(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    mask = None if mask is None else _mask(mask, (batch, 1, queries, keys), generator)
    real = torch.rand(batch, keys, generator=generator) < 0.7 if padding else torch.ones(batch, keys, dtype=torch.bool)
    document = (torch.rand(batch, keys, generator=generator) < 0.2).long().cumsum(-1) if packed else None
    # What a cache has dropped may have been padding.
    dropped = integers(offset + 1, batch) if offset and padding else None
    first, stop = (integers(keys + 1, batch, queries).sort(-1).values for _ in range(2))

    def in_span(b, i, j):
        if spans == "window":
            return i - width < j
        if spans == "both sides":
            return abs(i - j) < width
        if spans == "chunk":
            return (offset + i) // width == (offset + j) // width
        if spans == "random":
            return first[b, i - begin] <= j < stop[b, i - begin]
        return True

    begin = before if aligned else 0
    slots = [i for i in range(begin, begin + queries) if (offset + i) % stride == 0]
    sees = torch.tensor(
        [
            [
                [
                    bool(real[b, j] and (not causal or j <= i) and in_span(b, i, j))
                    and (document is None or bool(document[b, i] == document[b, j]))
                    for j in range(keys)
                ]
                for i in slots
            ]
            for b in range(batch)
        ]
    ).view(batch, len(slots), keys)
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > -1e4
        sees &= shown[:, 0, [i - begin for i in slots]]
    real_queries = sees.any(-1) & (real[:, slots] if aligned else torch.tensor(True))
    rank = torch.full((batch, keys), NOT_A_TOKEN)
    for b in range(batch):
        counts = {0 if document is None else int(document[b, 0]): offset if dropped is None else int(dropped[b])}
        for j in range(keys):
            if real[b, j]:
                which = 0 if document is None else int(document[b, j])
                rank[b, j] = counts.get(which, 0)
                counts[which] = counts.get(which, 0) + 1

    positions = torch.arange(begin, begin + queries)
    limits = {
        "none": (None, None),
        "window": ((positions - width + 1)[None], None),
        "both sides": ((positions - width + 1)[None].int(), (positions + width)[None].int()),
        "chunk": (((offset + positions) // width * width - offset)[None], None),
        "random": (first, stop),
    }
    if spans == "chunk" and not causal:
        limits["chunk"] = (limits["chunk"][0], limits["chunk"][0] + width)
    whole = Visibility(
        batch, begin, keys, CPU, causal=causal, real=real if padding else None, sequence=document,
        stop_query=begin + queries if after or not aligned else None, first_key=limits[spans][0],
        stop_key=limits[spans][1], offset=offset, dropped=dropped, aligned=aligned, mask=mask,
    )  # fmt: skip
    scoring = Scoring(
        channels**-0.5, softcap, None if bias is None else draw(bias[0], bias[1], len(slots), keys),
        None if sinks is None else torch.tensor([sinks[h % 2] for h in range(heads)], dtype=torch.float64).to(dtype),
    )  # fmt: skip
    config = {"sink_tokens": 2, "window": 4, "top_k": 3, "map_size": 7} | config
    return Call(
        query=draw(batch, heads, queries, channels)[:, :, [i - begin for i in slots]],
        key=draw(batch, kv_heads, keys, channels),
        value=draw(batch, kv_heads, keys, value_channels),
        visibility=whole.measured(stride=stride),
        scoring=scoring,
        config=AttentionStatsConfig(
            statistics="all",
            segments=integers(3, batch, keys),
            query_stride=stride,
            rows=slice(None),
            keep=integers(2, 1, batch, kv_heads, keys).bool() | (torch.arange(keys) == keys // 2),
            **config,
        ),
        tokens=integers(5, batch, keys),
        token_before=integers(6, batch) - 1 if offset > 1 else None,
        sees=sees,
        real_queries=real_queries,
        rank=rank,
        slots=slots,
    )


def _mask(kind, shape, generator):
    mask = torch.rand(shape, generator=generator) < 0.6
    if kind == "bool":
        return mask
    return torch.randn(shape, generator=generator, dtype=torch.float64).masked_fill(~mask, -1e9)


@st.composite
def calls(draw, dtypes=(torch.float64,)):
    """Calls of every kind."""
    aligned = draw(st.sampled_from([True, True, True, False]))
    packed = aligned and draw(st.booleans())
    cached = aligned and not packed
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (8, 1)]))
    batch = draw(st.integers(1, 3))
    stride = draw(st.sampled_from([1, 1, 3])) if aligned else 1
    return make_call(
        spans=draw(st.sampled_from(SPANS)), width=draw(st.integers(1, 30)), batch=batch, heads=heads,
        kv_heads=kv_heads, queries=draw(st.integers(stride, 40)), before=draw(st.integers(0, 20)) if cached else 0,
        after=draw(st.integers(0, 9)), offset=draw(st.integers(0, 40)) if cached else 0,
        channels=draw(st.sampled_from([8, 24])), value_channels=draw(st.sampled_from([8, 12])),
        padding=draw(st.booleans()), packed=packed, causal=draw(st.booleans()), aligned=aligned,
        stride=stride, softcap=draw(st.sampled_from([None, 0.5, 20.0])),
        bias=draw(st.sampled_from([None, (1, 1), (1, heads), (batch, 1), (batch, heads)])),
        sinks=draw(st.sampled_from([None, None, (-3.0, 3.0), (-400.0, 400.0)])),
        mask=draw(st.sampled_from([None, None, None, "bool", "additive"])),
        spread=draw(st.sampled_from([0.1, 1.0, 4.0])), dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**32 - 1)), sink_tokens=draw(st.integers(1, 5)), window=draw(st.integers(1, 50)),
        top_k=draw(st.integers(1, 12)), map_size=draw(st.integers(1, 70)),
    )  # fmt: skip
