"""The raw numbers of all layers of one forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

# Numbers in a tensor that is not worth a place in a block.
SMALL = 2**14


class Raw(Mapping[str, Tensor]):
    """What a layer measured, by statistic, where many of them lie in one tensor.

    A step of decoding has so few numbers that taking each statistic out of it costs more than its attention.

    Args:
        names: Statistics with a number for each query.
        rows: They, one behind another, (statistic, batch, head, query).
        others: The other statistics.
    """

    def __init__(self, names: tuple[str, ...], rows: Tensor, others: dict[str, Tensor]) -> None:
        self.names, self.rows, self.others = names, rows, others

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[self.names.index(name)] if name in self.names else self.others[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self.others

    def __len__(self) -> int:
        return len(self.names) + len(self.others)

    @property
    def is_small(self) -> bool:
        """Whether no statistic is worth a place in a block."""
        return self.rows.numel() < SMALL and all(tensor.numel() < SMALL for tensor in self.others.values())


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
        # By layer, as it came; and the rows of all statistics side by side, (statistic, layer, …), by layers.
        self._raws: dict[int, Raw] = {}
        self._joined: dict[tuple[int, ...], Tensor] = {}

    def put(self, layer: int, raw: Mapping[str, Tensor]) -> None:
        """Keep what was measured in ``layer``."""
        if self._offload is None and isinstance(raw, Raw) and raw.is_small and layer not in self._raws:
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

    def stacked(self, name: str, layers: Sequence[int]) -> Tensor | None:
        """What ``layers`` have reported, (layer, …); None if their shapes differ.

        Raises:
            RuntimeError: One of them did not report, so the numbers would be incomplete.
        """
        if (rows := self._rows(name, layers)) is not None:
            return rows
        alone, places = self._alone.get(name, {}), self._places.get(name, {})
        alone = {**{layer: raw[name] for layer, raw in self._raws.items() if name in raw}, **alone}
        if missing := [layer for layer in layers if layer not in alone and layer not in places]:
            raise RuntimeError(f"{name}: layers {missing} did not report")
        if alone:
            parts = [alone[layer] if layer in alone else self._blocks[name][places[layer]] for layer in layers]
            first = parts[0]
            alike = all(part.shape == first.shape and part.dtype == first.dtype for part in parts)
            return torch.stack(parts) if alike else None
        wanted = [places[layer] for layer in layers]
        if wanted == list(range(len(wanted))):
            return self._blocks[name][: len(wanted)]
        return self._blocks[name][wanted]

    def _rows(self, name: str, layers: Sequence[int]) -> Tensor | None:
        """What layers have reported in one tensor with other statistics, all of them alike; None if they did not."""
        raws = [self._raws.get(layer) for layer in layers]
        first = raws[0]
        if first is None or name not in first.names or name in self._alone:
            return None
        joined = self._joined.get(tuple(layers))
        if joined is None:
            rows = [raw.rows for raw in raws if raw is not None and raw.names == first.names]
            if len(rows) < len(raws) or any(
                part.shape != first.rows.shape or part.dtype != first.rows.dtype for part in rows
            ):
                return None
            joined = self._joined[tuple(layers)] = torch.stack(rows, dim=1)
        return joined[first.names.index(name)]
