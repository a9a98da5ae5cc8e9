"""What counts as an integer."""

from __future__ import annotations

import operator
from typing import Any

import torch


def as_integer(value: Any) -> int:
    """What counts as an integer, as one: Python's, numpy's, an element of a tensor.

    Raises:
        TypeError: It does not, as True and 1.0 do not.
    """
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        raise TypeError(f"expected an integer, got {value!r}")
    return operator.index(value)


def is_integer(value: Any) -> bool:
    """Whether it counts as an integer."""
    try:
        as_integer(value)
    except TypeError:
        return False
    return True
