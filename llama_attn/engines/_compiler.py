"""How csrc/ becomes a library: for the processor at hand, or for every processor of an instruction set, in a wheel.

The sources use nothing but the C++ library and OpenMP, so a compiler (GCC 12, clang 16 or newer) is all it takes.
hatch_build.py runs this file where there is no torch yet, so it imports nothing that Python does not bring.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# The C++ library is inside and OpenMP is not: what GCC calls of it is in torch's own runtime, which is there already
# under whatever name torch gave it. A second runtime would start threads of its own.
LINK_FLAGS = ("-static-libgcc", "-static-libstdc++", "-Wl,--gc-sections")
# By architecture, the instruction sets that wheels bring libraries for, best first, as the compiler calls them, and what
# they take, as /proc/cpuinfo calls it.
#
# Source: System V Application Binary Interface, AMD64 supplement, section 3.1.1.
_V3 = frozenset(
    {
        "cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2",
        "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave",
    }
)  # fmt: skip
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
PORTABLE = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3},
    "aarch64": {"armv8-a": frozenset({"fp", "asimd"})},
}


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


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits of the sources, the flags and ``parts``: other sources have another library."""
    total = hashlib.sha256(repr((FLAGS, LINK_FLAGS, *parts)).encode())
    for source in sorted(SOURCES.iterdir()):
        total.update(source.name.encode() + source.read_bytes())
    return total.hexdigest()[:16]


def processor_flags() -> frozenset[str]:
    """What this processor and its operating system can do, as /proc/cpuinfo has it; nothing where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def portable() -> dict[str, Path]:
    """By instruction set, best first, where the library for it lies in this package, there or not."""
    known = PORTABLE.get(platform.machine(), {}) if sys.platform == "linux" else {}
    return {isa: SOURCES.parent / f"native-{isa}-{digest(isa)}.so" for isa in known}


def compile_portable() -> list[Path]:
    """Compile what `portable` names, unless it is there, and remove what older sources have left.

    Returns:
        The libraries.

    Raises:
        RuntimeError: Nothing is known of such machines, or there is no GCC, or it refuses.
    """
    libraries = portable()
    if not libraries:
        raise RuntimeError(f"no instruction set to compile for: {sys.platform} on {platform.machine()}")
    if not is_gcc(compiler()):
        raise RuntimeError(f"libraries for other machines take GCC, whose OpenMP torch has; got {compiler()}")
    for left in set(SOURCES.parent.glob("native-*.so")).difference(libraries.values()):
        left.unlink()
    missing = {isa: path for isa, path in libraries.items() if not path.exists()}
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_library, missing.values(), [[f"-march={isa}"] for isa in missing]))
    return list(libraries.values())


def compile_library(target: Path, flags: list[str]) -> None:
    """Compile the sources with ``flags`` beside the usual ones.

    Raises:
        RuntimeError: There is no compiler, or it refuses; the message holds its own.
    """
    command = [*shlex.split(compiler()), *FLAGS, *flags]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _run([*command, "-c", *map(str, sorted(SOURCES.glob("*.cpp")))], folder)
        # Written under another name and renamed, so that nobody loads half a library.
        written = Path(folder) / target.name
        objects = map(str, sorted(Path(folder).glob("*.o")))
        link = [*command, "-shared", *objects, "-o", str(written)]
        # clang calls an OpenMP of its own, and only Linux leaves open what is found when the library is loaded.
        if sys.platform == "linux" and is_gcc(compiler()):
            link.remove("-fopenmp")
            link += [*LINK_FLAGS, f"-Wl,--version-script={SOURCES / 'exports.map'}"]
        _run(link, folder)
        written.replace(target)


def is_gcc(command: str) -> bool:
    """Whether this is GCC, which calls the OpenMP that torch has."""
    said = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    return "Free Software Foundation" in said.stdout


def _run(command: list[str], folder: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr.strip()}")
