"""Reading the header of a saved file, which anybody may have written.

Nothing is done with a number, a name or a list of it before it has been checked: against its type and range, then
against the tensors, so that what a header says cannot take more memory than the file itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from reprlib import repr as _shown
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama_attn.stats import fields
from llama_attn.stats.fields import MAX_POSITION
from llama_attn.stats.labels import SEGMENT_LABELS, VISIBILITY_LABELS, Label
from llama_attn.stats.table import BUILT_IN, check_dims

if TYPE_CHECKING:
    from llama_attn.stats.container import AttentionStats

FORMAT_VERSION = 2
# An axis may be longer than the tensors have numbers only where it is short: ranks of no query.
SHORT_AXIS = 2**16
FLOATS = (torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def read_header(text: str, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of an `AttentionStats` but its values, each of the right type and in range.

    Args:
        text: JSON, as `AttentionStats.save` writes it.
        values: The tensors of the file.

    Raises:
        ValueError: The message begins with the name of the field.
    """
    try:
        header = json.loads(text)
    except RecursionError:
        raise ValueError("header: nested too deeply") from None
    fields.keys("header", header, _REQUIRED, _OPTIONAL)
    if (version := header.pop("version")) != FORMAT_VERSION:
        raise ValueError(
            f"version: expected format version {FORMAT_VERSION}, got {_shown(version)}; another llama_attn wrote it"
        )
    read: dict[str, Any] = {name: _READERS[name](name, value) for name, value in header.items()}
    fields.keys("labels", read["labels"], set(values), set())
    layers, paths = read["layers"], read.get("paths", ())
    # Of an older file nobody knows.
    if heads := read.get("num_heads", 0):
        fields.below("heads", read["heads"], "num_heads", heads)
    for name in ("layers", "without_attention"):
        fields.below(name, read.get(name, ()), "num_layers", read["num_layers"])
    if paths and len(paths) != len(layers):
        raise ValueError(f"paths: expected one for each of {len(layers)} layers, got {len(paths)}")
    return read


def check_against_tensors(stats: AttentionStats) -> None:
    """Check that what the header said is what the tensors show.

    Raises:
        ValueError: The message begins with the name of the field or of the tensor.
    """
    sizes: dict[str, int] = {}
    most = SHORT_AXIS + sum(tensor.numel() for tensor in stats.values.values())
    for name, tensor in stats.values.items():
        dims = stats.labels[name].dims
        if len(dims) != tensor.ndim:
            raise ValueError(f"{name}: expected the axes {dims}, got shape {tuple(tensor.shape)}")
        for dim, size in zip(dims, tensor.shape, strict=True):
            if size != sizes.setdefault(dim, size) or size > most:
                raise ValueError(f"{name}: {dim} is {size} long, and {min(sizes[dim], most)} elsewhere in the file")
        _check_type(name, tensor)
    keys, queries = stats.keys, stats.queries
    if any(after <= before for before, after in pairwise(queries)):
        raise ValueError(f"selected_queries: expected positions in order, got {_shown(queries)}")
    if keys.stop > MAX_POSITION or 0 < stats.length < keys.stop:
        raise ValueError(f"length: expected 0, or no less than the keys {keys} need, got {stats.length}")
    for dim, coordinate in stats.coordinates().items():
        if sizes.get(dim, len(coordinate)) != len(coordinate):
            raise ValueError(f"{dim}: expected {len(coordinate)} as the header says, got {sizes[dim]} in the tensors")
    # Where both are of one text, every query is a token of it.
    last = MAX_POSITION if stats.direction == "cross" else keys.stop - 1
    if len(queries) and not (min(queries) >= keys.start * (stats.direction != "cross") and max(queries) <= last):
        raise ValueError(f"first_query: expected queries among the keys {keys}, got {_shown(queries)}")
    _check_range("visible_keys", stats.visible_keys, 0, len(keys))
    _check_range("visible_queries", stats.visible_queries, 0, MAX_POSITION)
    if "key_segment" in stats:
        _check_range("key_segment", stats["key_segment"], -1, len(stats.segments or ()) - 1)
    if "topk_position" in stats:
        places = stats["topk_position"]
        _check_range("topk_position", places[places != -1], keys.start, keys.stop - 1)
    if stats.tokens is not None and [len(row) for row in stats.tokens] != [len(keys)] * stats.batch:
        raise ValueError(f"tokens: expected {stats.batch} rows of {len(keys)} strings")


def _check_type(name: str, tensor: Tensor) -> None:
    known = BUILT_IN.get(name)
    counts = name in VISIBILITY_LABELS | SEGMENT_LABELS or (known is not None and known.dtype is not None)
    expected = INTEGERS if counts else FLOATS if known is not None else FLOATS + INTEGERS
    if tensor.dtype not in expected:
        raise ValueError(f"{name}: expected one of {expected}, got {tensor.dtype}")
    if counts:
        _check_range(name, tensor, -1, MAX_POSITION)


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.numel() and not low <= int(tensor.min()) <= int(tensor.max()) <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {int(tensor.min())} to {int(tensor.max())}")


def _positions(name: str, value: Any) -> tuple[int, ...] | None:
    return None if value is None else _row_positions(name, value)


def _row_positions(name: str, value: Any) -> tuple[int, ...]:
    return tuple(fields.integer(name, number) for number in fields.listed(name, value))


def _tokens(name: str, value: Any) -> list[list[str]] | None:
    return None if value is None else [list(fields.texts(name, row)) for row in fields.listed(name, value)]


def _segments(name: str, value: Any) -> tuple[str, ...] | None:
    return None if value is None else fields.texts(name, value)


def _labels(name: str, value: Any) -> dict[str, Label]:
    fields.keys(name, value, set(VISIBILITY_LABELS), None)
    labels: dict[str, Label] = {}
    for statistic, found in value.items():
        label = labels[statistic] = fields.label(f"{name}: {statistic!r}", found)
        if statistic in VISIBILITY_LABELS:
            flat = VISIBILITY_LABELS[statistic].dims
            if label.dims not in (flat, ("layer", *flat)):
                raise ValueError(f"{name}: expected {statistic} of {flat}, alone or by layer, got {_shown(label.dims)}")
        elif (known := SEGMENT_LABELS.get(statistic) or BUILT_IN.get(statistic)) is not None:
            if label.dims != known.dims:
                raise ValueError(f"{name}: expected {statistic} of {known.dims}, got {_shown(label.dims)}")
        else:
            check_dims(statistic, label.dims)
    return labels


_REQUIRED = {"version", "config", "labels", "layers", "heads", "num_layers", "first_query"}
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "config": fields.config, "labels": _labels, "layers": fields.indices, "heads": fields.indices,
    "num_layers": fields.index, "first_query": fields.integer, "tokens": _tokens, "segments": _segments,
    "backend": fields.text, "engine": fields.text, "model": fields.text, "replayed": fields.flag,
    "first_key": fields.integer, "stack": fields.text, "paths": fields.texts, "direction": fields.direction,
    "length": fields.integer, "without_attention": fields.indices, "selected_queries": _positions,
    "rows": _row_positions, "num_heads": fields.index, "num_kv_heads": fields.index,
}  # fmt: skip
_OPTIONAL = set(_READERS) - _REQUIRED
