"""The commands about what runs here: ``llama-attn backends`` and ``build``."""

from __future__ import annotations

import time

from rich.table import Table

from llama_attn.backends.registry import available_backends
from llama_attn.cli.terminal import console, fail
from llama_attn.engines import _library as library


def backends() -> None:
    """Which attention backends run here, and what the others lack."""
    table = Table("backend", "runs here", "why not")
    for name, reason in available_backends().items():
        table.add_row(name, "no" if reason else "yes", reason or "")
    console.print(table)


def build() -> None:
    """Compile the engine for CPUs, which `streaming` then uses; once per machine and version."""
    start = time.perf_counter()
    there = library.path().exists()
    try:
        with console.status("compiling"):
            path = library.build()
    except RuntimeError as error:
        fail(str(error))
    took = "was there already" if there else f"took {time.perf_counter() - start:.0f} s"
    console.print(f"the native engine {took}: {path}", highlight=False, soft_wrap=True)
