"""The oracle for any model: what its attention got, captured from transformers, and every statistic in float64.

Nothing here uses the recorder, the engines or `Visibility`: who sees whom comes from the captured mask and the rule of
the backend that ran, positions and padding from what the test fed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import AttentionInterface
from zoo_base import Stack
from zoo_situations import Axis

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
NAMES = ("query", "key", "value", "attention_mask")


@dataclass(eq=False)
class Call:
    """One attention call as the stock model made it.

    Args:
        path: Of the module.
        backend: Name of the implementation.
        query: (batch, head, query, channel).
        key: (batch, kv_head, slot, channel).
        value: (batch, kv_head, slot, value channel).
        mask: As it came.
        kwargs: The rest.
        is_causal: The module's own word on it.
        output: What came out, (batch, query, head, value channel).
        weights: What eager returns beside it.
        request: What was asked of the mask interface for this mask, if it is the one that came out.
        hidden: What entered the layer.
        hidden_out: What left the last layer of the list, filled in when it has run.
    """

    path: str
    backend: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]
    is_causal: bool
    output: Tensor
    weights: Tensor | None
    request: dict[str, Any] | None
    hidden: Tensor | None = None

    @property
    def name(self) -> str:
        return NUMBER.sub("#", self.path)

    @property
    def scaling(self) -> float:
        given = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if given is None else given

    @property
    def sinks(self) -> Tensor | None:
        return self.kwargs.get("s_aux") if self.kwargs.get("s_aux") is not None else self.kwargs.get("sinks")


@dataclass
class Captured:
    """Every call of a run, in order, and what left the last layer of every list."""

    calls: list[Call] = field(default_factory=list)
    last_outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    requests: list[tuple[dict[str, Any], Any]] = field(default_factory=list)

    def of(self, stack: Stack) -> list[list[Call]]:
        """The calls of one stack: a list of layers for every forward."""
        calls = [call for call in self.calls if call.name == stack.path]
        size = len(set(stack.layers)) if stack.shared else len({call.path for call in calls})
        return [calls[start : start + size] for start in range(0, len(calls), size)]


def layer_path(stack: Stack, path: str) -> str:
    """Path of the layer that holds the attention module at ``path``."""
    depth = (stack.layer or stack.path[: stack.path.rindex("#") + 1]).count(".") + 1
    return ".".join(path.split(".")[:depth])


@contextmanager
def capture(model: nn.Module, stacks: tuple[Stack, ...] = ()) -> Iterator[Captured]:
    """Note every attention call of ``model``, which goes on as it would."""
    captured = Captured()
    paths = {module: path for path, module in model.named_modules()}
    entered: dict[nn.Module, Tensor] = {}
    seen: dict[str, int] = {}
    hooks = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[module] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    layers: dict[str, nn.Module] = {}
    for stack in stacks:
        holding = {layer_path(stack, path) for path in paths.values() if NUMBER.sub("#", path) == stack.path}
        layers |= {path: model.get_submodule(path) for path in holding}
        for parent in {path.rpartition(".")[0] for path in holding}:
            last = list(model.get_submodule(parent).children())[-1]
            # A module that is called for every layer gives its last output last.
            every = len(stack.layers) if stack.shared and stack.layers is not None else 1

            def leave(module: nn.Module, args: Any, output: Any, name: str = stack.path, every: int = every) -> None:
                states = output if isinstance(output, Tensor) else output[0]
                seen[name] = seen.get(name, 0) + 1
                if seen[name] % every == 0:
                    captured.last_outputs.setdefault(name, []).append(states.detach().clone())

            hooks.append(last.register_forward_hook(leave))
    hooks += [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in set(layers.values())]
    holders = {
        path: layers[layer_path(stack, path)]
        for stack in stacks for path in paths.values() if NUMBER.sub("#", path) == stack.path
    }  # fmt: skip
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, backend: str, default: Any) -> Any:
        attend = original(self, backend, default)

        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
            query, key, value, mask = (given.pop(name, None) for name in NAMES)
            # Static caches hand out their own memory, so everything is copied.
            copies = [tensor.detach().clone() for tensor in (query, key, value)]
            output, weights = attend(module, *args, **kwargs)
            request = next((asked for asked, made in reversed(captured.requests) if made is mask), None)
            path = paths[module]
            captured.calls.append(
                Call(
                    path, backend, *copies, None if mask is None else mask.detach().clone(), given,
                    getattr(module, "is_causal", True), output.detach().clone(),
                    None if weights is None else weights.detach().clone(),
                    request if mask is not None else None, entered.get(holders.get(path)),
                )
            )  # fmt: skip
            return output, weights

        return noted

    def noting(make: Any) -> Any:
        def made(**kwargs: Any) -> Any:
            asked = {name: int(value) if name in ("q_offset", "kv_offset") else value for name, value in kwargs.items()}
            mask = make(**kwargs)
            captured.requests.append((asked, mask))
            return mask

        return made

    masks = ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(masks._local_mapping)
    masks._local_mapping.update({name: noting(masks[name]) for name in masks})
    AttentionInterface.get_interface = get_interface
    try:
        yield captured
    finally:
        AttentionInterface.get_interface = original
        masks._local_mapping.clear()
        masks._local_mapping.update(before)
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, eq=False)
class Materialised:
    """Attention of one call in float64, slot by slot.

    Args:
        scores: Scaled, capped, with whatever is added to them; −inf where a query may not see a key.
        visible: (batch, 1 or head, query, slot).
        sinks: Score of the learned sink, (head); None without one.
        weights: (batch, head, query, slot); zero in rows that see nothing.
        sink_weights: Share of the learned sink, (batch, head, query).
    """

    scores: Tensor
    visible: Tensor
    sinks: Tensor | None
    weights: Tensor
    sink_weights: Tensor


def materialise(call: Call) -> Materialised:
    """Written from the definition: softmax of the scores that the model really made."""
    groups = call.query.shape[1] // call.key.shape[1]
    key = call.key.double().repeat_interleave(groups, dim=1)
    scores = call.query.double() @ key.mT * call.scaling
    softcap = call.kwargs.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if call.kwargs.get("position_bias") is not None:
        scores = scores + call.kwargs["position_bias"][..., : scores.shape[-1]].double()
    num_queries, num_slots = scores.shape[-2:]
    if call.mask is not None and call.mask.dtype == torch.bool:
        visible = call.mask
    elif call.mask is not None:
        # What is added to hide a key is the lowest number of the type, or less.
        visible = call.mask > torch.finfo(call.mask.dtype).min / 2
        scores = scores + call.mask.double().masked_fill(~visible, 0)
    else:
        visible = torch.ones(1, 1, num_queries, num_slots, dtype=torch.bool)
        given = call.kwargs.get("is_causal")
        if call.backend == "sdpa" and num_queries > 1 and (call.is_causal if given is None else given):
            visible = visible.tril()
    visible = visible.expand(scores.shape[0], -1, num_queries, num_slots)
    scores = scores.masked_fill(~visible, -torch.inf)
    sinks = None if call.sinks is None else call.sinks.double()
    columns = scores
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:2], num_queries, 1)
        columns = torch.cat([scores, column], dim=-1)
    weights = columns.softmax(-1).nan_to_num(0.0)
    sink_weights = weights[..., -1] if sinks is not None else torch.zeros(scores.shape[:-1], dtype=torch.float64)
    return Materialised(scores, visible, sinks, weights[..., :num_slots], sink_weights)


def output_of(call: Call, made: Materialised) -> Tensor:
    """Weights times values, (batch, query, head, value channel)."""
    groups = call.query.shape[1] // call.value.shape[1]
    return (made.weights @ call.value.double().repeat_interleave(groups, dim=1)).transpose(1, 2)


def rounding(call: Call) -> float:
    """What rounding may do to an output or a weight of this call, relative to itself.

    A score of D products is off by about √D roundings of scaling · |q| |k|, and of what is added to it; a weight,
    relative to itself, by as much again; a sum over keys adds one each.
    """
    eps = torch.finfo(call.query.dtype).eps
    channels, slots = call.query.shape[-1], call.key.shape[2]
    longest = float(call.query.double().norm(dim=-1).max() * call.key.double().norm(dim=-1).max()) * call.scaling
    return (8 + slots) * eps + 4 * channels**0.5 * eps / 2 * (longest + 1)


@dataclass(frozen=True)
class Places:
    """Where the queries and slots of a call stand.

    Args:
        start: Absolute position of the first query.
        offset: Absolute position of slot 0.
        filled: How many slots hold a key.
        length: Length of the key axis up to and with this call.
    """

    start: int
    offset: int
    filled: int
    length: int


def places(forwards: list[list[Call]], stack: Stack, axes: dict[str, Axis]) -> list[list[Places]]:
    """Of every layer of every forward.

    A cache holds the last keys: with T tokens so far, slot s of K is at position max(T − K, 0) + s. Slots beyond T
    are of a static cache that is not full.
    """
    found, start = [], 0
    for layers in forwards:
        rows = []
        num_queries = max(call.query.shape[2] for call in layers)
        for call in layers:
            slots = call.key.shape[2]
            if stack.cross or stack.axis in ("own", "pieces"):
                rows.append(Places(start if stack.cross else 0, 0, slots, slots))
                continue
            length = start + num_queries
            offset = max(length - slots, 0)
            rows.append(Places(length - call.query.shape[2], offset, min(slots, length - offset), length))
        found.append(rows)
        start += num_queries
    return found
