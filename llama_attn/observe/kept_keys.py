"""Which keys are left to a query: what `block_keys` is given, as one question of positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor

from llama_attn.stats.integers import as_integer

FORMS = (
    "positions (integers from 0 up, or a slice of them), or a bool mask, True = may be seen: (batch, key), "
    "(batch, query, key) or (layer, batch, kv_head, key)"
)
AXES = {
    2: ("batch", "key"),
    3: ("batch", "query", "key"),
    4: ("layer", "batch", "kv_head", "key"),
}


@dataclass(frozen=True, eq=False)
class KeptKeys:
    """Which keys may be seen, by position in the row.

    Args:
        mask: True where a key may be seen, (layer, batch, kv_head, query, key), with 1 for axes that do not matter;
            None for ``blocked``. Positions beyond its length may be seen.
        blocked: Positions that may not be seen, perhaps without an end; looked at without a mask.
        layers: Index of each layer of the mask; None if it has no such axis.
        axes: What the mask was given for.
    """

    mask: Bool[Tensor, "layer batch kv_head query key"] | None
    blocked: slice | None = None
    layers: tuple[int, ...] | None = None
    axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, keys: Any) -> KeptKeys:
        """What a user gave.

        Raises:
            ValueError: It is none of `FORMS`, or a mask that leaves some row no key at all.
        """
        if isinstance(keys, slice):
            return cls(None, _read_slice(keys))
        if hasattr(keys, "dims") and hasattr(keys, "to_numpy"):
            return cls._of_labelled(keys)
        if isinstance(keys, Tensor) and keys.dtype == torch.bool:
            if keys.ndim not in AXES:
                raise ValueError(f"keys: expected {FORMS}, got a mask of shape {tuple(keys.shape)}")
            return cls._of_mask(keys, AXES[keys.ndim], None)
        return cls._of_positions(keys)

    @classmethod
    def _of_positions(cls, keys: Any) -> KeptKeys:
        given = keys.tolist() if hasattr(keys, "tolist") else keys
        try:
            positions = list(map(as_integer, given if isinstance(given, Iterable) else (given,)))
        except TypeError:
            positions = []
        if not positions or min(positions) < 0:
            raise ValueError(f"keys: expected {FORMS}, got {keys!r}")
        kept = torch.ones(max(positions) + 1, dtype=torch.bool)
        kept[positions] = False
        return cls(kept.view(1, 1, 1, 1, -1))

    @classmethod
    def _of_mask(cls, mask: Tensor, axes: tuple[str, ...], layers: tuple[int, ...] | None) -> KeptKeys:
        whole = ("layer", "batch", "kv_head", "query", "key")
        placed = mask.reshape([mask.shape[axes.index(axis)] if axis in axes else 1 for axis in whole])
        if not placed.numel():
            raise ValueError(f"keys: expected {FORMS}, got an empty mask of shape {tuple(mask.shape)}")
        if "layer" in axes and layers is None:
            layers = tuple(range(len(placed)))
        return cls(placed, layers=layers, axes=axes)

    @classmethod
    def _of_labelled(cls, keys: Any) -> KeptKeys:
        """A ``DataArray`` with some of these dimensions, its layers and keys named by their coordinates."""
        axes = next((axes for axes in AXES.values() if set(axes) == set(keys.dims)), None)
        if axes is None or keys.dtype != bool:
            raise ValueError(
                f"keys: expected a bool DataArray with the dimensions {' or '.join(map(str, AXES.values()))}, got "
                f"{keys.dtype} with {tuple(keys.dims)}"
            )
        keys = keys.transpose(*axes)
        mask = torch.from_numpy(keys.to_numpy().copy())
        for axis in ("query", "key"):
            if axis in axes and axis in keys.coords:
                mask = _at_positions(mask, axes.index(axis), keys[axis].to_numpy().tolist(), axis)
        has_layers = "layer" in axes and "layer" in keys.coords
        return cls._of_mask(mask, axes, tuple(keys["layer"].to_numpy().tolist()) if has_layers else None)

    def check(self, num_layers: int, is_shared: bool) -> None:
        """Refuse a mask of other layers.

        Raises:
            ValueError: It has more layers than there are, or fewer without saying which.
        """
        if self.layers is None or self.mask is None or is_shared:
            return
        if max(self.layers) >= num_layers or (len(self.layers) != num_layers and self._are_counted):
            raise ValueError(
                f"keys: expected a mask (layer, batch, kv_head, key) of {num_layers} layers, got one of "
                f"{len(self.layers)}; a DataArray may name fewer in its coordinate layer"
            )

    @property
    def _are_counted(self) -> bool:
        return self.layers == tuple(range(len(self.layers or ())))

    @property
    def hide_some(self) -> bool:
        """Whether any key is named that may not be seen; a mask may be True everywhere."""
        return self.mask is None or not bool(self.mask.all())

    def row_without_any(self) -> int | None:
        """A row of the batch whose queries, some of them, are left no key at all; None if there is none."""
        if self.mask is None or "batch" not in self.axes:
            return None
        empty = (~self.mask.any(-1)).any(-1).any(-1).any(0)
        return int(empty.nonzero()[0]) if bool(empty.any()) else None

    def seen(
        self,
        layer: int,
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " key"],
        shape: tuple[int, int, int],
        kv_part: tuple[int, int] = (0, 1),
    ) -> Bool[Tensor, "_ _ _ key"] | None:
        """Which of some keys may be seen, with 1 for axes that do not matter; None if all.

        Args:
            layer: Index of the layer.
            queries: Positions of the queries [token].
            keys: Positions of the keys [token].
            shape: Rows, query heads and KV heads of the call.
            kv_part: Which of several equal parts of the KV heads the call holds, and of how many.

        Raises:
            ValueError: The mask is of other rows or KV heads.
        """
        if self.mask is None or self.blocked is not None:
            start, stop, step = (
                (self.blocked.start, self.blocked.stop, self.blocked.step) if self.blocked else (0, 0, 1)
            )
            hidden = (keys >= start) & ((keys - start) % step == 0)
            return ~(hidden if stop is None else hidden & (keys < stop)).view(1, 1, 1, -1)
        if self.layers is not None and layer not in self.layers:
            return None
        batch, heads, kv_heads = shape
        mask = self.mask[0 if self.layers is None else self.layers.index(layer)].to(keys.device)
        rank, parts = kv_part
        if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, kv_heads * parts):
            raise ValueError(
                f"keys: expected a mask of batch {batch} (or 1) and {kv_heads * parts} KV heads (or 1) for layer {layer}, "
                f"got {tuple(self.mask.shape[axis] for axis in (1, 2))}"
            )
        if mask.shape[1] > 1:
            own = mask[:, rank * kv_heads : (rank + 1) * kv_heads]
            mask = repeat(own, "batch kv_head query key -> batch (kv_head group) query key", group=heads // kv_heads)
        mask = _picked(mask, keys, 3)
        return _picked(mask, queries, 2) if "query" in self.axes else mask


def _picked(mask: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Entries at these positions along an axis, True beyond its end."""
    length = mask.shape[axis]
    beyond = (positions >= length).view([-1 if at == axis else 1 for at in range(mask.ndim)])
    return mask.index_select(axis, positions.clamp(max=length - 1)) | beyond


def _at_positions(mask: Tensor, axis: int, positions: list[int], name: str) -> Tensor:
    """Entries put at their positions along an axis, True elsewhere."""
    if not all(type(p) is int and p >= 0 for p in positions) or len(set(positions)) < len(positions):
        raise ValueError(
            f"keys: expected positions from 0 up, each once, in the coordinate {name}, got {positions[:8]}"
        )
    placed = mask.new_ones([max(positions) + 1 if at == axis else size for at, size in enumerate(mask.shape)])
    return placed.index_copy(axis, torch.tensor(positions), mask)


def _read_slice(keys: slice) -> slice:
    start, step = (given if given is not None else missing for given, missing in ((keys.start, 0), (keys.step, 1)))
    numbers = (start, step) if keys.stop is None else (start, step, keys.stop)
    if not all(type(number) is int and number >= 0 for number in numbers) or step < 1:
        raise ValueError(
            f"keys: expected a slice of positions from 0 up, as the end of the row is not known, got {keys}"
        )
    return slice(start, keys.stop, step)
