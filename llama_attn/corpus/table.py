"""A table of counts by key, which merges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class Table:
    """Counts of what occurs, each key once, in ascending order.

    Args:
        keys: What is counted, such as (token) or (layer, channel).
        counts: How often, one column for each thing that is counted.
    """

    keys: Int[np.ndarray, "key part"]
    counts: Int[np.ndarray, "key column"]

    @classmethod
    def of(cls, keys: Int[np.ndarray, "row part"], counts: Int[np.ndarray, "row column"]) -> Table:
        """Of rows in any order, where a key may come several times."""
        unique, place = np.unique(keys, axis=0, return_inverse=True)
        total = np.zeros((len(unique), counts.shape[1]), np.int64)
        np.add.at(total, place.reshape(-1), counts)
        return cls(unique.astype(np.int64), total)

    def merged(self, other: Table) -> Table:
        """Of what both have counted."""
        return Table.of(np.concatenate([self.keys, other.keys]), np.concatenate([self.counts, other.counts]))
