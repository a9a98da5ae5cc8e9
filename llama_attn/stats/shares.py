"""Shares as a person reads them: in tables, titles and sentences."""

from __future__ import annotations

import math

# Shares are sums and differences of float32 numbers up to 1: less than this cannot be told from nothing.
ROUNDING = 1e-6


def percent(share: float, digits: int = 0) -> str:
    """A share in percent, – where there is no data; what is not nothing is never written as 0 %.

    Args:
        share: From 0 to 1.
        digits: Behind the point.
    """
    if not math.isfinite(share):
        return "–"
    written = f"{share:.{digits}%}"
    return f"<{10 ** -(digits + 2):.{digits}%}" if share > ROUNDING and written == f"{0:.{digits}%}" else written
