"""How long the axes are of what the forms of a statistic return, and whether they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_attn.stats.block import Block, Wanted
from llama_attn.stats.config import bin_width
from llama_attn.stats.maps import num_distance_bins
from llama_attn.stats.table import WHOLE_NUMBERS, Statistic
from llama_attn.stats.visibility import Visibility
from llama_attn.stats.weight_bins import NUM_WEIGHT_BINS


@dataclass(frozen=True)
class Extents:
    """What the lengths of all axes of raw numbers follow from.

    Args:
        batch: Rows of the batch.
        heads: Query heads.
        queries: Measured queries.
        rows: Those whose weights are wanted.
        keys: Keys.
        length: Positions that bins are laid out for [token].
        segments: How many segments there are.
        top_k: Ranks.
        map_size: Bins of a map, at most.
    """

    batch: int
    heads: int
    queries: int
    rows: int
    keys: int
    length: int
    segments: int
    top_k: int
    map_size: int

    @classmethod
    def of_call(cls, query: Tensor, visibility: Visibility, wanted: Wanted) -> Extents:
        """Of what a whole walk gives for the queries, (batch, head, query, channel)."""
        (batch, heads, queries, _), config = query.shape, wanted.config
        return cls(
            batch=batch, heads=heads, queries=queries, rows=queries if wanted.rows is None else len(wanted.rows),
            keys=visibility.num_keys, length=visibility.length, segments=wanted.num_segments, top_k=config.top_k,
            map_size=config.map_size,
        )  # fmt: skip

    @classmethod
    def of_block(cls, block: Block) -> Extents:
        """Of what a streaming form returns for one block."""
        batch, heads, rows = block.scale.shape
        config = block.config
        return cls(
            batch=batch, heads=heads, queries=rows, rows=rows, keys=block.num_keys, length=block.visibility.length,
            segments=block.wanted.num_segments, top_k=config.top_k, map_size=config.map_size,
        )  # fmt: skip

    def axes(self, statistic: Statistic) -> dict[str, int]:
        """The axes behind the layer with their lengths, the parts of a running sum among them."""
        head, *others = ((dim, self._length(dim)) for dim in statistic.dims[2:])
        parts = ((f"part {at}", size) for at, size in enumerate(statistic.parts))
        return dict([("batch", self.batch), head, *parts, *others])

    def shape(self, statistic: Statistic) -> tuple[int, ...]:
        """The same without their names."""
        return tuple(self.axes(statistic).values())

    def _length(self, dim: str) -> int:
        # Bins only where they are asked for: in a graph the length of a static cache is a number that nobody knows.
        if dim in ("query_bin", "key_bin"):
            return -(-self.length // bin_width(self.length, self.map_size))
        if dim == "distance_bin":
            return num_distance_bins(self.length)
        lengths = {
            "head": self.heads, "query": self.queries, "row": self.rows, "key": self.keys, "rank": self.top_k,
            "segment": self.segments, "weight_bin": NUM_WEIGHT_BINS,
        }  # fmt: skip
        return lengths[dim]


def check_returned(
    statistic: Statistic, form: str, returned: object, axes: Mapping[str, int], dtype: torch.dtype
) -> Tensor:
    """What a form of a statistic that somebody has registered returned, if it is what the statistic is said to be.

    Args:
        statistic: The statistic.
        form: What its form is called.
        returned: What came.
        axes: The axes that it should have, with their lengths.
        dtype: Of its floats.

    Raises:
        ValueError: The message has what was expected, and what came.
    """
    shape, dtype = tuple(axes.values()), statistic.dtype or dtype
    found = repr(returned)
    if isinstance(returned, Tensor):
        if (tuple(returned.shape), returned.dtype) == (shape, dtype):
            return returned
        found = f"{tuple(returned.shape)} of {returned.dtype}"
        if statistic.dtype is None and not (returned.is_floating_point() or returned.is_complex()):
            found += "; give counts in the type of what it is given, as .to(block.weights.dtype), whose padding is NaN"
            if returned.dtype in WHOLE_NUMBERS:
                found += f"; of positions say so with Statistic(…, dtype={returned.dtype}), whose padding is −1"
    raise ValueError(
        f"{statistic.name!r}: expected its {form} to return ({', '.join(axes)}) = {shape} of {dtype}, got {found}"
    )
