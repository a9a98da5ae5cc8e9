"""Replace what attention heads give, behind the attention call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama_attn.backends._rules import AttentionCall
from llama_attn.observe.forward import Stack
from llama_attn.observe.intervening import Intervening
from llama_attn.stats.integers import as_integer
from llama_attn.stats.parallel import HeadShard

Heads = Mapping[int, Iterable[int] | int | Literal["all"]]
"""Query heads of layers, by the number of the layer."""
MODES = ("zero", "mean")
# What attention layers and configurations call the number of their query heads.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


class Ablation(Intervening):
    """What `ablate_heads` gives: in its ``with`` block the heads are replaced, behind it they are as before."""

    name = "ablate_heads"

    def __init__(
        self,
        module: nn.Module,
        heads: Heads,
        mode: Literal["zero", "mean"] | Tensor,
        stack: str | None,
    ) -> None:
        super().__init__(module, stack)
        self._heads = _read(heads)
        if isinstance(mode, Tensor):
            if mode.ndim not in (2, 3) or not mode.is_floating_point():
                raise ValueError(
                    "mode: expected values of the shape (head, value_channel) or (layer, head, value_channel) for all "
                    f"heads and layers, got {mode.dtype} of shape {tuple(mode.shape)}"
                )
        elif mode not in MODES:
            raise ValueError(f"mode: expected one of {list(MODES)} or a tensor of values, got {mode!r}")
        self._mode = mode
        # Of the call that is being made.
        self._now: tuple[int, tuple[int, ...]] | None = None
        self.refuse_early()

    def wanted_layers(self) -> tuple[int, ...]:
        """The layers that were named."""
        return tuple(self._heads)

    def check(self, stack: Stack) -> None:
        """Refuse layers and heads that are not there, and values of others.

        Raises:
            ValueError: It says which there are.
        """
        # One module that is called for several layers does not show for how many.
        if len(stack.layers) > 1 and (unknown := [layer for layer in self._heads if layer not in stack.indices]):
            raise ValueError(
                f"heads: expected layers of {stack.name!r}, got {unknown}; there are {sorted(stack.indices)}"
            )
        for module, (layer, _) in stack.layers.items():
            # A part of a layer may count its own heads or all of them: its call shows which.
            whole = layer in self._heads and HeadShard.of_attention(module) is None
            if whole and (count := _count_heads(module)) is not None:
                self._check_heads(layer, count)
        if isinstance(self._mode, Tensor) and self._mode.ndim == 3 and len(self._mode) <= max(self._heads):
            raise ValueError(
                f"mode: expected values of all layers up to {max(self._heads)}, got those of {len(self._mode)}"
            )

    def change_call(self, call: AttentionCall, name: str, layer: int) -> AttentionCall:
        """The call as it is; what cannot be done to its output is refused before it is made.

        Raises:
            ValueError: There are no such heads, the values are of another shape, or there is no mean.
        """
        self._now = None
        if layer not in self._heads:
            return call
        module, held = call.module, call.query.shape[1]
        shard = HeadShard.of_attention(module)
        if shard is None and HeadShard.is_unknown(module):
            raise ValueError(
                f"ablate_heads: layer {layer} holds {held} heads of a layer that is split in a way that is not known; "
                "tensor parallelism needs q_proj colwise and o_proj rowwise"
            )
        count, first = (held, 0) if shard is None else (held * shard.size, held * shard.rank)
        self._check_heads(layer, count)
        if isinstance(self._mode, Tensor) and self._mode.shape[-2:] != (count, call.value.shape[-1]):
            raise ValueError(
                f"mode: expected values (…, head={count}, value_channel={call.value.shape[-1]}) for layer {layer}, got "
                f"{tuple(self._mode.shape)}"
            )
        if self._mode == "mean" and call.num_queries == 1:
            raise ValueError(
                'mode: "mean" is over the queries of one call, and this one has a single query, of which the mean is '
                "itself, as in every step of generate; measure a mean before and give it as a tensor (head, value_channel)"
            )
        heads = self._heads[layer]
        chosen = range(first, first + held) if heads is None else heads
        self._now = layer, tuple(head - first for head in chosen if first <= head < first + held)
        return call

    def change_output(
        self, call: AttentionCall, name: str, output: Float[Tensor, "batch query head value_channel"]
    ) -> Float[Tensor, "batch query head value_channel"]:
        """The output, that of the chosen heads replaced; gradients flow to the others and to the values.

        Raises:
            ValueError: The attention function returns something else.
        """
        now, self._now = self._now, None
        if now is None or not now[1]:
            return output
        layer, heads = now
        batch, count, queries, _ = call.query.shape
        if output.shape != (batch, queries, count, call.value.shape[-1]):
            raise ValueError(
                f"ablate_heads: expected an output (batch, query, head, value_channel) = "
                f"{(batch, queries, count, call.value.shape[-1])} under {name!r}, got {tuple(output.shape)}"
            )
        chosen = torch.zeros(count, dtype=torch.bool, device=output.device)
        chosen[list(heads)] = True
        chosen = chosen[:, None]
        if isinstance(self._mode, Tensor):
            values = self._mode if self._mode.ndim == 2 else self._mode[layer]
            shard = HeadShard.of_attention(call.module)
            first = 0 if shard is None else shard.rank * count
            return torch.where(chosen, values[first : first + count].to(output), output)
        if self._mode == "zero":
            return output.masked_fill(chosen, 0.0)
        return torch.where(chosen, self._mean(call, name, output), output)

    def _mean(self, call: AttentionCall, name: str, output: Tensor) -> Tensor:
        """Mean over the real queries of each row, (batch, 1, head, value_channel)."""
        real = self.sight(call, name).real_queries[:, :, None, None]
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        total = torch.where(real, wide, 0.0).sum(1, keepdim=True)
        return (total / real.sum(1, keepdim=True).clamp(min=1)).to(output.dtype)

    def _check_heads(self, layer: int, count: int) -> None:
        if bad := [head for head in self._heads[layer] or () if head >= count]:
            raise ValueError(f"heads: expected heads of layer {layer}, got {bad}; there are 0 to {count - 1}")


def _read(heads: Any) -> dict[int, tuple[int, ...] | None]:
    """Heads by layer; None for all.

    Raises:
        ValueError: It is something else.
    """
    expected = 'heads: expected {layer: "all" or indices of query heads}, from 0 up'
    if not isinstance(heads, Mapping) or not heads:
        raise ValueError(f"{expected}, got {heads!r}")
    read: dict[int, tuple[int, ...] | None] = {}
    for layer, chosen in heads.items():
        try:
            several = chosen if isinstance(chosen, Iterable) and not isinstance(chosen, str) else (chosen,)
            index = as_integer(layer)
            indices = None if isinstance(chosen, str) and chosen == "all" else tuple(map(as_integer, several))
        except TypeError:
            index, indices = -1, None
        if index < 0 or (indices is not None and (not indices or min(indices) < 0)):
            raise ValueError(f"{expected}, got {chosen!r} for layer {layer!r}")
        read[index] = indices
    return read


def _count_heads(module: nn.Module) -> int | None:
    """Query heads of an attention layer, as far as it says so itself."""
    for holder in (module, getattr(module, "config", None)):
        for name in HEAD_COUNTS:
            if type(count := getattr(holder, name, None)) is int:
                return count
    return None
