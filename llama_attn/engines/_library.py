"""The compiled part of the ``native`` engine: where it lies, how it is built, and how it is loaded.

The sources use nothing but the C++ library and OpenMP, so one call of the compiler (GCC 12, clang 15 or newer) builds
them; torch's own OpenMP runtime, already loaded, runs their threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
# What a function returns if there is not enough memory; 0 is success, all else a call that it refuses.
NO_MEMORY = 1
HOW_TO_BUILD = "not built; run `llama-attn build`"


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
            "weight_mass", "grad_output", "grad_query", "grad_key", "grad_value", "grad_position_bias", "shift",
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
        _PACKED.pack_into(self, _OFFSETS[name], data, kind, *extents)


_OFFSETS = {name: getattr(Call, name).offset for name, *_ in Call._fields_}


def compiler() -> str:
    """The C++ compiler: ``$CXX``, or the first one found.

    Raises:
        RuntimeError: There is none.
    """
    names = [named] if (named := os.environ.get("CXX")) else list(COMPILERS)
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise RuntimeError(f"no C++ compiler found; looked for {names}. Install one (`apt install g++`) or set CXX")


@cache
def path() -> Path:
    """Where the library for these sources, torch, flags and this kind of processor lies, built or not."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    # The ABI of Python does not matter: the library does not use it.
    digest.update(repr((_flags(), torch.__version__, platform.machine(), _processor())).encode())
    return _folder() / f"native-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the library, unless it is there already; ``LLAMA_ATTN_CXXFLAGS`` adds flags to the usual ones.

    Raises:
        RuntimeError: There is no compiler, or it refuses; the message holds its own.
    """
    target = path()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Written under another name and renamed, so that nobody loads half a library.
        written = Path(folder) / target.name
        sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
        command = [*shlex.split(compiler()), *_flags(), *sources, "-o", str(written)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr.strip()}")
        written.replace(target)
    return target


@cache
def load(library: Path) -> ctypes.CDLL:
    """The built library with its functions' types declared.

    Raises:
        ImportError: It is not built, or it does not fit this package.
    """
    if not library.exists():
        raise ImportError(HOW_TO_BUILD)
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.llama_attn_forward, loaded.llama_attn_backward):
        function.argtypes, function.restype = (ctypes.POINTER(Call),), ctypes.c_int64
    loaded.llama_attn_call_size.restype = ctypes.c_int64
    if loaded.llama_attn_call_size() != ctypes.sizeof(Call):
        raise ImportError(f"{library} expects calls of another layout; remove it and run `llama-attn build`")
    return loaded


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
    return [*FLAGS, *shlex.split(os.environ.get("LLAMA_ATTN_CXXFLAGS", ""))]


def _folder() -> Path:
    if own := os.environ.get("LLAMA_ATTN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_attn"


def _processor() -> str:
    """What distinguishes processors that share a home folder: their instruction sets."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
