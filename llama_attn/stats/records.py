"""The raw numbers of all layers of one forward."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Numbers in a tensor that is not worth a place in a block.
SMALL = 2**14


@dataclass(frozen=True)
class Layout:
    """Where the statistics of a layer lie in its rows of two tables.

    Args:
        names: Those with a number for each query, which fill the first table one behind another.
        shape: Of each of them, (batch, head, query).
        others: Of the others the first number in a row of the second table, and the shape.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    others: Mapping[str, tuple[int, tuple[int, ...]]]
    # Numbers in a row of each table, and whether none of the statistics is worth a place in a block.
    widths: tuple[int, int] = field(init=False)
    is_small: bool = field(init=False)

    def __post_init__(self) -> None:
        ends = [begin + math.prod(shape) for begin, shape in self.others.values()]
        widths = len(self.names) * math.prod(self.shape), max(ends, default=0)
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "is_small", max(widths) < SMALL)

    def cut(self, rows: Tensor | None, others: Tensor | None) -> dict[str, Tensor]:
        """The statistics in rows of the tables, (…, number), as (…, batch, head, …); those of a table that is None are left out."""
        found: dict[str, Tensor] = {}
        if rows is not None and self.names:
            before = rows.shape[:-1]
            apart = rows.view(*before, len(self.names), *self.shape).unbind(len(before))
            found.update(zip(self.names, apart, strict=True))
        if others is not None:
            before = others.shape[:-1]
            for name, (begin, shape) in self.others.items():
                size = math.prod(shape)
                part = others if size == others.shape[-1] else others.narrow(-1, begin, size)
                found[name] = part.view(*before, *shape)
        return found


class Tables:
    """Numbers of several layers, which have a row each.

    Args:
        per_query: Statistics with a number for each query, (row, number).
        others: The others, (row, number).
    """

    __slots__ = ("__weakref__", "both")

    def __init__(self, per_query: Tensor, others: Tensor) -> None:
        self.both = per_query, others


class Raw(Mapping[str, Tensor]):
    """What a layer measured: a row in each of two tables, which other layers may share.

    A step of decoding has so few numbers that making a tensor for each statistic of each layer, and laying those of
    all layers side by side, takes longer than its attention.

    Args:
        tables: Those of all these layers.
        row: Which row it is.
        layout: Where each statistic lies in it.
    """

    __slots__ = ("_cut", "layout", "row", "tables")

    def __init__(self, tables: Tables, row: int, layout: Layout) -> None:
        self.tables, self.row, self.layout = tables, row, layout
        self._cut: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._cut is None:
            self._cut = self.layout.cut(*(table[self.row] for table in self.tables.both))
        return self._cut[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.layout.names
        yield from self.layout.others

    def __len__(self) -> int:
        return len(self.layout.names) + len(self.layout.others)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.names or name in self.layout.others


class Records:
    """One tensor per statistic, (layer, …), filled layer by layer.

    A tensor of each layer, alive among the large blocks that come and go, would keep the memory of these from being
    used again. Layers of another shape (other heads, other keys), and small tensors, of which a step of decoding has
    many, are kept by themselves.

    Args:
        expected: How many layers will report.
        offload: Device to keep the numbers on; None for that of the layer that comes first.
    """

    def __init__(self, expected: int, offload: str | None) -> None:
        self._expected, self._offload = max(1, expected), offload
        self._places: dict[str, dict[int, int]] = {}
        self._blocks: dict[str, Tensor] = {}
        # By statistic and layer.
        self._alone: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
        # By layer, as it came.
        self._raws: dict[int, Raw] = {}

    def put(self, layer: int, raw: Mapping[str, Tensor]) -> None:
        """Keep what was measured in ``layer``."""
        if self._offload is None and isinstance(raw, Raw) and raw.layout.is_small and layer not in self._raws:
            self._raws[layer] = raw
            return
        for name, tensor in raw.items():
            tensor = tensor.detach() if tensor.requires_grad else tensor
            if self._offload is None and tensor.numel() < SMALL:
                self._alone[name][layer] = tensor
                continue
            block = self._blocks.get(name)
            if block is None:
                device = self._offload or tensor.device
                block = torch.empty(self._expected, *tensor.shape, dtype=tensor.dtype, device=device)
                self._blocks[name], self._places[name] = block, {}
            places = self._places[name]
            if block.shape[1:] != tensor.shape or block.dtype != tensor.dtype:
                self._alone[name][layer] = tensor.to(block.device)
                continue
            if len(places) == len(block):
                block = self._blocks[name] = torch.cat([block, torch.empty_like(block)])
            block[places.setdefault(layer, len(places))].copy_(tensor)

    def has(self, name: str, layer: int) -> bool:
        """Whether ``layer`` has reported a statistic."""
        return (
            name in self._raws.get(layer, ())
            or layer in self._alone.get(name, ())
            or layer in self._places.get(name, ())
        )

    def stacked(self, names: Sequence[str], layers: Sequence[int]) -> dict[str, Tensor]:
        """What ``layers`` have reported of each statistic, (layer, …).

        Raises:
            RuntimeError: One of them did not report, so the numbers would be incomplete, or in another shape.
        """
        raws = [self._raws[layer] for layer in layers if layer in self._raws]
        # Looked through once for all statistics.
        joined = _joined(raws) if raws and len(raws) == len(layers) else {}
        return {
            name: joined[name] if name in joined and name not in self._alone else self._gathered(name, layers)
            for name in names
        }

    def _gathered(self, name: str, layers: Sequence[int]) -> Tensor:
        """A statistic of layers that have not all reported in the same way."""
        alone, places = self._alone.get(name, {}), self._places.get(name, {})
        alone = {**{layer: raw[name] for layer, raw in self._raws.items() if name in raw}, **alone}
        if missing := [layer for layer in layers if layer not in alone and layer not in places]:
            raise RuntimeError(f"{name}: layers {missing} did not report")
        if alone:
            parts = [alone[layer] if layer in alone else self._blocks[name][places[layer]] for layer in layers]
            if (stacked := _stacked(parts)) is None:
                raise RuntimeError(f"{name}: layers {list(layers)} report in different shapes")
            return stacked
        wanted = [places[layer] for layer in layers]
        if wanted == list(range(len(wanted))):
            return self._blocks[name][: len(wanted)]
        return self._blocks[name][wanted]


def _joined(raws: Sequence[Raw]) -> dict[str, Tensor]:
    """What all of them have in the same shape, (layer, …) by statistic."""
    layout = raws[0].layout
    if any(raw.layout is not layout and raw.layout != layout for raw in raws):
        return {}
    return layout.cut(_side_by_side(raws, 0), _side_by_side(raws, 1))


def _side_by_side(raws: Sequence[Raw], which: int) -> Tensor | None:
    """Rows of a table, (layer, number); they are one tensor already if they follow one another."""
    first = raws[0]
    table, rows = first.tables.both[which], range(first.row, first.row + len(raws))
    if all(raw.tables is first.tables for raw in raws) and [raw.row for raw in raws] == list(rows):
        return table if len(table) == len(rows) else table[rows.start : rows.stop]
    return _stacked([raw.tables.both[which][raw.row] for raw in raws])


def _stacked(parts: list[Tensor]) -> Tensor | None:
    """Tensors side by side; None if they are not alike."""
    shape, dtype = parts[0].shape, parts[0].dtype
    if any(part.shape != shape or part.dtype != dtype for part in parts):
        return None
    return torch.stack(parts)
