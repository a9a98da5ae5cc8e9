"""Real files of both kinds, changed in any way: what is in them, how they are written again, and what one does first.

A checksum is written anew after every change, as somebody who means harm would.
"""

from __future__ import annotations

import json
import struct
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import corpora
import numpy as np
import torch
from conftest import tiny_model
from safetensors.numpy import load, save

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.corpus import CorpusSummary, store
from llama_attn.stats import formats

IDS = torch.arange(3, 17).view(2, 7)


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [f"<{number}>" for number in ids]


@dataclass
class Parts:
    """A safetensors file, taken apart.

    Args:
        ours: What llama_attn wrote of itself, JSON.
        arrays: The tensors.
    """

    ours: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, data: bytes) -> Parts:
        metadata = outer_of(data)[0]["__metadata__"]
        return cls(json.loads(metadata[format_of(data)]), {name: array.copy() for name, array in load(data).items()})

    def written(self, kind: str) -> bytes:
        """As a whole file again, with the checksum of what is in it."""
        text = json.dumps(self.ours)
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        checksum = {"checksum": store._checksum(text, arrays)} if kind == formats.SUMMARY else {}
        return save(arrays, {kind: text, **checksum})


@cache
def run_file() -> bytes:
    """A run that holds a bit of everything."""
    config = AttentionStatsConfig(
        statistics="all", norms=True, layers=(2, 0), segments=[["a"] * 3 + ["b"] * 4] * 2, top_k=2, map_size=4
    )
    with torch.no_grad():
        stats = tiny_model()(IDS, output_attention_stats=config).attention_stats
    return _saved(stats.with_tokens(Tokenizer(), IDS))


@cache
def corpus_file() -> bytes:
    """A summary of a few texts, of some layers and heads."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora.write(folder / "texts", count=9)
        config = replace(corpora.CONFIG, layers=(2, 0), heads=(1, 4))
        return _saved(corpora.measured(folder / "texts", folder / "run", config=config))


def _saved(stats) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.safetensors"
        stats.save(path)
        return path.read_bytes()


def format_of(data: bytes) -> str:
    """Which of the two kinds of files it is."""
    return next(name for name in (formats.STATS, formats.SUMMARY) if name in outer_of(data)[0]["__metadata__"])


def outer_of(data: bytes) -> tuple[dict, bytes]:
    """The JSON header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_outer(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def changed(data: bytes, change) -> bytes:
    """A saved file after ``change`` has been called with what llama_attn wrote of itself."""
    ours = json.loads(outer_of(data)[0]["__metadata__"][format_of(data)])
    change(ours)
    return with_ours(data, json.dumps(ours))


def with_ours(data: bytes, text: str) -> bytes:
    """A saved file with another text in the place of what llama_attn wrote of itself."""
    header, rest = outer_of(data)
    kind = format_of(data)
    header["__metadata__"][kind] = text
    if kind == formats.SUMMARY:
        header["__metadata__"]["checksum"] = store._checksum(text, load(data))
    return with_outer(header, rest)


def places(value, path=()):
    """The path of everything inside a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def put(value, path, new):
    """Replace what is at ``path``; the JSON value itself if it is empty."""
    if not path:
        return new
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


def look_at(path: Path, kind: str):
    """Load a file and do with it what is done first; all that comes of it."""
    if kind == formats.STATS:
        stats = AttentionStats.load(path)
        dataset = stats.to_xarray()
        part = stats.select(layers=stats.layers[:1], batch=0)
        return repr(stats), stats._repr_html_(), str(part), str(dataset.sizes)
    summary = CorpusSummary.load(path)
    dataset, frame = summary.to_xarray(), summary.to_pandas()
    both = summary.merged(summary)
    return repr(summary), repr(both), str(dataset.sizes), str(frame.shape)
