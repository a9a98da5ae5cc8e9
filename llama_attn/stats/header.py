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

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.labels import SEGMENT_LABELS, VISIBILITY_LABELS, Label
from llama_attn.stats.table import BUILT_IN, check_dims

if TYPE_CHECKING:
    from llama_attn.stats.container import AttentionStats

FORMAT_VERSION = 2
# Positions end where those of `topk_position` do, which are int32.
MAX_POSITION = 2**31 - 1
# No model has as many layers, or heads in one of them.
MAX_INDEX = 2**16 - 1
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
    _keys("header", header, _REQUIRED, _OPTIONAL)
    if (version := header.pop("version")) != FORMAT_VERSION:
        raise ValueError(
            f"version: expected format version {FORMAT_VERSION}, got {_shown(version)}; another llama_attn wrote it"
        )
    read: dict[str, Any] = {name: _READERS[name](name, value) for name, value in header.items()}
    _keys("labels", read["labels"], set(values), set())
    highest, layers, paths = read["num_layers"] - 1, read["layers"], read.get("paths", ())
    # Of an older file nobody knows.
    if (heads := read.get("num_heads", 0)) and any(head >= heads for head in read["heads"]):
        raise ValueError(f"heads: expected heads 0 to {heads - 1}, since num_heads is {heads}")
    for name in ("layers", "without_attention"):
        if any(layer > highest for layer in read.get(name, ())):
            raise ValueError(f"{name}: expected layers 0 to {highest}, since num_layers is {highest + 1}")
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


def _keys(name: str, found: Any, required: set[str], optional: set[str] | None) -> None:
    """Whether ``found`` has all the required keys and none but the optional ones; None for any."""
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected names and values, got {_shown(found)}")
    if missing := sorted(required - found.keys()):
        raise ValueError(f"{name}: {_shown(missing)} missing")
    if optional is not None and (unknown := sorted(found.keys() - required - optional)):
        raise ValueError(f"{name}: unknown {_shown(unknown)}")


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


def _integer(name: str, value: Any, most: int = MAX_POSITION) -> int:
    # The type itself, since True is an integer to Python.
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name}: expected an integer from 0 to {most}, got {_shown(value)}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {_shown(value)}")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {_shown(value)}")
    return value


def _index(name: str, value: Any) -> int:
    return _integer(name, value, MAX_INDEX)


def _indices(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_index(name, number) for number in _list(name, value))


def _positions(name: str, value: Any) -> tuple[int, ...] | None:
    return None if value is None else _row_positions(name, value)


def _row_positions(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_integer(name, number) for number in _list(name, value))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(name, text) for text in _list(name, value))


def _tokens(name: str, value: Any) -> list[list[str]] | None:
    return None if value is None else [list(_texts(name, row)) for row in _list(name, value)]


def _segments(name: str, value: Any) -> tuple[str, ...] | None:
    return None if value is None else _texts(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {_shown(value)}")
    return value


def _direction(name: str, value: Any) -> str:
    if value not in ("causal", "bidirectional", "cross"):
        raise ValueError(f"{name}: expected 'causal', 'bidirectional' or 'cross', got {_shown(value)}")
    return str(value)


def _config(name: str, value: Any) -> AttentionStatsConfig:
    _keys(name, value, {"statistics"}, set(AttentionStatsConfig().to_json()))
    if value["statistics"] != "all":
        _texts("statistics", value["statistics"])
    for field in ("layers", "heads"):
        if value.get(field) is not None:
            _indices(field, value[field])
    return AttentionStatsConfig.from_json(value)


def _labels(name: str, value: Any) -> dict[str, Label]:
    _keys(name, value, set(VISIBILITY_LABELS), None)
    labels = {}
    for statistic, label in value.items():
        _keys(f"{name}: {statistic!r}", label, {"dims", "unit", "meaning", "source"}, set())
        dims = _texts(f"{name}: {statistic!r}: dims", label.pop("dims"))
        if statistic in VISIBILITY_LABELS:
            flat = VISIBILITY_LABELS[statistic].dims
            if dims not in (flat, ("layer", *flat)):
                raise ValueError(f"{name}: expected {statistic} of {flat}, alone or by layer, got {_shown(dims)}")
        elif (known := SEGMENT_LABELS.get(statistic) or BUILT_IN.get(statistic)) is not None:
            if dims != known.dims:
                raise ValueError(f"{name}: expected {statistic} of {known.dims}, got {_shown(dims)}")
        else:
            check_dims(statistic, dims)
        labels[statistic] = Label(dims, **{part: _text(f"{name}: {part}", text) for part, text in label.items()})
    return labels


_REQUIRED = {"version", "config", "labels", "layers", "heads", "num_layers", "first_query"}
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "config": _config, "labels": _labels, "layers": _indices, "heads": _indices, "num_layers": _index,
    "first_query": _integer, "tokens": _tokens, "segments": _segments, "backend": _text, "engine": _text,
    "model": _text, "replayed": _flag, "first_key": _integer, "stack": _text, "paths": _texts,
    "direction": _direction, "length": _integer, "without_attention": _indices,
    "selected_queries": _positions, "rows": _row_positions, "num_heads": _index,
    "num_kv_heads": _index,
}  # fmt: skip
_OPTIONAL = set(_READERS) - _REQUIRED
