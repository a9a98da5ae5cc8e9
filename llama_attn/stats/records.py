"""The raw numbers of all layers of one forward, or of a run of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llama_attn.stats.table import Statistic, statistics_table


class Records:
    """One tensor per statistic, (layer, …), filled layer by layer.

    A small tensor of each layer, alive among the large blocks that come and go, would keep the memory of these from
    being used again.

    Args:
        layers: Indices of the measured layers, in order.
        num_layers: Layers of the model; this index stands for the last layer's output.
        offload: Device to keep the numbers on; None for that of the layer that comes first.
    """

    def __init__(self, layers: Sequence[int], num_layers: int, offload: str | None) -> None:
        self._places = {layer: place for place, layer in enumerate((*layers, num_layers))}
        self._layers, self._offload = tuple(layers), offload
        self._values: dict[str, Tensor] = {}
        self._reported: set[tuple[str, int]] = set()

    def put(self, layer: int, raw: Mapping[str, Tensor]) -> None:
        """Keep what was measured in ``layer``."""
        for name, tensor in raw.items():
            if name not in self._values:
                count = len(self._layers_of(statistics_table()[name]))
                device = self._offload or tensor.device
                self._values[name] = torch.empty(count, *tensor.shape, dtype=tensor.dtype, device=device)
            self._values[name][self._places[layer]].copy_(tensor.detach())
            self._reported.add((name, layer))

    def put_all(self, raw: Mapping[str, Tensor]) -> None:
        """Keep what was measured in all layers, (layer, …) by statistic."""
        self._values.update(raw)
        for name in raw:
            self._reported.update((name, layer) for layer in self._layers_of(statistics_table()[name]))

    def has(self, name: str, layer: int) -> bool:
        """Whether ``layer`` has reported a statistic."""
        return (name, layer) in self._reported

    def take(self, name: str) -> Tensor:
        """Give away what all layers have reported, (layer, …).

        Raises:
            RuntimeError: A layer did not report, so the numbers would be incomplete.
        """
        layers = self._layers_of(statistics_table()[name])
        if missing := [layer for layer in layers if not self.has(name, layer)]:
            raise RuntimeError(f"{name}: layers {missing} did not report")
        return self._values.pop(name)

    def take_all(self) -> dict[str, Tensor]:
        """Give away every statistic that some layer has reported.

        Raises:
            RuntimeError: Another layer did not.
        """
        return {name: self.take(name) for name in list(self._values)}

    def _layers_of(self, statistic: Statistic) -> tuple[int, ...]:
        return tuple(self._places) if statistic.dims[0] == "hidden_layer" else self._layers
