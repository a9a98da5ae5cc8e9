"""Saved files with something else in their headers."""

from __future__ import annotations

import json
import struct

FORMAT = "llama_attn.AttentionStats"


def outer_of(data: bytes) -> tuple[dict, bytes]:
    """The JSON header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_outer(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def changed(data: bytes, change) -> bytes:
    """A saved file after ``change`` has been called with what `AttentionStats` wrote of itself."""
    header, rest = outer_of(data)
    ours = json.loads(header["__metadata__"][FORMAT])
    change(ours)
    header["__metadata__"][FORMAT] = json.dumps(ours)
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
