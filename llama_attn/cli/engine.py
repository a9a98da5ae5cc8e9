"""The commands about what runs here: ``llama-attn backends`` and ``build``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.table import Column, Table

from llama_attn.backends.registry import available_backends
from llama_attn.cli.installation import fitted
from llama_attn.cli.terminal import console, fail, say
from llama_attn.engines import _library as library, native

if TYPE_CHECKING:
    import torch

    from llama_attn.stats.container import AttentionStats

BUILD = "on a CPU, streaming runs on the PyTorch engine until `llama-attn build` has compiled the native one, once"
# Named, it is the PyTorch engine that was asked for.
ASKED_FOR = "streaming_torch"


def backends() -> None:
    """Which attention backends run here, and what the others lack."""
    table = Table("backend", "runs here", Column("why not", overflow="fold"))
    for name, reason in available_backends().items():
        table.add_row(name, "no" if reason else "yes", fitted(reason or ""))
    console.print(table)
    say(BUILD if native.unavailable() else f"the native engine runs its library for {library.name()}: {library.path()}")


def how_to_be_faster(stats: AttentionStats, device: torch.device) -> str | None:
    """How to get the native engine, if this run could have had it and did not; else None."""
    could = device.type == "cpu" and stats.backend != ASKED_FOR and "native" not in stats.engine.split("+")
    return BUILD if could and native.unavailable() is not None else None


def build() -> None:
    """Compile the engine for this very processor, which `streaming` then uses; once per machine and version."""
    start = time.perf_counter()
    there = library.own().exists()
    try:
        with console.status("compiling"):
            path = library.build()
    except RuntimeError as error:
        fail(str(error))
    took = "was there already" if there else f"took {time.perf_counter() - start:.0f} s"
    say(f"the native engine {took}: {path}")
