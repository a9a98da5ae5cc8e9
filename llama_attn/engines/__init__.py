"""Engines do the work behind the ``streaming`` backend and measure beside every other one.

An engine is a module of this package with

- ``walk(query, key, value | None, visibility, scoring, wanted, for_backward) -> Walk``,
- ``backward(grad_output, query, key, value, output, logsumexp, visibility, scoring) -> Gradients``,
- ``unavailable() -> str | None``: why it does not run here,
- ``refuses(visibility, scoring) -> str | None``: why it cannot do such a call, and
- ``knows(statistic) -> bool``: whether its walk can take that statistic.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

from torch import device as torch_device

from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import Statistic
from llama_attn.stats.visibility import Visibility

# Every engine, whether it runs here or not. The libraries of `native` lie here as well, and are no names of modules.
ENGINES = tuple(
    module.name
    for module in pkgutil.iter_modules(__path__)
    if module.name.isidentifier() and not module.name.startswith("_")
)
_loaded: dict[str, ModuleType] = {}


def default_engine(device: torch_device) -> str:
    """The engine that works on ``device`` when none is named: ``native`` on a CPU that has it."""
    return "native" if "native" in _loaded and device.type == "cpu" else "torch"


def choose_engine(
    named: str | None,
    visibility: Visibility,
    scoring: Scoring,
    device: torch_device,
    *,
    default: str | None = None,
) -> str:
    """The engine for a call: the one that is named, else ``default`` or that of the device, else ``torch``.

    Raises:
        ValueError: The engine that is named does not exist, or refuses such a call.
        ImportError: It does not run here.
    """
    name = named or default or default_engine(device)
    reason = get_engine(name).refuses(visibility, scoring)
    if reason is None:
        return name
    if named is not None:
        raise ValueError(f"engine: {name!r} refuses this call: {reason}")
    return "torch"


def assign(
    statistics: Sequence[Statistic], device: torch_device, engine: str | None = None
) -> dict[str, tuple[Statistic, ...]]:
    """Which engine measures what: ``engine`` or the default one what it knows, ``torch`` the rest.

    Raises:
        ValueError: There is no such engine.
        ImportError: It does not run here.
    """
    name = engine or default_engine(device)
    chosen = get_engine(name)
    known: list[Statistic] = []
    rest: list[Statistic] = []
    for statistic in statistics:
        (known if chosen.knows(statistic) else rest).append(statistic)
    return {name: tuple(part) for name, part in ((name, known), ("torch", rest)) if part}


def get_engine(name: str) -> ModuleType:
    """The engine called ``name``.

    Raises:
        ValueError: There is no such engine.
        ImportError: It does not run here.
    """
    # Looked up in a plain dict, which torch.compile can read; engines of others' packages load when first asked for.
    if name in _loaded:
        return _loaded[name]
    if name not in ENGINES:
        raise ValueError(f"engine: unknown {name!r}; there are {list(ENGINES)}")
    engine = importlib.import_module(f"{__name__}.{name}")
    if reason := engine.unavailable():
        raise ImportError(f"the engine {name!r} does not run here: {reason}")
    _loaded[name] = engine
    return engine


get_engine("torch")
# Looked for once: while torch.compile traces, nobody reads folders.
if not importlib.import_module(f"{__name__}.native").unavailable():
    get_engine("native")
