"""Reading a saved summary, which anybody may have written: what its header says, then whether its arrays are that.

The checksum tells of damage and not of malice, since whoever writes a file can write its checksum as well. Every axis has
one length in all arrays, and an axis that nothing has to be stored of is short: so what is made of a file is no more
than some twenty times as large, which is what the empty bins of histograms take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as _shown
from typing import Any

import numpy as np

from llama_attn.corpus.examples import AROUND, NO_TOKEN, SAMPLED
from llama_attn.corpus.statistics import check_statistics, of_heads, of_positions, with_examples
from llama_attn.stats import fields
from llama_attn.stats.fields import MAX_POSITION
from llama_attn.stats.labels import Label
from llama_attn.stats.table import DIMENSIONS
from llama_attn.stats.weight_bins import NUM_WEIGHT_BINS

VERSION = 1
# Fields of `CorpusSummary` that count texts or tokens.
COUNTS = ("texts", "tokens", "cut", "skipped")
# Every count up to here is a float64 too, and a thousand of them add up in int64.
MOST = 2**53
# Arrays that are not of one statistic: their axes, a number for one of that length, and their type.
FORM = {
    "first_key": "layer head 2 int64",
    "roles": "role layer head int64",
    "queries": "layer int64",
    "sinks/keys": "sink 1 int64",
    "sinks/counts": "sink 4 int64",
    "massive/keys": "channel 2 int64",
    "massive/counts": "channel 2 int64",
    "strongest/score": "statistic layer head rank float64",
    "strongest/digest": "statistic layer head rank int64",
    "strongest/file": "statistic layer head rank int32",
    "strongest/line": "statistic layer head rank int64",
    "strongest/position": "statistic layer head rank int32",
    "strongest/start": "statistic layer head rank int32",
    "strongest/ids": f"statistic layer head rank {AROUND} int32",
    "strongest/values": f"statistic layer head rank {AROUND} float16",
    "sample/digest": "text int64",
    "sample/file": "text int32",
    "sample/line": "text int64",
    "sample/ids": "text token int32",
    "sample/means": "text mean layer head float32",
    "sample/position": "text statistic layer head int32",
    "sample/values": f"text statistic layer head {AROUND} float16",
}
# Of each statistic; the rest of a histogram is checked where it is unpacked.
MOMENTS = {
    "count": "int64", "mean": "float64", "m2": "float64", "low": "float64", "high": "float64",
}  # fmt: skip
HISTOGRAM = {"histogram_at": "int64", "histogram": "int64", "bins": "int64"}


def read_header(header: Any) -> dict[str, Any]:
    """The fields of a `CorpusSummary` but its arrays, each of the right type and in range; ``about`` as a dict.

    Args:
        header: JSON, as `CorpusSummary.save` writes it.

    Raises:
        ValueError: The message begins with the name of the field.
    """
    fields.keys("header", header, {"version", "about", "files", "strings", *COUNTS}, set())
    if header["version"] != VERSION:
        raise ValueError(f"version: expected {VERSION}, got {_shown(header['version'])}; another llama_attn wrote it")
    read: dict[str, Any] = {name: fields.integer(name, header[name], MOST) for name in COUNTS}
    if not read["texts"]:
        raise ValueError("texts: expected one or more, got none")
    read["about"] = _about(header["about"])
    read["files"] = _distinct("files", header["files"])
    read["strings"] = dict(_string(pair) for pair in fields.listed("strings", header["strings"]))
    return read


def check_arrays(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Check that there are the arrays that the header speaks of, and no others, of the right type, shape and range.

    Args:
        header: What `read_header` returns.
        arrays: By their names in the file.

    Raises:
        ValueError: The message begins with the name of the array.
    """
    about = header["about"]
    expected = {array.name: array for array in _expected(about["labels"])}
    fields.keys("arrays", dict(arrays), {*expected}, set())
    layers, heads = len(about["layers"]), len(about["heads"])
    sizes = {
        "layer": layers, "head": heads, "hidden_layer": layers + 1, "role": len(about["roles"]),
        "mean": len(about["scores"]), "statistic": len(about["examples_of"]), "weight_bin": NUM_WEIGHT_BINS,
        "text": min(header["texts"], SAMPLED),
    }  # fmt: skip
    # What merging or a coordinate is made for, whether anything is stored of it or not.
    most = {
        "rank": about["examples"], "token": max(about["max_tokens"], 1),
        "position_bin": max(about["max_tokens"], 1).bit_length(),
    }  # fmt: skip
    for name, array in expected.items():
        found = arrays[name]
        if found.dtype != array.dtype or found.ndim != len(array.dims):
            raise ValueError(f"{name}: expected {array.dtype} of {array.dims}, got {found.dtype} of {found.shape}")
        for dim, size in zip(array.dims, found.shape, strict=True):
            if size != (known := int(dim) if dim.isdecimal() else sizes.setdefault(dim, size)):
                raise ValueError(f"{name}: expected {known} along {dim!r}, got {size}")
            if not (dim in ("position_bin", "token")) <= size <= most.get(dim, size):
                raise ValueError(f"{name}: expected at most {most[dim]} along {dim!r}, and not none, got {size}")
        _check_range(name, found, len(header["files"]), sizes.get("token", 1))
    if (arrays["queries"] < 1).any():
        raise ValueError("queries: expected some of every layer")


