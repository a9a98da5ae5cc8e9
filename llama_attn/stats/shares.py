"""Shares as a person reads them: in tables, titles and sentences."""

from __future__ import annotations

import math

# Shares are sums and differences of float32 numbers up to 1: less than this cannot be told from nothing.
ROUNDING = 1e-6


def percent(share: float, digits: int = 0) -> str:
    """A share in percent, – where there is no data; what is not nothing is never 0 %, and what is not all never 100 %.

    Args:
        share: From 0 to 1.
        digits: Behind the point.
    """
    if not math.isfinite(share):
        return "–"
    written, step = f"{share:.{digits}%}", 10 ** -(digits + 2)
    if share > ROUNDING and written == f"{0:.{digits}%}":
        return f"<{step:.{digits}%}"
    if share < 1 - ROUNDING and written == f"{1:.{digits}%}":
        return f">{1 - step:.{digits}%}"
    return written
