"""The compiled part of the ``native`` engine: which library runs here, how it is called, and how it is built.

There may be several: those of the wheel, one for each instruction set, and one that `llama-attn build` has compiled for
this very processor. None of them knows torch, so all of them outlive its versions; its OpenMP runtime, already loaded,
runs their threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from llama_attn.engines import _compiler

# What a function returns if there is not enough memory; 0 is success, all else a call that it refuses.
NO_MEMORY = 1
# `kAbi` of csrc/call.h.
ABI = 3
HOW_TO_BUILD = "not built; run `llama-attn build`"
# The library that `llama-attn build` makes, among the instruction sets that $LLAMA_ATTN_ISA can name.
NATIVE = "native"


class Tensor(ctypes.Structure):
    """``Tensor`` of csrc/call.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )


# The types of csrc/call.h.
TYPES = {
    dtype: index
    for index, dtype in enumerate(
        (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int32, torch.int64)
    )
}
FLOATS = frozenset(dtype for dtype in TYPES if dtype.is_floating_point)
# Packed in one go: ctypes takes twice as long, and a token of a model makes hundreds.
_PACKED = struct.Struct("Pqqqqqqqqq")
# Says where the numbers of a tensor lie that is described: ``point(call, OFFSETS[name], address)``.
point = struct.Struct("P").pack_into


class Call(ctypes.Structure):
    """``Call`` of csrc/call.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "batch", "heads", "kv_heads", "num_queries", "num_keys", "channels", "value_channels", "first_query",
            "query_step", "causal", "threads", "tile_rows", "block_keys", "sink_tokens", "window", "logsumexp", "entropy",
            "max_logit", "max_weight", "effective_keys", "sink_mass", "local_mass", "mean_distance", "learned_sink_mass",
            "kept_mass",
        )),
        *((name, ctypes.c_double) for name in ("scaling", "softcap", "hidden_score", "unseen_bias")),
        *((name, Tensor) for name in (
            "query", "key", "value", "output", "mask", "position_bias", "real_keys", "real_queries", "first_key",
            "stop_key", "rank", "kept", "sinks", "row_logsumexp", "rows", "received", "distance_histogram", "weight_count",
            "weight_mass", "row_weights", "row_places", "grad_output", "grad_query", "grad_key", "grad_value",
            "grad_position_bias", "shift",
        )),
        ("message", ctypes.c_char * 256),
    )  # fmt: skip

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Describe ``tensor``, which must live until the call has returned.

        Raises:
            ValueError: A dtype that the library does not know, more than four axes, or no memory of the CPU.
        """
        kind, size = TYPES.get(tensor.dtype), tensor.shape
        # A missing address means that there is no such tensor.
        if kind is None or len(size) > 4 or not tensor.is_cpu or not ((data := tensor.data_ptr()) or 0 in size):
            raise ValueError(
                f"{name}: the native engine takes up to four axes of {sorted(map(str, TYPES))} on the CPU, got "
                f"{tuple(size)} of {tensor.dtype} on {tensor.device}"
            )
        extents = (*size, *tensor.stride())
        if (missing := 4 - len(size)) > 0:
            extents = (*size, *(1,) * missing, *tensor.stride(), *(0,) * missing)
        _PACKED.pack_into(self, OFFSETS[name], data, kind, *extents)


# Where each field lies.
OFFSETS = {name: getattr(Call, name).offset for name, *_ in Call._fields_}


def own() -> Path:
    """Where the library for these sources, flags and this kind of processor lies, built or not."""
    # The ABIs of Python and torch do not matter: the library uses neither.
    name = _compiler.digest(_flags(), platform.machine(), sorted(_compiler.processor_flags()) or platform.processor())
    return _folder() / f"native-{name}.so"


@cache
def choices() -> dict[str, Path]:
    """What $LLAMA_ATTN_ISA can say, best first: ours, built or not, and those of the wheel that this processor runs."""
    able, needed = _compiler.processor_flags(), _compiler.PORTABLE.get(platform.machine(), {})
    brought = {isa: library for isa, library in _compiler.portable().items() if library.exists()}
    return {NATIVE: own(), **{isa: library for isa, library in brought.items() if needed[isa] <= able}}


def name() -> str:
    """Which of the `choices` is used: what $LLAMA_ATTN_ISA says, else the best that there is.

    Raises:
        ValueError: $LLAMA_ATTN_ISA names none of them.
    """
    there = choices()
    if (named := os.environ.get("LLAMA_ATTN_ISA")) is None:
        return next((isa for isa, library in there.items() if library.exists()), NATIVE)
    if named not in there:
        raise ValueError(
            f"LLAMA_ATTN_ISA: expected one of {list(there)}, those of this installation that this processor runs, got {named!r}"
        )
    return named


def path() -> Path:
    """The library that is used, built or not.

    Raises:
        ValueError: As `name`.
    """
    return choices()[name()]


def build() -> Path:
    """Compile `own`, unless it is there already; ``LLAMA_ATTN_CXXFLAGS`` adds flags to the usual ones.

    Raises:
        RuntimeError: There is no compiler, or it refuses; the message holds its own.
    """
    target = own()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compiler.compile_library(target, _flags())
    return target


@cache
def load(library: Path) -> ctypes.CDLL:
    """A library with its functions' types declared.

    Raises:
        ImportError: It is not built, the system cannot load it, or it does not fit this package.
    """
    if not library.exists():
        raise ImportError(HOW_TO_BUILD)
    try:
        loaded = _open(library)
        forward, backward = loaded.llama_attn_forward, loaded.llama_attn_backward
        said = [loaded.llama_attn_abi, loaded.llama_attn_call_size]
    except (OSError, AttributeError) as error:
        raise ImportError(f"{library} cannot be loaded ({error}); `llama-attn build` compiles another") from None
    for function in said:
        function.restype = ctypes.c_int64
    for function in (forward, backward):
        function.argtypes, function.restype = (ctypes.POINTER(Call),), ctypes.c_int64
    found, expected = [function() for function in said], [ABI, ctypes.sizeof(Call)]
    if found != expected:
        raise ImportError(
            f"{library} takes calls of ABI {found[0]} and {found[1]} bytes, expected ABI {expected[0]} and {expected[1]} "
            "bytes; remove it and run `llama-attn build`"
        )
    return loaded


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        # The OpenMP runtime that it lacks is torch's, which its wheels for ARM load without showing it to others.
        for runtime in _openmp_of_torch():
            ctypes.CDLL(runtime, mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
        return ctypes.CDLL(str(library))


def _openmp_of_torch() -> list[str]:
    """Where it lies, if this process has loaded it; nothing on systems that do not say."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(errors="replace").splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines}
    return sorted(path for path in paths if "torch" in path and "gomp" in Path(path).name)


def run(function: str, call: Call) -> None:
    """Run ``"forward"`` or ``"backward"``.

    Raises:
        ValueError: A tensor has not the extents that the call says, or a number is out of range.
        MemoryError: There is not enough memory.
    """
    outcome = _entry(function)(call)
    if outcome:
        raise (MemoryError if outcome == NO_MEMORY else ValueError)(call.message.decode())


@cache
def _entry(function: str) -> Callable[[Call], int]:
    entry: Callable[[Call], int] = getattr(load(path()), f"llama_attn_{function}")
    return entry


def _flags() -> list[str]:
    return ["-march=native", *shlex.split(os.environ.get("LLAMA_ATTN_CXXFLAGS", ""))]


def _folder() -> Path:
    if own := os.environ.get("LLAMA_ATTN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_attn"
