"""Properties of the engine over random shapes, masks, packing, caches, parameters and block sizes.

``HYPOTHESIS_PROFILE=long`` runs 1,700 examples of each, 11,900 in all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, strategies as st
from oracle import rounding_bound, visible_by_hand

from llama_attn import AttentionStatsConfig
from llama_attn.engines import torch as engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.counts import Counts
from llama_attn.stats.labelling import mark_padding
from llama_attn.stats.merge import Group, Measured, Run
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import wanted_statistics
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import relative_error


@dataclass(frozen=True)
class Case:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    config: AttentionStatsConfig
    tokens: torch.Tensor
    sequences: torch.Tensor | None
    block_rows: int

    @property
    def statistics(self):
        return [s for s in wanted_statistics(self.config, has_tokens=True) if not s.is_norm]

    @property
    def bound(self) -> float:
        return rounding_bound(self.query, self.key)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.query.shape[-1] ** -0.5)

    def wanted(self) -> Wanted:
        segments = self.config.segments
        return Wanted(
            self.statistics, self.config, segments, int(segments.max()) + 1, self.tokens, keep=self.config.kept[0]
        )

    def walk(self, **changes):
        case = replace(self, **changes)
        return engine.walk(
            case.query, case.key, case.value, case.visibility, case.scoring, case.wanted(),
            block_rows=case.block_rows,
        )  # fmt: skip

    def marked(self, statistic, value):
        """``value`` of one layer, marked where there is no real token."""
        return mark_padding(statistic, value[None].clone(), Counts.of(self.visibility))[0]

    def finished(self, raw):
        """Raw numbers as they are labelled, without a layer axis."""
        values, counts = {}, Counts.of(self.visibility)
        for statistic in self.statistics:
            value = raw[statistic.name]
            if statistic.finish is not None:
                value = statistic.finish(value[None], counts, self.config)[0]
            values[statistic.name] = self.marked(statistic, value)
        return values

    def reference(self) -> Reference:
        real = self.visibility.real_keys
        visible, real_queries, rank, _ = visible_by_hand(
            real, self.query.shape[2], sequences=self.sequences, causal=self.visibility.causal
        )
        return Reference(
            query=self.query, key=self.key, value=self.value, scaling=self.scoring.scale, visible=visible,
            real_queries=real_queries, rank=rank, query_positions=self.visibility.query_positions, config=self.config,
            bidirectional=not self.visibility.causal, segments=self.config.segments, tokens=self.tokens,
            keep=self.config.kept[0],
        )  # fmt: skip


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
        sequences, draw(st.integers(1, 50)),
    )  # fmt: skip


@given(cases(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)))
def test_the_engine_equals_the_textbook(case):
    walk, reference = case.walk(), case.reference()
    values = case.finished(walk.raw)
    real = reference.real_queries
    # Below float64 the order of nearly equal weights is a matter of rounding.
    exact_order = case.query.dtype == torch.float64
    for statistic in case.statistics:
        if statistic.name == "topk_position" and not exact_order:
            continue
        # Finished like the engine's numbers, so that padding is marked in the same places.
        expected = case.marked(statistic, statistic.textbook(reference))
        assert relative_error(values[statistic.name], expected) <= case.bound, statistic.name
    output = walk.output[real].double()
    expected_output = reference.output.transpose(1, 2)[real]
    # Weights are off by ``bound`` relative to themselves, and the result is rounded once more to the dtype of values.
    largest = max(1.0, float(case.value.abs().max()))
    rounding = torch.finfo(case.value.dtype).eps
    assert relative_error(output, expected_output) <= case.bound * largest + rounding


@given(cases(), st.integers(1, 50))
def test_the_size_of_blocks_does_not_matter(case, other):
    one, two = case.walk(), case.walk(block_rows=other)
    assert relative_error(one.output, two.output) < 1e-12
    expected = case.finished(one.raw)
    for name, value in case.finished(two.raw).items():
        assert relative_error(value, expected[name]) < 1e-9, name


@given(cases(causal=True, cached=False), st.lists(st.integers(1, 39), max_size=4))
def test_in_pieces_as_at_once(case, cuts):
    length = case.query.shape[2]
    edges = [0, *sorted({cut for cut in cuts if cut < length}), length]
    run = Run(case.config)
    real, sequence = case.visibility.real, case.visibility.sequence
    for first, last in itertools.pairwise(edges):
        visibility = replace(
            case.visibility, first_query=first, num_keys=last,
            real=None if real is None else real[:, :last], sequence=None if sequence is None else sequence[:, :last],
        )  # fmt: skip
        # As many segments in every piece, whatever it happens to hold.
        wanted = replace(
            case.wanted(), tokens=case.tokens[:, :last], segments=case.config.segments[:, :last],
            keep=case.config.kept[0, ..., :last],
        )  # fmt: skip
        walk = engine.walk(case.query[:, :, first:last], case.key[:, :, :last], None, visibility, case.scoring, wanted)
        raw = {name: raw[None] for name, raw in walk.raw.items()}
        run.add(Measured(tuple(case.statistics), (Group((0,), [visibility], raw, case.query.shape[1]),)))
    pieces = case.finished({name: raw[0] for name, raw in run.result().groups[0].raw.items()})
    for name, value in case.finished(case.walk().raw).items():
        assert relative_error(pieces[name], value) < 1e-9, name


@given(cases(), st.randoms())
def test_the_order_of_the_batch_does_not_matter(case, random):
    order = list(range(case.query.shape[0]))
    random.shuffle(order)
    pick = {name: getattr(case.visibility, name) for name in ("real", "sequence")}
    visibility = replace(case.visibility, **{name: None if t is None else t[order] for name, t in pick.items()})
    config = replace(case.config, segments=case.config.segments[order], keep=case.config.keep[:, order])
    shuffled = replace(
        case, query=case.query[order], key=case.key[order], value=case.value[order], visibility=visibility,
        config=config, tokens=case.tokens[order],
    )  # fmt: skip
    if int(config.segments.max()) != int(case.config.segments.max()):
        return
    expected = case.finished(case.walk().raw)
    for name, value in shuffled.finished(shuffled.walk().raw).items():
        assert relative_error(value, expected[name][order]) < 1e-9, name


@given(cases(dtypes=(torch.float32, torch.float64)))
def test_bounds_and_sums(case):
    values, visibility = case.finished(case.walk().raw), case.visibility
    slack = 1e-4 if case.query.dtype == torch.float32 else 1e-10
    real = visibility.real_queries.sum(-1).double()
    total = values["received_total"].double().nansum(-1)
    assert relative_error(total, real[:, None].expand_as(total)) < slack
    seen = visibility.visible_keys[:, None].double()
    rows = visibility.real_queries[:, None].expand_as(values["entropy"])
    for name in ("sink_mass", "local_mass", "max_weight", "previous_token", "duplicate_token", "induction"):
        assert (values[name][rows] <= 1 + slack).all(), name
        assert (values[name][rows] >= 0).all(), name
    assert (values["entropy"][rows] <= seen.log().expand_as(values["entropy"])[rows] + slack).all()
    assert (values["effective_keys"][rows] <= seen.expand_as(values["entropy"])[rows] * (1 + slack)).all()
    assert (values["effective_keys"][rows] >= 1 - slack).all()
    histogram = values["distance_histogram"].sum(-1)
    present = histogram[real > 0]
    assert relative_error(present, torch.ones_like(present)) < slack


@given(cases())
def test_visibility_counts_pair_by_pair(case):
    visibility, reference = case.visibility, case.reference()
    pairs = reference.visible[:, 0] & reference.real_queries[..., None]
    assert torch.equal(visibility.visible_keys.long(), pairs.sum(-1))
    assert torch.equal(visibility.visible_queries.long(), pairs.sum(-2))
    assert torch.equal(visibility.real_queries, reference.real_queries)
    real = visibility.real_keys
    assert torch.equal(visibility.rank[real], reference.rank[real])


@given(cases())
def test_spans_tell_pair_by_pair_who_sees_whom(case):
    visibility, visible = case.visibility, case.reference().visible[:, 0]
    keys, queries = torch.arange(visibility.num_keys), torch.arange(visibility.num_queries)[:, None]
    first, stop = (span[:, :, None] for span in visibility.key_spans)
    assert torch.equal((first <= keys) & (keys < stop) & visibility.real_keys[:, None], visible)
    first, stop = (span[:, None] for span in visibility.query_spans)
    assert torch.equal((first <= queries) & (queries < stop), visible)


def test_the_checks_can_fail(monkeypatch):
    """With the causal triangle taken away, the comparison with the textbook fails."""
    monkeypatch.setattr(Visibility, "hidden", lambda self, rows: iter(()))
    with pytest.raises(AssertionError):
        test_the_engine_equals_the_textbook()
