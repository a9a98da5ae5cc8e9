"""Puts the C++ engine into wheels: compiled for every instruction set of this architecture, where there is a GCC."""

from __future__ import annotations

import platform
import re
import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EngineHook(BuildHookInterface):
    """Compiles into the source tree, which an editable installation runs from; what is there already is kept."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries to the wheel, and to its tag the oldest system that they load on."""
        engines = Path(self.root, "llama_attn", "engines")
        try:
            # Without importing the package: there is no torch here.
            libraries = runpy.run_path(str(engines / "_compiler.py"))["compile_portable"]()
        except RuntimeError as error:
            self.app.display_warning(f"a wheel without the native engine, which `llama-attn build` can add: {error}")
            return
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in libraries]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(libraries)}"


def _platform(libraries: list[Path]) -> str:
    """The platform tag: the newest version of the C library that any of them asks for.

    Source: PEP 600.
    """
    versions = [int(minor) for path in libraries for minor in re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())]
    # Without any it is another C library, which has no such promise.
    system = f"manylinux_2_{max(versions)}" if versions else "linux"
    return f"{system}_{platform.machine()}"
