"""Check mode: every benchmark runs once, on shapes that take no time, and leaves no number.

``LLAMA_ATTN_BENCH=check``, as ``make bench-check`` sets it; a process that a benchmark starts sees it too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

CHECK = os.environ.get("LLAMA_ATTN_BENCH") == "check"
Size = TypeVar("Size")


def shrunk(number: int) -> int:
    """Tokens, or whatever else a benchmark has many of: a thirty-second of them in check mode."""
    return max(number // 32, 1) if CHECK else number


def none(rounds: int) -> int:
    """How often to warm up; not at all in check mode."""
    return 0 if CHECK else rounds


def once(rounds: int) -> int:
    """How often; once in check mode."""
    return 1 if CHECK else rounds


def last(sizes: Sequence[Size]) -> Sequence[Size]:
    """Sizes that differ in nothing but how long they take; in check mode, where none takes any, the last of them."""
    return sizes[-1:] if CHECK else sizes
