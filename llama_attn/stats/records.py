"""The raw numbers of all layers of one forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class Records:
    """One tensor per statistic, (layer, …), filled layer by layer.

    A small tensor of each layer, alive among the large blocks that come and go, would keep the memory of these from
    being used again. Layers of another shape (other heads, other keys) are kept by themselves.

    Args:
        expected: How many layers will report.
        offload: Device to keep the numbers on; None for that of the layer that comes first.
    """

    def __init__(self, expected: int, offload: str | None) -> None:
        self._expected, self._offload = max(1, expected), offload
        self._places: dict[str, dict[int, int]] = {}
        self._blocks: dict[str, Tensor] = {}
        self._alone: dict[tuple[str, int], Tensor] = {}

    def put(self, layer: int, raw: Mapping[str, Tensor]) -> None:
        """Keep what was measured in ``layer``."""
        for name, tensor in raw.items():
            block = self._blocks.get(name)
            if block is None:
                device = self._offload or tensor.device
                block = torch.empty(self._expected, *tensor.shape, dtype=tensor.dtype, device=device)
                self._blocks[name], self._places[name] = block, {}
            places = self._places[name]
            if block.shape[1:] != tensor.shape or block.dtype != tensor.dtype:
                self._alone[name, layer] = tensor.detach().to(block.device)
                continue
            if len(places) == len(block):
                block = self._blocks[name] = torch.cat([block, torch.empty_like(block)])
            block[places.setdefault(layer, len(places))].copy_(tensor.detach())

    def has(self, name: str, layer: int) -> bool:
        """Whether ``layer`` has reported a statistic."""
        return layer in self._places.get(name, ()) or (name, layer) in self._alone

    @property
    def names(self) -> tuple[str, ...]:
        """Statistics that some layer has reported."""
        return tuple(self._blocks)

    def layers(self, name: str) -> list[int]:
        """Layers that have reported a statistic, in order."""
        return sorted({*self._places.get(name, ()), *(layer for other, layer in self._alone if other == name)})

    def of(self, name: str, layer: int) -> Tensor:
        """What ``layer`` has reported.

        Raises:
            RuntimeError: It did not, so the numbers would be incomplete.
        """
        if (name, layer) in self._alone:
            return self._alone[name, layer]
        if not self.has(name, layer):
            raise RuntimeError(f"{name}: layer {layer} did not report")
        return self._blocks[name][self._places[name][layer]]

    def stacked(self, name: str, layers: Sequence[int]) -> Tensor | None:
        """What ``layers`` have reported, (layer, …); None if their shapes differ.

        Raises:
            RuntimeError: One of them did not report.
        """
        if missing := [layer for layer in layers if not self.has(name, layer)]:
            raise RuntimeError(f"{name}: layers {missing} did not report")
        if any((name, layer) in self._alone for layer in layers):
            parts = [self.of(name, layer) for layer in layers]
            alike = len({(part.shape, part.dtype) for part in parts}) == 1
            return torch.stack(parts) if alike else None
        block, places = self._blocks[name], self._places[name]
        wanted = [places[layer] for layer in layers]
        if wanted == list(range(len(wanted))):
            return block[: len(wanted)]
        return block[wanted]

    def drop(self, names: Iterable[str]) -> None:
        """Forget statistics that some layers could not give."""
        for name in list(names):
            self._blocks.pop(name, None)
            self._places.pop(name, None)
            for key in [key for key in self._alone if key[0] == name]:
                del self._alone[key]
