"""From raw numbers to `AttentionStats`: sums are divided, layers laid side by side, padding marked, all of it named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.counts import Counts
from llama_attn.stats.extents import check_returned
from llama_attn.stats.labels import SEGMENT_LABELS, VISIBILITY_LABELS, Label
from llama_attn.stats.merge import Group, Measured, grow
from llama_attn.stats.parallel import HeadShard
from llama_attn.stats.segments import segments_of_keys
from llama_attn.stats.table import BUILT_IN, Statistic


@dataclass(frozen=True)
class Origin:
    """Where the numbers come from.

    Args:
        num_layers: Layers of the model.
        backend: Attention backend that computed the output.
        model: Name or path of the model.
        stack: Path of the attention modules, with # for the number of the layer.
        paths: Path of each layer's attention module, by layer.
        shard: The heads that this process held; None if it held all.
        without_attention: Layers of the model that have no attention.
    """

    num_layers: int
    backend: str = ""
    model: str = ""
    stack: str = ""
    paths: tuple[tuple[int, str], ...] = ()
    shard: HeadShard | None = None
    without_attention: tuple[int, ...] = ()


def label(
    measured: Measured,
    config: AttentionStatsConfig,
    origin: Origin,
    device: torch.device,
    *,
    segments: tuple[str, ...] | None = None,
    real_keys: Tensor | None = None,
) -> AttentionStats:
    """The statistics of a forward, or of a run.

    Args:
        measured: The raw numbers.
        config: What was asked for.
        origin: Where they come from.
        device: Where the numbers end, unless they are offloaded.
        segments: Names of the segments.
        real_keys: Which keys are real, (batch, key), where a run knows better than its forwards.
    """
    device = torch.device(config.offload or device)
    measured_layers = sorted(layer for group in measured.groups for layer in group.layers)
    layers = tuple(measured_layers) if config.layers is None else config.layers
    sheet = _Sheet(measured, config, origin, device, layers, real_keys)
    values: dict[str, Tensor] = {}
    for statistic in measured.statistics:
        if statistic.dims[0] == "hidden_layer":
            if statistic.name in measured.hidden:
                values[statistic.name] = sheet.hidden(statistic, measured.hidden[statistic.name])
        else:
            if statistic.name in measured.groups[0].raw:
                values[statistic.name] = sheet.of_layers(statistic)
    seen, seen_labels = sheet.visibility()
    widest, paths, given = sheet.widest, dict(origin.paths), config.numbered_segments
    if segments is not None and given is not None:
        keys = range(sheet.first_key, sheet.stop_key)
        seen["key_segment"] = segments_of_keys(given, segments, keys, real_keys).to(device)
        seen_labels |= SEGMENT_LABELS
    return AttentionStats(
        values=values | seen,
        labels={s.name: Label.of(s) for s in measured.statistics if s.name in values} | seen_labels,
        config=config,
        layers=layers,
        heads=sheet.heads,
        num_layers=origin.num_layers,
        num_heads=sheet.num_heads,
        first_query=widest.first_position,
        first_key=sheet.first_key,
        segments=segments,
        backend=origin.backend,
        engine="+".join(measured.engines),
        model=origin.model,
        stack=origin.stack,
        paths=tuple(paths[layer] for layer in layers if layer in paths),
        direction=widest.direction,
        without_attention=origin.without_attention,
        length=sheet.length,
        rows=measured.rows,
        num_kv_heads=sheet.num_kv_heads,
    )


class _Sheet:
    """Layers side by side, however much each of them sees."""

    def __init__(
        self,
        measured: Measured,
        config: AttentionStatsConfig,
        origin: Origin,
        device: torch.device,
        layers: Sequence[int],
        real_keys: Tensor | None,
    ) -> None:
        self.config, self.origin, self.device = config, origin, device
        self.groups = measured.groups
        self.counts = [self._counts(group, real_keys) for group in self.groups]
        # The layers with most queries stand for the forward; no `max` by a key, which Dynamo does not know.
        self.widest = self.counts[0]
        for counts in self.counts[1:]:
            if counts.num_queries > self.widest.num_queries:
                self.widest = counts
        self.first_key = min([counts.offset for counts in self.counts])
        self.stop_key = max([counts.stop_key for counts in self.counts])
        self.length = max([counts.length for counts in self.counts])
        if len({counts.batch for counts in self.counts}) > 1:
            raise ValueError(
                f"layers: those of {origin.stack!r} hold different numbers of rows (windows or parts of images), so that "
                f"there is no common batch; choose some that are alike with `layers`: "
                f"{[group.layers for group in self.groups]}"
            )
        shards = 1 if origin.shard is None else origin.shard.size
        self.num_heads = max([group.heads for group in self.groups]) * shards
        self.num_kv_heads = max([group.kv_heads for group in self.groups]) * shards
        self.heads = config.selected("heads", self.num_heads)
        # Where each group's layers lie on the layer axis.
        self.layers = tuple(layers)
        self.places = [[self.layers.index(layer) for layer in group.layers] for group in self.groups]
        self._in_order = self.places == [list(range(len(self.layers)))]

    def _counts(self, group: Group, real_keys: Tensor | None) -> Counts:
        return group.counts(real_keys).to(self.device)

    def of_layers(self, statistic: Statistic) -> Tensor:
        """A statistic of every layer, (layer, …)."""
        parts = [self._finished(statistic, group, at) for at, group in enumerate(self.groups)]
        if self._in_order:
            return parts[0]
        return self._side_by_side(statistic.dims, parts, statistic.none)

    def hidden(self, statistic: Statistic, raw: Tensor) -> Tensor:
        """A statistic of the residual stream, (hidden_layer, …)."""
        order = sorted(self.layers)
        if list(self.layers) != order:
            raw = raw[[*map(order.index, self.layers), len(order)]]
        return mark_padding(statistic, raw.to(self.device), self.widest)

    def visibility(self) -> tuple[dict[str, Tensor], dict[str, Label]]:
        """How much is seen: once if all layers see the same, else of every layer."""
        first = self.counts[0]
        if all(counts.equals(first) for counts in self.counts[1:]):
            values = {"visible_keys": first.visible_keys.int(), "visible_queries": first.visible_queries.int()}
            return values, dict(VISIBILITY_LABELS)
        values, labels = {}, {}
        for name, given in VISIBILITY_LABELS.items():
            labels[name] = Label(("layer", *given.dims), given.unit, given.meaning, given.source)
            parts = [getattr(counts, name).int() for counts in self.counts]
            spread = [part.expand(len(at), *part.shape) for part, at in zip(parts, self.places, strict=True)]
            values[name] = self._side_by_side(labels[name].dims, spread, 0)
        return values, labels

    def _finished(self, statistic: Statistic, group: Group, at: int) -> Tensor:
        counts, shard = self.counts[at], self.origin.shard
        tensor = group.raw[statistic.name].to(self.device)
        if shard is not None and "head" in statistic.dims:
            tensor = shard.gather_heads(tensor, statistic.dims.index("head"), self.heads, self.num_heads)
        tensor = (
            grow(statistic, tensor, group.length, self.length, self.config) if "key" not in statistic.dims else tensor
        )
        tensor = finished(statistic, tensor, counts.of_heads(list(self.heads)), self.config)
        if statistic.of_distance and counts.direction == "cross":
            return torch.full_like(tensor, statistic.none)
        return mark_padding(statistic, tensor, counts)

    def _side_by_side(self, dims: tuple[str, ...], parts: Sequence[Tensor], none: float) -> Tensor:
        """Parts of the layers in one tensor: queries end together, keys lie at their positions, heads begin together."""
        sizes = [max(part.shape[axis] for part in parts) for axis in range(len(dims))]
        sizes[0] = len(self.layers)
        if "key" in dims:
            sizes[dims.index("key")] = self.stop_key - self.first_key
        whole = parts[0].new_full(sizes, none)
        for part, counts, places in zip(parts, self.counts, self.places, strict=True):
            spans: list[slice[int, int, None]] = []
            for axis, dim in enumerate(dims[1:], 1):
                begin = 0
                if dim == "query":
                    begin = sizes[axis] - part.shape[axis]
                elif dim == "key":
                    begin = counts.offset - self.first_key
                spans.append(slice(begin, begin + part.shape[axis]))
            for layer, place in enumerate(places):
                if "row" in dims:
                    # A key that this layer no longer had got nothing of the weights.
                    whole[place][tuple(spans[:-1])] = 0
                whole[place][tuple(spans)] = part[layer]
        return whole


def finished(statistic: Statistic, total: Tensor, counts: Counts, config: AttentionStatsConfig) -> Tensor:
    """What a statistic makes of its raw numbers, (layer, batch, …), when all of them are there.

    Raises:
        ValueError: It has other axes than the statistic says.
    """
    if statistic.finish is None:
        return total
    made = statistic.finish(total, counts, config)
    if statistic.name in BUILT_IN:
        return made
    behind = 3 + len(statistic.parts)
    axes = dict(zip(statistic.dims, (*total.shape[:3], *total.shape[behind:]), strict=True))
    return check_returned(statistic, "finish", made, axes, total.dtype)


def mark_padding(statistic: Statistic, tensor: Tensor, counts: Counts) -> Tensor:
    """Put NaN, or −1 in integer statistics, where there is no real token."""
    dims = statistic.dims
    if counts.real is None:
        return tensor
    if "query" in dims:
        real = counts.real_queries
    elif "row" in dims:
        # Rows of padding have been marked when they were measured.
        real = counts.real_keys
    elif "key" in dims:
        real = counts.real_keys if statistic.is_norm else counts.visible_queries > 0
    else:
        return tensor
    shape = [size if dim in ("batch", "query", "key") else 1 for dim, size in zip(dims, tensor.shape, strict=True)]
    hidden, none = ~real.view(shape), statistic.none
    # Sums over queries and norms of keys may have to go on: a key that nobody has seen may be seen by a later forward.
    return tensor.masked_fill(hidden, none) if "key" in dims else tensor.masked_fill_(hidden, none)
