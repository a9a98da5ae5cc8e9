"""What layers share that see the same: who sees whom for the measured queries, and what to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_attn.stats.block import Wanted
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.keep import Keep
from llama_attn.stats.parallel import HeadShard
from llama_attn.stats.row_positions import positions, runs_of_positions
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import HIDDEN, wanted_statistics
from llama_attn.stats.step import Step, token_before
from llama_attn.stats.table import Statistic
from llama_attn.stats.visibility import Visibility

# Which engine, by name, measures which statistics in a call.
Assign = Callable[..., Mapping[str, Sequence[Statistic]]]


class Share(NamedTuple):
    """What a backend may measure from its own blocks.

    Args:
        wanted: What to measure.
        visibility: Who sees whom, for the measured queries.
        is_all: Whether nothing is left to be measured beside it.
    """

    wanted: Wanted
    visibility: Visibility
    is_all: bool


@dataclass(frozen=True, eq=False)
class Sight:
    """Who sees whom for the measured queries, and what to measure.

    Args:
        visibility: Who sees whom.
        statistics: What to measure.
        wanted: What of it on attention weights of all measured queries.
        norms: What else is looked at: "key", "value", "value_output".
        whole: Whether all queries of the call are measured.
        segment_names: Names of the segments.
        known_tokens: Token ids of the whole row, (batch, token), if they are known.
        layers: Indices of the layers, as those of masks of kept keys are counted.
        shard: The heads that this process holds; None if it holds all.
        keep: Which keys are kept, (layer or 1, batch, kv_head or 1, key).
        rows: Positions of the queries whose weights are wanted.
        row_runs: Who sees whom, for each run of such queries.
        row_statistics: What is measured on them alone.
    """

    visibility: Visibility
    statistics: tuple[Statistic, ...]
    wanted: Wanted
    norms: frozenset[str]
    whole: bool
    segment_names: tuple[str, ...] | None
    known_tokens: Tensor | None
    layers: Sequence[int] = ()
    shard: HeadShard | None = None
    keep: Keep | None = None
    rows: tuple[int, ...] = ()
    row_runs: tuple[Visibility, ...] = ()
    row_statistics: tuple[Statistic, ...] = ()
    # By the kind of call, found out once for all layers.
    _shares: dict[tuple[Any, ...], dict[str, Wanted]] = field(default_factory=dict)
    _fused: dict[tuple[Any, ...], Share | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        visibility: Visibility,
        config: AttentionStatsConfig,
        step: Step,
        layers: Sequence[int],
        shard: HeadShard | None,
    ) -> Sight:
        """What layers with this visibility measure.

        Raises:
            ValueError: Segments or kept keys of the wrong shape, rows that are not there, or a statistic that this
                forward cannot give.
        """
        segments, names = step.segments(config, visibility)
        known = step.known_tokens(visibility)
        statistics = wanted_statistics(config, has_tokens=known is not None, alone=step.prompt is None)
        measured = visibility.measured(stride=config.query_stride, first=step.first, rows=step.rows)
        if not measured.num_queries and not step.first:
            raise ValueError(f"query_stride: no query of this call is at a multiple of {config.query_stride}")
        keep = step.keep(config, visibility)
        if keep is not None and keep.shape[0] not in (1, len(layers)):
            raise ValueError(f"keep: expected 1 or {len(layers)} layers, got {keep.shape[0]}")
        on_blocks = [s for s in statistics if not s.is_norm and "rows" not in s.needed]
        tokens = before = None
        # Not every model shows them unasked: a statistic that takes them must have said so.
        if known is not None and any("tokens" in s.needed for s in on_blocks):
            tokens = known[:, visibility.offset :].to(visibility.device)
            before = token_before(known, visibility)
        wanted = Wanted(on_blocks, config, segments, len(names or ()), tokens, before, layers=len(layers))
        rows, runs = _rows(visibility, config, step)
        return cls(
            visibility=measured,
            statistics=statistics,
            wanted=wanted,
            norms=frozenset(s.observes for s in statistics) - {"block", *HIDDEN},
            whole=measured.num_queries == visibility.num_queries,
            segment_names=names,
            known_tokens=known,
            layers=layers,
            shard=shard,
            keep=keep,
            rows=rows,
            row_runs=runs,
            row_statistics=tuple(s for s in statistics if "rows" in s.needed),
        )

    @property
    def row_places(self) -> tuple[int, ...]:
        """Which of the measured queries ``rows`` are, if all are measured."""
        first = self.visibility.offset + self.visibility.first_query
        return tuple(row - first for row in self.rows)

    def shares(self, assign: Assign, visibility: Visibility, scoring: Scoring, prefer: str | None) -> dict[str, Wanted]:
        """What each engine measures.

        Args:
            assign: Says which engine, by name, measures which statistics in a call.
            visibility: Who sees whom in the call.
            scoring: How its scores are made.
            prefer: Engine to measure with if the configuration names none.
        """
        kind = _kind(visibility, scoring, prefer)
        if kind not in self._shares:
            assigned = assign(self.wanted.statistics, visibility, scoring, prefer=prefer)
            self._shares[kind] = {e: replace(self.wanted, statistics=part) for e, part in assigned.items()}
        return self._shares[kind]

    def fused(self, assign: Assign, visibility: Visibility, scoring: Scoring, engine: str) -> Share | None:
        """What a backend on ``engine`` may measure from its own blocks; arguments as in `shares`."""
        kind = _kind(visibility, scoring, engine)
        if kind in self._fused:
            return self._fused[kind]
        shares = self.shares(assign, visibility, scoring, engine)
        share = shares.get(engine)
        if share is None:
            self._fused[kind] = None
            return None
        # Operators in a graph are not told of rows: there they are measured beside.
        with_rows = self.rows and not torch.compiler.is_compiling()
        if with_rows and {*assign(self.row_statistics, visibility, scoring, prefer=engine)} == {engine}:
            share = replace(share, statistics=(*share.statistics, *self.row_statistics), rows=self.row_places)
        is_all = len(shares) == 1 and not self.norms and (share.rows is not None or not self.rows)
        self._fused[kind] = Share(share, self.visibility, is_all)
        return self._fused[kind]

    def of_layer(self, wanted: Wanted, layer: int, kv_heads: int) -> Wanted:
        """What is wanted of one layer, whose mask of kept keys may be its own.

        Raises:
            ValueError: The mask is of another number of KV heads.
        """
        if self.keep is None:
            return wanted
        keep = self.keep[self.layers.index(layer) if len(self.keep) > 1 else 0]
        if self.shard is not None and keep.shape[1] > 1:
            keep = self.shard.own(keep, 1, kv_heads)
        if keep.shape[1] not in (1, kv_heads):
            raise ValueError(f"keep: expected 1 or {kv_heads} KV heads, got {keep.shape[1]}")
        return replace(wanted, keep=keep)


def _kind(visibility: Visibility, scoring: Scoring, engine: str | None) -> tuple[Any, ...]:
    """What decides which engine takes a call, besides who sees whom."""
    return engine, visibility.device, scoring.position_bias is None, scoring.sinks is None, scoring.softcap is None


def _rows(
    visibility: Visibility, config: AttentionStatsConfig, step: Step
) -> tuple[tuple[int, ...], tuple[Visibility, ...]]:
    """The queries whose weights are wanted, and who sees whom for each run of them."""
    if config.rows is None:
        return (), ()
    queries = range(visibility.queries.start + visibility.offset, visibility.queries.stop + visibility.offset)
    found = tuple(row for row in positions(config.rows, queries, step.prompt) if row >= step.first)
    runs = runs_of_positions(found)
    return found, tuple(visibility.measured(first=run.start, stop=run.stop, rows=step.rows) for run in runs)
