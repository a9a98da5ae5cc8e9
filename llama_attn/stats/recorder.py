"""Collects what the layers of one forward measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama_attn.stats.block import Wanted
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.merge import Group, Measured
from llama_attn.stats.norms import measured_norm
from llama_attn.stats.parallel import HeadShard
from llama_attn.stats.records import Records
from llama_attn.stats.row_positions import check_size
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import HIDDEN, WHERE
from llama_attn.stats.sight import Assign, Share, Sight
from llama_attn.stats.step import Step
from llama_attn.stats.table import Statistic, statistics_table
from llama_attn.stats.visibility import Visibility

# Stands among the layers for the output of the last one.
LAST = -1


class UnreadableError(ValueError):
    """A model does not show what a statistic is of."""


class Recorder:
    """What one forward measures; a plain object, so that nobody copies it on its way through a model.

    Args:
        config: What to measure.
        layers: Indices of the layers that will report, so far as they are known.
        assign: Says which engine, by name, measures which statistics in a call.
        walk: Runs the walk of the engine with a name.
        step: Its place in a run of several forwards.
        shard: The heads that this process holds; None if it holds all.
    """

    def __init__(
        self,
        config: AttentionStatsConfig,
        *,
        layers: Sequence[int],
        assign: Assign,
        walk: Callable[..., Any],
        step: Step | None = None,
        shard: HeadShard | None = None,
    ) -> None:
        self.config, self.step, self.shard = config, step or Step(), shard
        self._assign, self._walk = assign, walk
        # As the layers of masks of kept keys are counted.
        self._layers = tuple(layers) if config.layers is None else config.layers
        # Names of the engines that have measured, in order.
        self.engines: dict[str, None] = {}
        self.records = Records(len(layers), config.offload)
        self.hidden = Records(len(layers) + 1, config.offload)
        self.segment_names: tuple[str, ...] | None = None
        # Visibilities by identity; kept, so that no other takes their place.
        self._sights: dict[int, tuple[Visibility, Sight]] = {}
        # In order.
        self._groups: dict[tuple[int, int, int], dict[int, None]] = {}
        self.heads_held: dict[int, int] = {}
        # Token ids of all keys, (batch, key), if they are known.
        self.known_tokens: Tensor | None = None
        # Why a statistic cannot be given.
        self._reasons: dict[str, str] = {}

    def sight(self, visibility: Visibility) -> Sight:
        """What layers with this visibility measure.

        Raises:
            ValueError: As `Sight.of`.
        """
        if (made := self._sights.get(id(visibility))) is not None:
            return made[1]
        sight = Sight.of(visibility, self.config, self.step, self._layers, self.shard)
        self.segment_names = sight.segment_names
        self.known_tokens = self.known_tokens if sight.known_tokens is None else sight.known_tokens
        self._sights[id(visibility)] = visibility, sight
        return sight

    def fused(
        self, layer: int, query: Tensor, key: Tensor, visibility: Visibility, scoring: Scoring, engine: str
    ) -> Share | None:
        """What a backend on ``engine`` may measure from its own blocks; ``None`` if it should measure nothing.

        A subset of heads or queries is cheaper to measure beside the backend.
        """
        sight = self.sight(visibility)
        if self.config.heads is not None or not sight.whole:
            return None
        share = sight.fused(self._assign, visibility, scoring, engine)
        if share is not None and share.wanted.rows is not None:
            self._check_rows(sight, query, query.shape[1], visibility.num_keys)
        if share is None or sight.keep is None:
            return share
        return share._replace(wanted=sight.of_layer(share.wanted, layer, key.shape[1]))

    def put(
        self, layer: int, visibility: Visibility, heads: tuple[int, int], raw: Mapping[str, Tensor], engine: str
    ) -> None:
        """Keep what ``engine`` has measured in ``layer``."""
        self._belongs(layer, visibility, heads)
        self.records.put(layer, raw)
        self.engines[engine] = None

    def measure(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visibility: Visibility,
        scoring: Scoring,
        output_weight: Callable[[torch.device], Tensor] | None = None,
        prefer: str | None = None,
    ) -> None:
        """Measure ``layer`` beside its backend: statistics that the backend has not recorded itself, and norms.

        Args:
            layer: Index of the layer.
            query: Queries, (batch, head, query, channel).
            key: Keys, (batch, kv_head, key, channel).
            value: Values.
            visibility: Who sees whom.
            scoring: How scores are made.
            output_weight: Gives the weight of the output projection by head, (head, hidden, channel), on a device;
                None if it is not known (yet).
            prefer: Engine to measure with if the configuration names none.
        """
        sight, held, kv_held = self.sight(visibility), query.shape[1], key.shape[1]
        self._belongs(layer, visibility, (held, kv_held))
        shares = sight.shares(self._assign, visibility, scoring, prefer)
        missing = {e: share for e, share in shares.items() if not self.records.has(share.statistics[0].name, layer)}
        rows_missing = sight.rows and not self.records.has(sight.row_statistics[0].name, layer)
        if not missing and not sight.norms and not rows_missing:
            return
        chosen = self._chosen(layer)
        query, key, value = query.detach(), key.detach(), value.detach()
        key, value = key[:, :, : visibility.num_keys], value[:, :, : visibility.num_keys]
        # Under autocast a float32 product would be computed in half precision.
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            if missing and sight.visibility.num_queries:
                rows, scores = self._strided(query, 2, visibility), _of_queries(scoring, sight, visibility)
                for engine, share in missing.items():
                    share = sight.of_layer(share, layer, kv_held)
                    raw = self._beside(engine, rows, key, sight.visibility, scores, share, chosen)
                    self.put(layer, visibility, (held, kv_held), raw, engine)
            if rows_missing:
                self._measure_rows(layer, query, key, visibility, scoring, chosen)
            if sight.norms:
                self._measure_norms(layer, sight, key, value, chosen, output_weight)

    def _beside(
        self,
        engine: str,
        query: Tensor,
        key: Tensor,
        visibility: Visibility,
        scoring: Scoring,
        wanted: Wanted,
        chosen: Sequence[int] | None,
    ) -> Mapping[str, Tensor]:
        """What ``engine`` measures of the chosen heads."""
        if chosen is not None:
            group = query.shape[1] // key.shape[1]
            kv_heads = [head // group for head in chosen]
            if wanted.keep is not None and wanted.keep.shape[1] > 1:
                wanted = replace(wanted, keep=wanted.keep[:, kv_heads])
            query, key = query[:, list(chosen)], key[:, kv_heads]
            visibility, scoring = visibility.of_heads(chosen), scoring.of_heads(chosen)
        raw: Mapping[str, Tensor] = self._walk(engine, query, key, None, visibility, scoring, wanted).raw
        return raw

    def _measure_rows(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        visibility: Visibility,
        scoring: Scoring,
        chosen: Sequence[int] | None,
    ) -> None:
        """Measure what is of single queries and all keys: a walk over these queries alone."""
        sight = self.sight(visibility)
        self._check_rows(sight, query, query.shape[1] if chosen is None else len(chosen), key.shape[2])
        parts: dict[str, list[Tensor]] = {}
        for run in sight.row_runs:
            at = slice(
                run.first_query - visibility.first_query, run.first_query - visibility.first_query + run.num_queries
            )
            scores = scoring.of_queries(at)
            assigned = self._assign(sight.row_statistics, run, scores)
            for engine, statistics in assigned.items():
                wanted = replace(sight.wanted, statistics=statistics)
                for name, raw in self._beside(engine, query[:, :, at], key, run, scores, wanted, chosen).items():
                    parts.setdefault(name, []).append(raw)
                self.engines[engine] = None
        self.records.put(layer, {name: torch.cat(raw, dim=2) for name, raw in parts.items()})

    def _check_rows(self, sight: Sight, query: Tensor, heads: int, num_keys: int) -> None:
        weights = max(1, len(self._layers)) * len(query) * heads * len(sight.rows) * num_keys
        check_size(weights * max(4, query.element_size()), self.config.offload)

    def _measure_norms(
        self,
        layer: int,
        sight: Sight,
        key: Tensor,
        value: Tensor,
        chosen: Sequence[int] | None,
        output_weight: Callable[[torch.device], Tensor] | None,
    ) -> None:
        if sight.visibility.aligned:
            old = max(0, self.step.first - sight.visibility.offset)
            key, value = key[:, :, old:], value[:, :, old:]
        keys, values = key, value
        if self.shard is not None and sight.norms & {"key", "value"}:
            # The norm of their mean over heads needs all of them.
            keys, values = self.shard.gather(key, 1), self.shard.gather(value, 1)
        for statistic in sight.statistics:
            if statistic.observes == "key":
                self.records.put(layer, {statistic.name: measured_norm(statistic, self.config, _wide(keys))})
            elif statistic.observes == "value":
                self.records.put(layer, {statistic.name: measured_norm(statistic, self.config, _wide(values))})
            elif statistic.observes == "value_output" and output_weight is not None:
                self._measure_outputs(layer, statistic, value, chosen, output_weight)

    def measure_outputs(
        self, layer: int, value: Tensor, visibility: Visibility, output_weight: Callable[[torch.device], Tensor]
    ) -> None:
        """Measure values behind an output projection that has shown itself after the attention call.

        Args:
            layer: Index of the layer.
            value: Values of the call, (batch, kv_head, key, value_channel).
            visibility: Who saw whom in the call.
            output_weight: Gives the weight of the projection by head, (head, hidden, channel), on a device.
        """
        value = value.detach()[:, :, max(0, self.step.first - visibility.offset) : visibility.num_keys]
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            for statistic in self.sight(visibility).statistics:
                # A layer that says itself what takes its output has been measured with its attention.
                if statistic.observes == "value_output" and not self.records.has(statistic.name, layer):
                    self._measure_outputs(layer, statistic, value, self._chosen(layer), output_weight)

    def _measure_outputs(
        self,
        layer: int,
        statistic: Statistic,
        value: Tensor,
        chosen: Sequence[int] | None,
        output_weight: Callable[[torch.device], Tensor],
    ) -> None:
        try:
            weight = output_weight(value.device)
        except UnreadableError as error:
            self._reasons[statistic.name] = str(error)
            return
        norms = measured_norm(statistic, self.config, _wide(value), _wide(weight))
        self.records.put(layer, {statistic.name: norms if chosen is None else norms[:, list(chosen)]})

    def record_hidden(self, layer: int, states: Tensor, visibility: Visibility) -> None:
        """Measure the residual stream that enters ``layer``; `LAST` is the output of the last one.

        Args:
            layer: Index of the layer.
            states: (batch, query, channel).
            visibility: Who sees whom in the forward, which says which tokens are real and measured.
        """
        sight = self.sight(visibility)
        states = _wide(self._strided(states.detach(), 1, visibility))
        with torch.no_grad():
            given = {"hidden": (states,), "hidden_real": (states, sight.visibility.real_queries)}
            for statistic in sight.statistics:
                if statistic.observes in HIDDEN:
                    norms = measured_norm(statistic, self.config, *given[statistic.observes])
                    self.hidden.put(layer, {statistic.name: norms})

    def measured(self) -> Measured:
        """What the forward gave.

        Raises:
            RuntimeError: A layer did not report, so the numbers would be incomplete.
            ValueError: A statistic was named that the model cannot give.
        """
        statistics = self._given()
        groups = []
        for (at, heads, kv_heads), in_order in self._groups.items():
            layers, names = tuple(in_order), []
            sight = self._sights[at][1]
            for statistic in statistics:
                # A step of a run may have no query at a multiple of the stride.
                is_there = statistic.is_norm or (
                    sight.rows if "rows" in statistic.needed else sight.visibility.num_queries
                )
                if statistic.dims[0] == "layer" and is_there:
                    names.append(statistic.name)
            raw = self.records.stacked(names, layers)
            groups.append(Group(layers, (sight.visibility,), raw, heads, kv_heads))
        hidden_layers = (*sorted(layer for group in groups for layer in group.layers), LAST)
        of_states = [statistic.name for statistic in statistics if statistic.dims[0] == "hidden_layer"]
        hidden = self.hidden.stacked(of_states, hidden_layers)
        groups.sort(key=lambda group: group.layers)
        rows = {self._sights[at][1].rows for at, *_ in self._groups}
        if len(rows) > 1:
            raise ValueError(f"rows: layers see different queries, of which {sorted(rows)} are wanted; choose `layers`")
        return Measured(statistics, tuple(groups), hidden, tuple(self.engines), rows.pop())

    def _given(self) -> tuple[Statistic, ...]:
        """What was wanted, less the norms that the model cannot give."""
        sights = [sight for _, sight in self._sights.values()]
        wanted = {s.name: s for sight in sights for s in sight.statistics}
        if len(sights) > 1:
            wanted = {name: wanted[name] for name in statistics_table() if name in wanted}
        named = () if self.config.statistics == "all" else self.config.statistics
        given = []
        for name, statistic in wanted.items():
            records = self.hidden if statistic.observes in HIDDEN else self.records
            if statistic.observes in (*HIDDEN, "value_output") and not self._is_complete(records, statistic):
                if name in named:
                    why = self._reasons.get(
                        name, f"it is of {WHERE[statistic.observes]}, which this model does not show"
                    )
                    raise ValueError(f"statistics: {name!r} cannot be given: {why}")
                continue
            given.append(statistic)
        return tuple(given)

    def _is_complete(self, records: Records, statistic: Statistic) -> bool:
        layers = [layer for layers in self._groups.values() for layer in layers]
        if statistic.observes in HIDDEN:
            layers.append(LAST)
        return all(records.has(statistic.name, layer) for layer in layers)

    def _chosen(self, layer: int) -> tuple[int, ...] | None:
        """The heads to take from what an attention layer holds; None for all."""
        if self.config.heads is None:
            return None
        heads = self.config.selected("heads", self.heads_held[layer])
        return heads if self.shard is None else self.shard.local(heads, self.heads_held[layer])

    def _belongs(self, layer: int, visibility: Visibility, heads: tuple[int, int]) -> None:
        """Remember how many heads a layer has, and which others see the same."""
        self.heads_held[layer] = heads[0] * (1 if self.shard is None else self.shard.size)
        self._groups.setdefault((id(visibility), *heads), {})[layer] = None

    def _strided(self, tensor: Tensor, axis: int, visibility: Visibility) -> Tensor:
        """The measured queries of ``tensor``, whose ``axis`` holds the tokens of this call."""
        sight = self.sight(visibility)
        if sight.whole:
            return tensor
        places = sight.visibility.query_slots.to(tensor.device) - visibility.first_query
        return tensor.index_select(axis, places)


def _of_queries(scoring: Scoring, sight: Sight, visibility: Visibility) -> Scoring:
    """The scoring of the measured queries."""
    if sight.whole:
        return scoring
    first = sight.visibility.first_query - visibility.first_query
    return scoring.of_queries(slice(first, None, sight.visibility.stride))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
