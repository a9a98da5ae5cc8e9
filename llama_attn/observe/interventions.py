"""Change what attention does, at the attention call: take heads out, or hide keys.

Nothing is written to the model. While the block runs, the call is another one; `llama_attn.record`, around it or in it,
measures what really happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from llama_attn.backends._rules import AttentionCall
from llama_attn.backends.registry import Backend
from llama_attn.observe.forward import Stack
from llama_attn.observe.interface import change, interfaces_of, unchange
from llama_attn.observe.stacks import candidates, is_cross, stack_of
from llama_attn.stats.integers import as_integer
from llama_attn.stats.keep import DIMS

Heads = Mapping[int, Sequence[int] | int | Literal["all"]]
Mode = Literal["zero", "mean"] | Tensor
# Backends that take a mask of queries and keys.
WITH_MASK = ("eager", "sdpa")


class Intervention:
    """A block of code in which the attention layers of a stack do something else.

    Args:
        module: The model, a part of it or a wrapper.
        stack: Which layers, by path with # for numbers; None if there is only one kind.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: There is no such stack, or there are several to choose from.
    """

    def __init__(self, module: nn.Module, stack: str | None) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        self.stack = _stack(module, stack)
        self._interfaces: tuple[Any, ...] = ()
        self._is_open = False

    def __enter__(self) -> Self:
        if self._is_open:
            raise ValueError(f"{type(self).__name__}: this block has been entered already; make another")
        layers = [layer for layer in self.stack.layers if self.concerns(layer)]
        self._interfaces = interfaces_of(layers)
        cross = layers if self.stack.cross else []
        change(layers, self, self._interfaces, cross)
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unchange([layer for layer in self.stack.layers if self.concerns(layer)], self, self._interfaces)
        self._is_open = False

    def concerns(self, layer: nn.Module) -> bool:
        """Whether something changes in an attention layer."""
        return True

    def mask(self, call: AttentionCall, backend: Backend, name: str) -> Any:
        """The mask that the call gets."""
        return call.mask

    def output(self, call: AttentionCall, backend: Backend, output: Tensor) -> Tensor:
        """What the call gives, (batch, query, head, value_channel)."""
        return output


class AblateHeads(Intervention):
    """Puts something else in the place of what some heads give; see `ablate_heads`."""

    def __init__(self, module: nn.Module, heads: Heads, mode: Mode, stack: str | None) -> None:
        super().__init__(module, stack)
        if not isinstance(heads, Mapping) or not heads:
            raise ValueError(f"heads: expected {{layer: heads}}, got {heads!r}")
        indices = {index: layer for layer, (index, _) in self.stack.layers.items()}
        if unknown := [layer for layer in heads if layer not in indices]:
            raise ValueError(f"heads: unknown layers {unknown}; there are {sorted(indices)}")
        self._heads = {indices[layer]: _read_heads(layer, chosen) for layer, chosen in heads.items()}
        for layer, chosen in self._heads.items():
            _check_heads(self.stack.layers[layer][0], chosen, _num_heads(layer))
        if isinstance(mode, Tensor):
            if mode.ndim != 3 or len(mode) != len(indices):
                raise ValueError(
                    f"mode: expected (layer, head, channel) with {len(indices)} layers, got {tuple(mode.shape)}"
                )
        elif mode not in ("zero", "mean"):
            raise ValueError(f'mode: expected "zero", "mean" or a tensor (layer, head, channel), got {mode!r}')
        self._mode = mode
        self._places = {layer: sorted(indices).index(index) for layer, (index, _) in self.stack.layers.items()}

    def concerns(self, layer: nn.Module) -> bool:
        """Whether some of its heads are taken out."""
        return layer in self._heads

    def output(self, call: AttentionCall, backend: Backend, output: Tensor) -> Tensor:
        """The same with other numbers in the chosen heads."""
        chosen, num_heads = self._heads[call.module], output.shape[2]
        _check_heads(self.stack.layers[call.module][0], chosen, num_heads)
        taken = torch.zeros(num_heads, dtype=torch.bool, device=output.device)
        taken[slice(None) if chosen is None else list(chosen)] = True
        return torch.where(taken[:, None], self._instead(call, backend, output), output)

    def _instead(self, call: AttentionCall, backend: Backend, output: Tensor) -> Tensor:
        if isinstance(self._mode, Tensor):
            given = self._mode[self._places[call.module]].to(output)
            if given.shape != output.shape[2:]:
                raise ValueError(
                    f"mode: expected {tuple(output.shape[2:])} heads and channels in layer "
                    f"{self.stack.layers[call.module][0]}, got {tuple(given.shape)}"
                )
            return given
        if self._mode == "zero":
            return output.new_zeros(())
        if output.shape[1] == 1:
            raise ValueError(
                'mode: the mean over one query is that query, so "mean" takes nothing out of a call of one query (as in '
                "generate behind a cache); give a tensor (layer, head, channel) of means that were measured before"
            )
        real = backend.sees(call).real_queries.to(output.device)[:, :, None, None]
        return torch.where(real, output, 0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)


class BlockKeys(Intervention):
    """Hides keys; see `block_keys`."""

    def __init__(self, module: nn.Module, keys: Any, first_query: int, stack: str | None) -> None:
        super().__init__(module, stack)
        try:
            self._first_query = as_integer(first_query)
        except TypeError:
            self._first_query = -1
        if self._first_query < 0:
            raise ValueError(f"first_query: expected a position from 0 up, got {first_query!r}")
        order = sorted(self.stack.indices)
        self._seen, layers = _read_keys(keys, order)
        self._places = {
            layer: layers.index(index) if len(self._seen) > 1 else 0
            for layer, (index, _) in self.stack.layers.items()
            if index in layers
        }
        # The mask of the layer before, which the next may share.
        self._last: tuple[Any, ...] = ()

    def concerns(self, layer: nn.Module) -> bool:
        """Whether some keys are hidden from it."""
        return layer in self._places

    def mask(self, call: AttentionCall, backend: Backend, name: str) -> Any:
        """The mask of the call with the blocked keys hidden as well.

        Raises:
            ValueError: A query has nothing left to see, or the backend takes no such mask.
        """
        if not backend.is_streaming and name not in WITH_MASK:
            raise ValueError(
                f'block_keys: {name!r} takes no mask of queries and keys; use attn_implementation="sdpa", "eager" or '
                '"streaming"'
            )
        key = call.mask, call.query.shape[1:3], call.key.shape[1:3], self._places[call.module]
        if self._last and self._last[0] is key[0] and self._last[1:-1] == key[1:]:
            return self._last[-1]
        made = self._made(call, backend, name)
        self._last = *key, made
        return made

    def _made(self, call: AttentionCall, backend: Backend, name: str) -> Tensor:
        visibility = backend.sees(call)
        num_queries, heads = visibility.num_queries, call.query.shape[1]
        first, stop = visibility.span_of(range(num_queries))
        pairs = torch.zeros(1, 1, num_queries, call.num_slots, dtype=torch.bool, device=call.key.device)
        visible = visibility.visible(range(num_queries))
        pairs = pairs.expand(*visible.shape[:2], -1, -1).clone()
        pairs[..., first:stop] = visible
        seen = pairs & self._allowed(visibility.query_positions + visibility.offset, visibility.offset, call)
        lost = pairs.any(-1) & ~seen.any(-1) & visibility.real_queries[:, None]
        if bool(lost.any()):
            row, _, query = lost.nonzero()[0].tolist()
            at = int(visibility.query_positions[query]) + visibility.offset
            raise ValueError(
                f"keys: query {at} of row {row} has nothing left to see; a query needs one key, for instance itself "
                f"(first_query={at + 1} leaves it what it sees)"
            )
        if isinstance(call.mask, Tensor) and call.mask.is_floating_point():
            least = torch.finfo(call.mask.dtype).min
            return torch.where(seen, call.mask.expand(-1, -1, -1, call.num_slots), least)
        if name == "eager":
            least = torch.finfo(call.query.dtype).min
            return torch.zeros((), dtype=call.query.dtype, device=seen.device).masked_fill(~seen, least)
        return seen.expand(call.query.shape[0], heads if seen.shape[1] > 1 else 1, -1, -1)

    def _allowed(self, queries: Tensor, offset: int, call: AttentionCall) -> Tensor:
        """Whether a query may see a key, (batch or 1, head or 1, query or 1, key)."""
        seen = self._seen[self._places[call.module]].to(call.key.device)
        batch, kv_heads = call.query.shape[0], call.key.shape[1]
        if seen.shape[0] not in (1, batch) or seen.shape[1] not in (1, kv_heads):
            raise ValueError(
                f"keys: expected a mask for batch 1 or {batch} and 1 or {kv_heads} KV heads, got batch {seen.shape[0]} and "
                f"{seen.shape[1]} KV heads"
            )
        missing = offset + call.num_slots - seen.shape[-1]
        seen = torch.nn.functional.pad(seen, (0, max(0, missing)), value=True)[..., offset : offset + call.num_slots]
        if seen.shape[2] > 1:
            later = max(0, int(queries.max()) + 1 - seen.shape[2])
            seen = torch.nn.functional.pad(seen, (0, 0, 0, later), value=True)[:, :, queries]
        if seen.shape[1] > 1:
            seen = seen.repeat_interleave(call.query.shape[1] // kv_heads, dim=1)
        return seen | (queries < self._first_query)[:, None]


def ablate_heads(
    module: nn.Module, heads: Heads, mode: Mode = "zero", *, stack: str | None = None
) -> AblateHeads:  # fmt: skip
    """Take heads out of a model while a block of code runs: what they give is replaced before the output projection.

    Exact on every backend, in forward, generate and training (a backward that runs layers again, as gradient
    checkpointing does, has to be in the block too), nested with others and with `record`. The model itself is not
    touched.

    Args:
        module: Any model that `record` serves, a part of it or a wrapper.
        heads: Query heads by index of the layer, ``"all"`` for every one.
        mode: ``"zero"``; ``"mean"``, what the head gives on average over the real queries of the same row and call; or
            a tensor (layer, head, value_channel) for all layers and heads of the stack, such as means over a corpus.
        stack: Which attention layers, as in `record`; needed where a model has several kinds.

    Raises:
        ValueError: Layers or heads that do not exist, an unknown mode, or, in the block, ``"mean"`` of a single query.

    Example:
        >>> with ablate_heads(model, {3: [1, 4], 7: "all"}):
        ...     model(**inputs)

    Source: Michel et al., arXiv 1905.10650 (zero); Wang et al., arXiv 2211.00593 (mean).
    """
    return AblateHeads(module, heads, mode, stack)


def block_keys(module: nn.Module, keys: Any, *, first_query: int = 0, stack: str | None = None) -> BlockKeys:
    """Hide keys from queries while a block of code runs, as if the model had been given such a mask.

    Args:
        module: Any model that `record` serves, a part of it or a wrapper.
        keys: Positions that are hidden, integers or a slice; or a mask, True for keys that may be seen: (batch, key),
            (batch, query, key), or (layer, batch, kv_head, key), as `keep_mask` makes it. Keys and queries beyond a
            mask are not touched. What the model itself hides stays hidden.
        first_query: Queries before this position see what they always see [token].
        stack: Which attention layers, as in `record`; needed where a model has several kinds.

    Raises:
        ValueError: A mask of another shape or type; in the block, before the layer runs, a query that has nothing left
            to see, or a backend that takes no such mask.

    Example:
        >>> with block_keys(model, [0], first_query=1):  # nobody sees the first token but itself
        ...     model(**inputs)
    """
    return BlockKeys(module, keys, first_query, stack)


def _stack(module: nn.Module, name: str | None) -> Stack:
    found = candidates(module)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no attention that goes through transformers' attention interface, so there is "
            "nothing to change"
        )
    if name is None:
        own = [stack for stack in found if not is_cross(stack)]
        if len(own) != 1:
            raise ValueError(f"stack: {type(module).__name__} has several, choose one of {list(found)}")
        name = own[0]
    if name not in found:
        raise ValueError(f"stack: there is no {name!r}; there are {list(found)}")
    return stack_of(module, found[name])


def _read_heads(layer: int, chosen: Any) -> tuple[int, ...] | None:
    """Indices of heads; None for all."""
    if isinstance(chosen, str) and chosen == "all":
        return None
    try:
        heads = tuple(map(as_integer, chosen if isinstance(chosen, Iterable) else (chosen,)))
    except TypeError:
        heads = ()
    if not heads or min(heads) < 0:
        raise ValueError(f'heads: expected indices from 0 up or "all" for layer {layer}, got {chosen!r}')
    return heads


def _num_heads(layer: nn.Module) -> int | None:
    """How many heads a layer says that it has; None if only its call shows that."""
    config = getattr(layer, "config", None)
    number = getattr(layer, "num_heads", None) or getattr(config, "num_attention_heads", None)
    return number if isinstance(number, int) else None


def _check_heads(layer: int, chosen: tuple[int, ...] | None, num_heads: int | None) -> None:
    if num_heads is not None and (unknown := [head for head in chosen or () if head >= num_heads]):
        raise ValueError(f"heads: unknown {unknown} in layer {layer}, which has heads 0 to {num_heads - 1}")


def _read_keys(keys: Any, order: list[int]) -> tuple[Tensor, list[int]]:
    """What may be seen, (layer or 1, batch or 1, kv_head or 1, query or 1, key), and of which layers it speaks."""
    layers = order
    if getattr(keys, "dims", None) is not None:
        if tuple(keys.dims) != DIMS:
            raise ValueError(f"keys: expected the axes {DIMS}, got {tuple(keys.dims)}")
        layers = [int(layer) for layer in keys["layer"].values]
        keys = torch.as_tensor(keys.values)
    if isinstance(keys, Tensor) and keys.dtype == torch.bool:
        if keys.ndim not in (2, 3, 4) or not keys.numel():
            raise ValueError(f"keys: expected (batch, key), (batch, query, key) or {DIMS}, got {tuple(keys.shape)}")
        if keys.ndim == 4:
            if len(keys) not in (1, len(layers)) or not set(layers) <= set(order):
                raise ValueError(f"keys: expected a mask for the {len(order)} layers {order}, got {len(keys)} layers")
            return keys.detach()[:, :, :, None], layers
        return (keys.detach()[None, :, None, None] if keys.ndim == 2 else keys.detach()[None, :, None]), layers
    return _hidden_at(keys), layers


def _hidden_at(keys: Any) -> Tensor:
    """A mask that hides some positions."""
    try:
        if isinstance(keys, slice):
            positions = (
                list(range(keys.stop)[keys]) if keys.stop is not None and min(keys.start or 0, keys.stop) >= 0 else []
            )
        else:
            positions = list(map(as_integer, keys if isinstance(keys, Iterable) else (keys,)))
    except TypeError:
        positions = []
    if not positions or min(positions) < 0:
        raise ValueError(
            f"keys: expected positions from 0 up, a slice of them with an end, or a mask of booleans, got {keys!r}"
        )
    seen = torch.ones(max(positions) + 1, dtype=torch.bool)
    seen[positions] = False
    return seen.view(1, 1, 1, 1, -1)
