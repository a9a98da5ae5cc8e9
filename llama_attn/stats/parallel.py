"""Tensor parallelism: every process holds some heads of each layer, and the statistics of all of them are wanted.

Each process measures its own heads, and one collective per statistic brings them together when the forward is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule


class HeadShard:
    """The heads that this process holds of every layer: heads are dealt out in order, equally many to each rank.

    Args:
        mesh: One-dimensional device mesh of the processes that share a layer.
    """

    def __init__(self, mesh: Any) -> None:
        self.size: int = mesh.size()
        self.rank: int = mesh.get_local_rank()
        self._mesh = mesh

    @classmethod
    def of_attention(cls, attention: Any) -> HeadShard | None:
        """How the weights of an attention layer split its heads; None if every process holds all of them.

        FSDP shards both along the same axis and puts them together before they are used. Only tensor parallelism
        splits the outputs of the one and the inputs of the other.
        """
        if not are_distributed():
            return None
        layers = (getattr(attention, name, None) for name in ("q_proj", "o_proj"))
        weights: list[Any] = [getattr(layer, "weight", None) for layer in layers]
        outputs, inputs = (getattr(weight, "placements", ()) for weight in weights)
        for axis, (output, given) in enumerate(zip(outputs, inputs, strict=False)):
            if output.is_shard(0) and given.is_shard(1):
                mesh = weights[0].device_mesh
                return cls(mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[axis]])
        return None

    @classmethod
    def is_unknown(cls, attention: Any) -> bool:
        """Whether the weights of a layer that is running are parts, but not by heads as `of_attention` knows them."""
        if not are_distributed() or cls.of_attention(attention) is not None or not _shards(attention.parameters()):
            return False
        # Parts of the layer that FSDP wraps by themselves are put together when they run, and these have not yet.
        units: list[Any] = [part for part in attention.modules() if isinstance(part, FSDPModule)]
        own = {id(weight) for unit in units for weight in unit.parameters()}
        return _shards(weight for weight in attention.parameters() if id(weight) not in own)

    def local(self, heads: Sequence[int], num_heads: int) -> tuple[int, ...]:
        """Which of its own heads this process measures, so that all of ``heads`` are measured somewhere.

        Equally many on every rank, since the collective takes equal shapes: the first stands in where too few or
        none were chosen.
        """
        chosen = self._by_rank(heads, num_heads)
        most = max(map(len, chosen))
        return tuple((chosen[self.rank] + [0] * most)[:most])

    def own(self, tensor: Tensor, axis: int, held: int) -> Tensor:
        """The part of all KV heads that this process holds ``held`` of.

        Raises:
            ValueError: ``tensor`` is not of all of them.
        """
        if tensor.shape[axis] != held * self.size:
            raise ValueError(f"keep: expected 1 or {held * self.size} KV heads, got {tensor.shape[axis]}")
        return tensor.narrow(axis, held * self.rank, held)

    def gather(self, tensor: Tensor, axis: int) -> Tensor:
        """The ``tensor`` of every rank, one behind the other along ``axis``."""
        # An offloaded tensor has to go back to where the processes can exchange it.
        mine = tensor.to(self._mesh.device_type).contiguous()
        every = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(every, mine, group=self._mesh.get_group())
        return torch.cat(every, dim=axis).to(tensor.device)

    def gather_heads(self, tensor: Tensor, axis: int, heads: Sequence[int], num_heads: int) -> Tensor:
        """All of ``heads``, of which each rank has measured its `local` ones along ``axis``."""
        chosen, most = self._by_rank(heads, num_heads), tensor.shape[axis]
        held = num_heads // self.size
        places = [head // held * most + chosen[head // held].index(head % held) for head in heads]
        every = self.gather(tensor, axis)
        return every.index_select(axis, torch.tensor(places, device=every.device))

    def _by_rank(self, heads: Sequence[int], num_heads: int) -> list[list[int]]:
        held = num_heads // self.size
        return [[head % held for head in heads if head // held == rank] for rank in range(self.size)]


def are_distributed() -> bool:
    """Whether there is anybody to hold another part of a weight."""
    return distributed.is_initialized()


def _shards(weights: Iterable[Any]) -> bool:
    """Whether one of them is held in parts."""
    return any(placement.is_shard() for weight in weights for placement in getattr(weight, "placements", ()))
