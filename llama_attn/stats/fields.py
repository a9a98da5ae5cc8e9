"""Fields of the header of a saved file, which anybody may have written: each of the right type and in range.

All take the name of the field, which the ValueError that they raise begins with, and what stands there.
"""

from __future__ import annotations

from collections.abc import Iterable
from reprlib import repr as _shown
from typing import Any

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.labels import Label

# Positions end where those of `topk_position` do, which are int32.
MAX_POSITION = 2**31 - 1
# No model has as many layers, or heads in one of them.
MAX_INDEX = 2**16 - 1


def keys(name: str, found: Any, required: set[str], optional: set[str] | None) -> None:
    """Whether ``found`` has all the required keys and none but the optional ones; None for any."""
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected names and values, got {_shown(found)}")
    if missing := sorted(required - found.keys()):
        raise ValueError(f"{name}: {_shown(missing)} missing")
    if optional is not None and (unknown := sorted(found.keys() - required - optional)):
        raise ValueError(f"{name}: unknown {_shown(unknown)}")


def integer(name: str, value: Any, most: int = MAX_POSITION) -> int:
    """An integer that is not negative."""
    # The type itself, since True is an integer to Python.
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name}: expected an integer from 0 to {most}, got {_shown(value)}")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {_shown(value)}")
    return value


def listed(name: str, value: Any) -> list[Any]:
    """A list of anything."""
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {_shown(value)}")
    return value


def index(name: str, value: Any) -> int:
    """The number of a layer or of a head."""
    return integer(name, value, MAX_INDEX)


def indices(name: str, value: Any) -> tuple[int, ...]:
    """Numbers of layers or of heads."""
    return tuple(index(name, number) for number in listed(name, value))


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of strings."""
    return tuple(text(name, each) for each in listed(name, value))


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {_shown(value)}")
    return value


def direction(name: str, value: Any) -> str:
    """Which keys queries see."""
    if value not in ("causal", "bidirectional", "cross"):
        raise ValueError(f"{name}: expected 'causal', 'bidirectional' or 'cross', got {_shown(value)}")
    return str(value)


def config(name: str, value: Any) -> AttentionStatsConfig:
    """What was asked for, as `AttentionStatsConfig.to_json` writes it."""
    keys(name, value, {"statistics"}, set(AttentionStatsConfig().to_json()))
    if value["statistics"] != "all":
        texts("statistics", value["statistics"])
    for field in ("layers", "heads"):
        if value.get(field) is not None:
            indices(field, value[field])
    return AttentionStatsConfig.from_json(value)


def label(name: str, value: Any) -> Label:
    """What a tensor is."""
    keys(name, value, {"dims", "unit", "meaning", "source"}, set())
    parts = {part: text(f"{name}: {part}", value[part]) for part in ("unit", "meaning", "source")}
    return Label(texts(f"{name}: dims", value["dims"]), **parts)


def below(name: str, numbers: Iterable[int], total_name: str, total: int) -> None:
    """Whether there are as many layers or heads as the highest of some numbers needs."""
    if any(number >= total for number in numbers):
        raise ValueError(f"{name}: expected {name} 0 to {total - 1}, since {total_name} is {total}")
