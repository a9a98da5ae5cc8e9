"""Statistics of several texts as if they had been one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama_attn.stats.labels import SEGMENT_LABELS, VISIBILITY_LABELS, Label

if TYPE_CHECKING:
    from llama_attn.stats.container import AttentionStats

# What the rows of one batch have in common, by its name in `AttentionStats`.
COMMON = (
    "config", "layers", "heads", "num_layers", "first_query", "first_key", "model", "stack", "paths", "direction",
    "without_attention", "selected_queries", "num_heads", "num_kv_heads",
)  # fmt: skip
MAP_BINS = ("query_bin", "key_bin")


def joined(parts: Sequence[AttentionStats], dim: str) -> AttentionStats:
    """What `AttentionStats.concat` returns, with its arguments and errors."""
    if dim != "batch":
        raise ValueError(f"dim: expected 'batch', the one axis that texts follow one another along, got {dim!r}")
    parts = [*parts]
    first = _checked(parts)
    names = tuple(dict.fromkeys(name for part in parts for name in part.segments or ()))
    rows = tuple(sorted({row for part in parts for row in part.rows}))
    labels = dict(first.labels)
    for name, label in VISIBILITY_LABELS.items():
        if any("layer" in part.labels[name].dims for part in parts):
            labels[name] = replace(label, dims=("layer", *label.dims))
    growing = ("query", "key", *MAP_BINS, "distance_bin")
    sizes = {dim: max(_size(part, dim) for part in parts) for dim in growing}
    values = {}
    for name, label in labels.items():
        laid_out = [_widened(part, name, label, sizes, names, rows) for part in parts]
        device = laid_out[0].device
        values[name] = torch.cat([tensor.to(device) for tensor in laid_out], label.dims.index("batch"))
    tokens = [row + [""] * (sizes["key"] - len(row)) for part in parts for row in part.tokens or ()]
    return replace(
        first,
        values=values,
        labels=labels,
        config=replace(first.config, segments=None, keep=None),
        tokens=tokens or None,
        segments=names or None,
        rows=rows,
        length=max(part.length or part.keys.stop for part in parts),
        backend=_all(part.backend for part in parts),
        engine=_all(part.engine for part in parts),
        replayed=any(part.replayed for part in parts),
    )


def _checked(parts: list[Any]) -> AttentionStats:
    """The first of the parts, once they are known to fit one another."""
    if not parts or any(not hasattr(part, "labels") or not hasattr(part, "values") for part in parts):
        found = [type(part).__name__ for part in parts]
        raise ValueError(f"stats: expected a list of at least one AttentionStats, got {found}")
    first: AttentionStats = parts[0]
    for at, part in enumerate(parts[1:], 1):
        if set(part.values) != set(first.values):
            missing, more = sorted(set(first.values) - set(part.values)), sorted(set(part.values) - set(first.values))
            raise ValueError(
                f"stats[{at}]: expected the statistics of stats[0]; it lacks {missing} and has {more} beside"
            )
        for name in COMMON:
            expected, got = getattr(first, name), getattr(part, name)
            if expected != got:
                raise ValueError(f"stats[{at}]: expected {name} as in stats[0], {expected!r}, got {got!r}")
        if (part.tokens is None) != (first.tokens is None):
            raise ValueError(f"stats[{at}]: expected token strings in all or in none; with_tokens gives them")
        for name in first.values:
            if name not in VISIBILITY_LABELS and part.labels[name].dims != first.labels[name].dims:
                raise ValueError(
                    f"stats[{at}]: expected {name} of {first.labels[name].dims}, got {part.labels[name].dims}"
                )
    widths = {part.config.bin_width(part.length or part.keys.stop) for part in parts}
    maps = [name for name in first.values if set(MAP_BINS) & set(first.labels[name].dims)]
    if maps and len(widths) > 1:
        raise ValueError(
            f"stats: the bins of {maps} are {sorted(widths)} tokens wide, and cannot be laid over one another; measure "
            "without maps, or with a map_size that holds every token of the longest text"
        )
    return first


def _widened(
    part: AttentionStats,
    name: str,
    label: Label,
    sizes: dict[str, int],
    segments: tuple[str, ...],
    rows: tuple[int, ...],
) -> Tensor:
    """One statistic of one part, laid out for the whole: padded behind its end as padding is."""
    tensor = part[name]
    if "layer" in label.dims and "layer" not in part.labels[name].dims:
        tensor = tensor.expand(len(part.layers), *tensor.shape)
    if name in SEGMENT_LABELS:
        places = [segments.index(own) for own in part.segments or ()]
        renamed = torch.tensor([*places, -1], dtype=tensor.dtype, device=tensor.device)
        tensor = renamed[tensor.long()]
    for axis, dim in enumerate(label.dims):
        if dim == "segment":
            # No token of a segment that the text does not have, and no attention on it; padding stays what it is.
            whole = tensor[..., :1] * 0
            columns = {own: tensor.select(axis, at) for at, own in enumerate(part.segments or ())}
            tensor = torch.stack([columns.get(own, whole.select(axis, 0)) for own in segments], axis)
        elif dim == "row":
            index = {row: at for at, row in enumerate(part.rows)}
            none = torch.full_like(tensor.select(axis, 0), _padding(name, tensor))
            tensor = torch.stack([tensor.select(axis, index[row]) if row in index else none for row in rows], axis)
        elif dim in sizes and sizes[dim] > tensor.shape[axis]:
            more = sizes[dim] - tensor.shape[axis]
            if dim == "distance_bin" or (dim == "key_bin" and name == "weights_map"):
                # A query gives nothing to keys that are not there; what has no data stays so.
                behind = (tensor.narrow(axis, 0, 1) * 0).expand(*tensor.shape[:axis], more)
            else:
                shape = [*tensor.shape[:axis], more, *tensor.shape[axis + 1 :]]
                behind = tensor.new_full(shape, _padding(name, tensor))
            tensor = torch.cat([tensor, behind], axis)
    return tensor


def _padding(name: str, tensor: Tensor) -> float:
    """What stands at a token that is padding."""
    if name in VISIBILITY_LABELS:
        return 0
    return torch.nan if tensor.is_floating_point() else -1


def _size(part: AttentionStats, dim: str) -> int:
    """Length of an axis; 0 if nothing has it."""
    lengths = [
        tensor.shape[part.labels[name].dims.index(dim)]
        for name, tensor in part.values.items()
        if dim in part.labels[name].dims
    ]
    return max(lengths, default=0)


def _all(names: Any) -> str:
    return "+".join(dict.fromkeys(part for name in names for part in name.split("+") if part))
