"""The numbers that definitions of statistics depend on."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Parameters(Protocol):
    """What a statistic reads of the configuration, which itself needs the table of statistics."""

    @property
    def sink_tokens(self) -> int:
        """Number of real keys at the start of a sequence that count as the sink [tokens]."""

    @property
    def window(self) -> int:
        """Distances 0 ≤ i − j < window count as local [tokens]."""

    @property
    def top_k(self) -> int:
        """Number of most attended keys kept per query."""

    @property
    def map_size(self) -> int:
        """Largest number of bins along each axis of a map."""

    @property
    def query_stride(self) -> int:
        """Distance of the measured queries [token]."""

    def bin_width(self, num_keys: int) -> int:
        """Tokens per bin of a map of ``num_keys`` tokens."""
