"""What a tensor of numbers is: its axes, its unit, and where its definition comes from."""

from __future__ import annotations

from dataclasses import dataclass

from llama_attn.stats.table import Statistic


@dataclass(frozen=True)
class Label:
    """What a tensor of numbers is.

    Args:
        dims: Names of its axes.
        unit: Unit of its numbers.
        meaning: One line in words.
        source: Where the definition comes from.
    """

    dims: tuple[str, ...]
    unit: str
    meaning: str
    source: str

    @classmethod
    def of(cls, statistic: Statistic) -> Label:
        """The label of an entry of the table."""
        return cls(statistic.dims, statistic.unit, statistic.meaning, statistic.source)


VISIBILITY_LABELS = {
    "visible_keys": Label(("batch", "query"), "keys", "real keys that each query sees", "llama_attn"),
    "visible_queries": Label(("batch", "key"), "queries", "measured queries that see each key", "llama_attn"),
}
# Of the tokens themselves, where segments were given.
SEGMENT_LABELS = {
    "key_segment": Label(("batch", "key"), "segment", "segment of each key, −1 for none", "llama_attn"),
}
