"""Random changes of a saved file, the same for the same seed: of its bytes, its headers, its arrays."""

from __future__ import annotations

import copy
import random

import numpy as np
from hostile import Parts, changed, format_of, outer_of, places, put, with_outer

JUNK = [
    None, True, False, 0, 1, -1, 2, 7, 23, 24, 31, 2**16, 2**31 - 1, 2**31, 2**40, 2**53, 2**63 - 1, 2**63, 2**70, 10**30,
    0.0, 1.5, -0.5, float("nan"), float("inf"), "", "a", "all", "layer", "head", "query", "key", "position", "weight",
    "cross", "entropy", "x/y", "\x1b[31m", "\ud800", "<script>", "{}", "1e999", [], [0], [0, 1], [[]], ["a"], {}, {"a": 0},
    [2**62] * 2, "BF16", "F8_E4M3", "BOOL", "I64", "F64", "I32", "F16", "U8",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 23, 24, 127, -128, 2**15, 2**31 - 1, -(2**31), 2**53, 2**62, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-320, 6e4, 1e30, 1e300, float("nan"), float("inf"), float("-inf")]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file with one to three changes of one of the kinds."""
    return draw.choice([_bytes, _header, _header, _tensors, _numbers, _numbers, _shapes, _shapes])(data, draw)


def _bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes that are others, missing, or in another place."""
    new = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        # Half of them where the header is.
        at = draw.randrange(len(new) if draw.random() < 0.5 else min(len(new), 4096))
        end = min(len(new), at + draw.choice([1, 1, 8, 64, 4096]))
        what = draw.randrange(4)
        if what == 0:
            new[at] ^= draw.randint(1, 255)
        elif what == 1:
            new[at:end] = draw.randbytes(end - at)
        elif what == 2:
            del new[at : draw.choice([end, len(new)])]
        else:
            new[at:at] = new[at:end]
        if not new:
            break
    return bytes(new)


def _header(data: bytes, draw: random.Random) -> bytes:
    """Anything anywhere in what llama_attn wrote of itself."""

    def change(header):
        for _ in range(draw.randint(1, 3)):
            _replace(header, draw)

    return changed(data, change)


def _tensors(data: bytes, draw: random.Random) -> bytes:
    """Anything anywhere in what safetensors wrote of the tensors."""
    header, rest = outer_of(data)
    tensors = {name: part for name, part in header.items() if name != "__metadata__"}
    for _ in range(draw.randint(1, 2)):
        _replace(tensors, draw)
    return with_outer(tensors | {"__metadata__": header["__metadata__"]}, rest)


def _replace(value, draw: random.Random) -> None:
    """Put junk, something else of it, one more or a neighbour of a number somewhere into a JSON value; or take it out."""
    every = list(places(value))[1:]
    if not every:
        return
    at = draw.choice(every)
    old = value
    for key in at:
        old = old[key]
    what = draw.randrange(6)
    if what == 0 and type(old) is int:
        put(value, at, old + draw.choice([-1, 1, 2**20]))
    elif what == 1:
        other = draw.choice(every)
        found = value
        for key in other:
            found = found[key]
        if other[: len(at)] != at and at[: len(other)] != other:
            put(value, at, copy.deepcopy(found))
    elif what == 2 and isinstance(old, list) and old:
        put(value, at, copy.deepcopy(old + old[: draw.choice([1, len(old)])]))
    elif what == 3 and isinstance(old, (list, dict)) and old:
        old.pop(draw.choice(list(old)) if isinstance(old, dict) else draw.randrange(len(old)))
    elif what == 4 and isinstance(old, dict) and old:
        old[draw.choice(["a", "position", "entropy_text", "x/y", "\x1b[31m", "hidden_top"])] = old.pop(
            draw.choice(list(old))
        )
    else:
        put(value, at, copy.deepcopy(draw.choice(JUNK)))


def _numbers(data: bytes, draw: random.Random) -> bytes:
    """Numbers that are out of range, or any, in the arrays."""
    parts = Parts.of(data)
    for _ in range(draw.randint(1, 3)):
        array = parts.arrays[draw.choice([name for name, array in parts.arrays.items() if array.size])].reshape(-1)
        numbers = FLOATS if array.dtype.kind == "f" else NUMBERS
        chosen = np.array(draw.choice(numbers), dtype=np.float64 if array.dtype.kind == "f" else np.int64)
        with np.errstate(over="ignore"):
            number = chosen.astype(array.dtype)
        at = draw.randrange(len(array))
        array[at : draw.choice([at + 1, at + 1, len(array)])] = number
    return parts.written(format_of(data))


def _shapes(data: bytes, draw: random.Random) -> bytes:
    """Arrays that are longer, shorter, empty, of other types or axes, missing or called otherwise."""
    parts = Parts.of(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        name = draw.choice(list(parts.arrays))
        array, what = parts.arrays[name], draw.randrange(8)
        if not array.size and max(array.shape) > 2**16:
            # No longer axes than that.
            continue
        axis = draw.randrange(max(array.ndim, 1))
        if what == 0 and array.ndim:
            array = np.repeat(array, draw.choice([0, 2, 3]), axis)
        elif what == 1 and array.ndim:
            array = np.moveaxis(np.moveaxis(array, axis, 0)[: array.shape[axis] // 2], 0, axis)
        elif what == 2:
            array = array.astype(
                draw.choice(["int8", "int32", "int64", "float16", "float32", "float64", "uint64", "bool"])
            )
        elif what == 3:
            array = array.swapaxes(0, -1) if array.ndim > 1 else array[None]
        elif what == 4:
            # Nothing is stored of it, and one axis is long.
            shape = [*array.shape]
            if len(shape) > 1:
                shape[axis], shape[axis - 1] = 0, draw.choice([2**16, 10**9, 2**40])
                array = np.empty(shape, array.dtype)
        elif what == 5:
            del parts.arrays[name]
            if not parts.arrays:
                break
            continue
        elif what == 6:
            parts.arrays[draw.choice(["a", name + "/x", *parts.arrays])] = array.copy()
        elif what == 7 and array.ndim:
            array = np.concatenate([array, array.take([0] * min(1, array.shape[axis]), axis)], axis)
        parts.arrays[name] = array
    return parts.written(format_of(data))