@dataclass(frozen=True)
class _Array:
    name: str
    dims: tuple[str, ...]
    dtype: str


def _expected(labels: Mapping[str, Label]) -> Iterator[_Array]:
    """Every array of a file."""
    for name, form in FORM.items():
        *axes, dtype = form.split()
        yield _Array(name, tuple(axes), dtype)
    for name in ("weight_count", "weight_mass"):
        yield _Array(name, ("layer", "head", "weight_bin") if name in labels else ("0", "0", "weight_bin"), "float64")
    for name, label in of_positions(labels).items():
        cells = tuple(dim for dim in label.dims if dim not in ("batch", "query", "key"))
        for group, dims in (("by_position", (*cells, "position_bin")), ("by_text", cells)):
            for part, dtype in MOMENTS.items():
                yield _Array(f"{group}/{name}/{part}", dims, dtype)
            for part, dtype in HISTOGRAM.items():
                # As many bins as one has numbers in; their number itself is one.
                yield _Array(f"{group}/{name}/{part}", ("1",) if part == "bins" else (f"{group}/{name}",), dtype)


def _check_range(name: str, array: np.ndarray, files: int, tokens: int) -> None:
    part = name.rpartition("/")[2]
    if part == "digest" or not array.size:
        return
    if array.dtype.kind == "f":
        # Statistics themselves may be anything; infinite activations have infinite means.
        if part == "m2" and (array < 0).any():
            raise ValueError(f"{name}: expected no negative number")
        if name.startswith("weight_") and not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"{name}: expected finite numbers that are not negative")
        return
    low, high = {"file": (0, files - 1), "ids": (NO_TOKEN, MAX_POSITION), "keys": (0, MAX_POSITION)}.get(
        part, (0, MOST)
    )
    if name == "sample/position":
        high = tokens - 1
    if not low <= int(array.min()) <= int(array.max()) <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {int(array.min())} to {int(array.max())}")


def _about(value: Any) -> dict[str, Any]:
    fields.keys("about", value, {*_READERS}, set())
    about = {name: read(name, value[name]) for name, read in _READERS.items()}
    labels = about["labels"]
    for name, known in (("scores", of_heads(labels)), ("examples_of", with_examples(labels))):
        if about[name] != known:
            raise ValueError(f"{name}: expected {_shown(known)}, got {_shown(about[name])}")
    for name in ("layers", "heads"):
        if not about[name] or len({*about[name]}) != len(about[name]):
            raise ValueError(f"{name}: expected distinct {name}, got {_shown(about[name])}")
        fields.below(name, about[name], f"num_{name}", about[f"num_{name}"])
    return about


def _labels(name: str, value: Any) -> dict[str, Label]:
    fields.keys(name, value, set(), None)
    labels = {statistic: fields.label(f"{name}: {statistic!r}", label) for statistic, label in value.items()}
    check_statistics(labels)
    _columns(name, (*labels,))
    # What the dataset has besides a statistic's numbers, by names that are made of the statistic's.
    taken = {*(f"{each}_text" for each in labels), *(dim.removesuffix("_bin") for dim in DIMENSIONS), "position"}
    if twice := sorted(taken & {*of_positions(labels)}):
        raise ValueError(f"{name}: names that say something else: {_shown(twice)}")
    return labels


def _config(name: str, value: Any) -> str:
    try:
        config = json.loads(fields.text(name, value))
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply") from None
    fields.config(name, config)
    return str(value)


def _roles(name: str, value: Any) -> tuple[str, ...]:
    return _columns(name, _distinct(name, value))


def _columns(name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that pandas can take: no halves of characters."""
    for each in names:
        if each != each.encode("utf-8", "replace").decode():
            raise ValueError(f"{name}: expected names in UTF-8, got {_shown(each)}")
    return names


def _distinct(name: str, value: Any) -> tuple[str, ...]:
    found = fields.texts(name, value)
    if len({*found}) != len(found):
        raise ValueError(f"{name}: expected distinct names, got {_shown(found)}")
    return found


def _string(pair: Any) -> tuple[int, str]:
    if len(fields.listed("strings", pair)) != 2:
        raise ValueError(f"strings: expected a number and a string, got {_shown(pair)}")
    return fields.integer("strings", pair[0]), fields.text("strings", pair[1])


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "model": fields.text, "weights": fields.text, "config": _config, "labels": _labels, "layers": fields.indices,
    "heads": fields.indices, "num_layers": fields.index, "num_heads": fields.index, "direction": fields.direction,
    "max_tokens": fields.integer, "examples": fields.integer, "scores": fields.texts, "examples_of": fields.texts,
    "roles": _roles,
}  # fmt: skip
