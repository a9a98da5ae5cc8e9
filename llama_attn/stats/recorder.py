"""Collects what the layers of one forward measure, and turns it into `AttentionStats`.

A plain object that travels through the keyword arguments of the forward: anything that looked like a dict or a
dataclass would be copied on the way by accelerate or FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_attn.stats.block import Wanted
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import VISIBILITY_LABELS, AttentionStats, Label
from llama_attn.stats.merge import merges
from llama_attn.stats.parallel import HeadShard
from llama_attn.stats.records import Records
from llama_attn.stats.segments import add_generated
from llama_attn.stats.table import Statistic, statistics_table
from llama_attn.stats.visibility import Visibility

# What is measured on the residual stream, not in the attention call.
HIDDEN = ("hidden", "hidden_real")


@dataclass(frozen=True, eq=False)
class Step:
    """The place of one forward in a run of several.

    Args:
        first: Queries and keys before this position have been measured [token].
        rows: Rows of the batch that are still being generated; None for all.
        prompt: Length of the prompt, whose segments are known [token].
        tokens: Token ids of the whole row so far, (batch, key); None if they are not known.
    """

    first: int
    rows: Tensor | None
    prompt: int
    tokens: Tensor | None


class Recorder:
    """What one forward measures.

    Args:
        config: What to measure.
        assign: Says which engine, by name, measures which statistics on a device.
        walk: Runs the walk of the engine with a name.
        num_layers: Layers of the model.
        num_heads: Query heads of each layer.
        backend: Name of the attention backend.
        model: Name or path of the model.
        step: Its place in a run of several forwards; None if it stands alone.
        shard: The heads that this process holds; None if it holds all.

    Raises:
        ValueError: A layer or head that the model does not have.
    """

    def __init__(
        self,
        config: AttentionStatsConfig,
        *,
        assign: Callable[[Sequence[Statistic], torch.device], Mapping[str, Sequence[Statistic]]],
        walk: Callable[..., Any],
        num_layers: int,
        num_heads: int,
        backend: str,
        model: str = "",
        step: Step | None = None,
        shard: HeadShard | None = None,
    ) -> None:
        self.config = config
        self.layers = config.selected("layers", num_layers)
        self.heads = config.selected("heads", num_heads)
        self._assign, self._walk = assign, walk
        # Names of the engines that have measured, in order.
        self.engines: dict[str, None] = {}
        self.num_layers, self._num_heads = num_layers, num_heads
        self._backend, self._model = backend, model
        self._step, self._shard = step, shard
        # The heads to take from what an attention layer holds; None for all.
        self._chosen: tuple[int, ...] | None = None
        if self.heads != tuple(range(num_heads)):
            self._chosen = self.heads if shard is None else shard.local(self.heads, num_heads)
        self._statistics: tuple[Statistic, ...] = ()
        self.records = Records(self.layers, num_layers, config.offload)
        self._visibility: Visibility | None = None
        self._wanted: Wanted | None = None
        # What each engine measures, by device; the same for every layer.
        self._shares: dict[torch.device, dict[str, Wanted]] = {}
        self._observes: set[str] = set()
        self._segment_names: tuple[str, ...] | None = None
        self._whole = True
        self._closed = False

    def start(self, visibility: Visibility, tokens: Tensor | None = None) -> None:
        """Say who sees whom, before the first layer runs.

        Args:
            visibility: Who sees whom in this forward.
            tokens: Token ids of this forward, (batch, query); None if it got embeddings.

        Raises:
            ValueError: Segments of the wrong shape, or a statistic that this forward cannot give.
        """
        step, shape = self._step, (visibility.batch, visibility.num_keys)
        if step is None:
            segments, names = self.config.segments_of(shape, visibility.device)
        else:
            tokens = None if step.tokens is None else step.tokens[:, : visibility.num_keys]
            segments, names = self.config.segments_of((shape[0], step.prompt), visibility.device)
            if segments is not None and names is not None:
                segments, names = add_generated(segments, names, visibility.num_keys)
        # Ids of keys that come from a cache are not known.
        if tokens is not None and tuple(tokens.shape) != shape:
            tokens = None
        self._segment_names = names
        self._statistics = wanted_statistics(self.config, has_tokens=tokens is not None, alone=step is None)
        if self._shard is not None:
            self._shard.check(self._statistics)
        self._visibility = visibility.measured(
            stride=self.config.query_stride, first=step.first if step else 0, rows=step.rows if step else None
        )
        if step is None and not self._visibility.num_queries:
            raise ValueError(f"query_stride: no query of this call is at a multiple of {self.config.query_stride}")
        on_blocks = [statistic for statistic in self._statistics if not statistic.is_norm]
        self._wanted = Wanted(on_blocks, self.config, segments, len(names or ()), tokens)
        self._observes = {statistic.observes for statistic in self._statistics}
        self._whole = self._visibility.num_queries == visibility.num_queries

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What is measured, known once the recorder was started."""
        return self._statistics

    @property
    def visibility(self) -> Visibility:
        """Who sees whom, for the measured queries."""
        if self._visibility is None:
            raise RuntimeError("the recorder was not started; statistics need llama_attn's LlamaModel")
        return self._visibility

    def visibility_on(self, device: torch.device) -> Visibility:
        """The same, on ``device``."""
        # Kept, so that layers on the same device share the vectors it computes.
        self._visibility = self.visibility.to(device)
        return self._visibility

    def _shares_on(self, device: torch.device) -> dict[str, Wanted]:
        """What each engine measures on ``device``."""
        wanted = self._wanted
        if wanted is None:
            raise RuntimeError("the recorder was not started; statistics need llama_attn's LlamaModel")
        if device not in self._shares:
            segments, tokens = (None if t is None else t.to(device) for t in (wanted.segments, wanted.tokens))
            self._shares[device] = {
                engine: Wanted(statistics, self.config, segments, wanted.num_segments, tokens)
                for engine, statistics in self._assign(wanted.statistics, device).items()
            }
        return self._shares[device]

    def wants(self, layer: int) -> bool:
        """Whether ``layer`` is measured; never again once the forward is over (checkpointing runs layers twice)."""
        return not self._closed and layer in self.layers

    def fused(self, layer: int, device: torch.device, engine: str) -> Wanted | None:
        """What a backend on ``engine`` may measure from its own blocks; ``None`` if it should measure nothing.

        A subset of heads or queries is cheaper to measure beside the backend.
        """
        if self._chosen is not None or not (self._whole and self.wants(layer)):
            return None
        wanted = self._shares_on(device).get(engine)
        if wanted is not None:
            self.engines[engine] = None
        return wanted

    def record_hidden(self, layer: int, states: Tensor) -> None:
        """Measure the residual stream that enters ``layer``; the number of layers stands for the last one's output."""
        wanted = [statistic for statistic in self._statistics if statistic.observes in HIDDEN]
        if not wanted or self._closed or (layer != self.num_layers and layer not in self.layers):
            return
        states = _wide(self._strided(states, 1))
        real = self.visibility_on(states.device).real_queries
        given = {"hidden": (states,), "hidden_real": (states, real, self.config)}
        self.records.put(layer, {s.name: s.stream(*given[s.observes]) for s in wanted})

    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        output_weight: Callable[[torch.device], Tensor],
    ) -> None:
        """Measure ``layer`` beside its backend: statistics that the backend has not recorded itself, and norms.

        Args:
            layer: Index of the layer.
            query: Queries after RoPE, (batch, head, query, channel).
            key: Keys after RoPE and cache, (batch, kv_head, key, channel).
            value: Values after the cache.
            scaling: What scores are multiplied with.
            output_weight: Gives the weight of ``o_proj`` by head, (head, hidden, channel), on a device.

        Raises:
            ValueError: The layer holds other heads than it should.
        """
        if not self.wants(layer):
            return
        shard, held = self._shard, query.shape[1]
        if held * (1 if shard is None else shard.size) != self._num_heads:
            raise ValueError(
                f"layer {layer}: attention holds {held} of {self._num_heads} heads, split in a way that statistics do "
                "not know; tensor parallelism needs q_proj colwise and o_proj rowwise"
            )
        # An engine records all its statistics of a layer at once.
        missing = {
            engine: wanted
            for engine, wanted in self._shares_on(query.device).items()
            if not self.records.has(wanted.statistics[0].name, layer)
        }
        has_norms = self._observes - {"block", *HIDDEN}
        if not missing and not has_norms:
            return
        visibility = self.visibility_on(query.device)
        query, key, value = query.detach(), key.detach(), value.detach()
        key, value = key[:, :, : visibility.num_keys], value[:, :, : visibility.num_keys]
        # Under autocast a float32 product would be computed in half precision.
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            if missing and visibility.num_queries:
                group = query.shape[1] // key.shape[1]
                query = self._strided(query, 2)
                seen = key
                if self._chosen is not None:
                    visibility = visibility.of_heads(self._chosen)
                    query = query[:, list(self._chosen)]
                    seen = key[:, [head // group for head in self._chosen]]
                for engine, wanted in missing.items():
                    self.records.put(layer, self._walk(engine, query, seen, None, visibility, scaling, wanted).raw)
                    self.engines[engine] = None
            if not has_norms:
                return
            if self._step is not None:
                key, value = key[:, :, self._step.first :], value[:, :, self._step.first :]
            keys, values = key, value
            if shard is not None and has_norms & {"key", "value"}:
                # The norm of their mean over heads needs all of them.
                keys, values = shard.gather(key, 1), shard.gather(value, 1)
            for statistic in self._statistics:
                if statistic.observes == "key":
                    self.records.put(layer, {statistic.name: statistic.stream(_wide(keys))})
                elif statistic.observes == "value":
                    self.records.put(layer, {statistic.name: statistic.stream(_wide(values))})
                elif statistic.observes == "value_output":
                    norms = statistic.stream(_wide(value), _wide(output_weight(value.device)))
                    chosen = norms if self._chosen is None else norms[:, list(self._chosen)]
                    self.records.put(layer, {statistic.name: chosen})

    def _strided(self, tensor: Tensor, axis: int) -> Tensor:
        """The measured queries of ``tensor``, whose ``axis`` holds the tokens of this call."""
        if self._whole:
            return tensor
        # The last query of this call is the last key.
        visibility = self.visibility
        start = visibility.num_keys - tensor.shape[axis]
        return tensor.index_select(axis, visibility.query_positions.to(tensor.device) - start)

    def close(self) -> None:
        """Measure nothing more: under gradient checkpointing the layers run again in the backward."""
        self._closed = True

    def finish(self, device: torch.device) -> AttentionStats:
        """Close the recorder and label what it holds.

        Args:
            device: Where the numbers end, unless they are offloaded.

        Raises:
            RuntimeError: A layer did not report, so the numbers would be incomplete.
        """
        self.close()
        device = torch.device(self.config.offload or device)
        visibility = self.visibility_on(device)
        of_heads = visibility.of_heads(self.heads)
        values = {}
        for statistic in self._statistics:
            tensor = self.records.take(statistic.name).to(device)
            if self._shard is not None and "head" in statistic.dims:
                tensor = self._shard.gather_heads(tensor, statistic.dims.index("head"), self.heads, self._num_heads)
            if statistic.finish is not None:
                tensor = statistic.finish(tensor, of_heads, self.config)
            values[statistic.name] = mark_padding(statistic, tensor, visibility)
        values["visible_keys"] = visibility.visible_keys
        values["visible_queries"] = visibility.visible_queries
        return AttentionStats(
            values=values,
            labels={s.name: Label.of(s) for s in self._statistics} | VISIBILITY_LABELS,
            config=self.config,
            layers=self.layers,
            heads=self.heads,
            num_layers=self.num_layers,
            first_query=visibility.first_query,
            segments=self._segment_names,
            backend=self._backend,
            engine="+".join(self.engines),
            model=self._model,
        )


def wanted_statistics(config: AttentionStatsConfig, *, has_tokens: bool, alone: bool = True) -> tuple[Statistic, ...]:
    """The entries of the table that ``config`` asks for, in the order of the table.

    Args:
        config: What was asked for.
        has_tokens: Whether the token ids of all keys are known.
        alone: Whether the forward stands alone, and is not put together with others.

    Raises:
        ValueError: A statistic is named that needs segments or token ids which are not there, or that several
            forwards cannot give.
    """
    have = {"segments": config.segments is not None, "tokens": has_tokens, None: True}
    ways = {
        "segments": "`segments` in the AttentionStatsConfig",
        "tokens": "the ids of all tokens: input_ids, not inputs_embeds, and none of them from a cache",
    }
    chosen = []
    for name, statistic in statistics_table().items():
        possible = have[statistic.needs]
        if statistic.is_norm:
            named = config.statistics != "all" and name in config.statistics
            if named and not alone and not merges(statistic):
                raise ValueError(
                    f"statistics: {name!r} is a number of one forward, which the steps of generate cannot be merged "
                    "into; leave it out, or measure one forward over the finished sequence"
                )
            wanted = named or (config.norms and (alone or merges(statistic)))
        elif statistic.needs == "segments" and config.segments is not None:
            wanted = True
        else:
            wanted = name in config.statistics or (config.statistics == "all" and possible)
        if wanted and not possible and statistic.needs:
            raise ValueError(f"statistics: {name!r} needs {ways[statistic.needs]}")
        if wanted:
            chosen.append(statistic)
    return tuple(chosen)


def mark_padding(statistic: Statistic, tensor: Tensor, visibility: Visibility) -> Tensor:
    """Put NaN, or −1 in integer statistics, where there is no real token."""
    dims = statistic.dims
    if visibility.plain and visibility.rows is None and visibility.stride == 1:
        # Every token is real, and every key is seen by the last query.
        return tensor
    if "query" in dims:
        real = visibility.real_queries
    elif "key" in dims:
        real = visibility.real_keys if statistic.is_norm else visibility.visible_queries > 0
    else:
        return tensor
    shape = [size if dim in ("batch", "query", "key") else 1 for dim, size in zip(dims, tensor.shape, strict=True)]
    return tensor.masked_fill_(~real.view(shape), -1 if statistic.dtype is not None else torch.nan)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
