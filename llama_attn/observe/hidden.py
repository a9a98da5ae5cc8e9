"""What attention calls do not show: hidden states, token ids, output projections, and where a forward begins.

These are seen by hooks on the modules concerned, and only when what was asked for needs them. A copy of a model that
is made meanwhile has hooks that do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llama_attn.observe.forward import Forward, Stack, is_replay
from llama_attn.observe.stacks import layer_modules
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.selection import named, sees_outputs, sees_states
from llama_attn.stats.visibility import Visibility


class Course(Protocol):
    """The forwards of a stack."""

    forward: Forward | None


class Hooks:
    """Hooks on the modules around one stack.

    Args:
        root: The module that is recorded.
        stack: Its attention layers.
        config: What is measured.
        course: The forwards of the stack.
        brackets: Whether the beginning of a forward has to be seen.
    """

    def __init__(
        self, root: nn.Module, stack: Stack, config: AttentionStatsConfig, course: Course, *, brackets: bool
    ) -> None:
        self.root = root
        self._course: Course | None = course
        self.tokens: Tensor | None = None
        self._has_entered = self.sees_forwards = False
        self._handles: list[RemovableHandle] = []
        # Hidden states of layers that have been entered, until the call of their attention says more.
        self.entered: dict[nn.Module, Tensor] = {}
        self._pending: _Output | None = None
        # The layer that holds each attention module; one that reports its hidden states itself is not asked twice.
        holders = zip(stack.layers, layer_modules(root, stack), strict=False) if sees_states(config) else ()
        self._holder_of = {
            module: holder for module, (_, holder) in holders if not getattr(holder, "is_observed", False)
        }
        if brackets:
            self._on_forward(owner_of(root, stack), self._enter_forward)
        if _wants_tokens(config) and (embeddings := _embeddings(root, stack)) is not None:
            self._on_forward(embeddings, self._take_tokens)
        for holder in dict.fromkeys(self._holder_of.values()):
            self._on_forward(holder, self._enter_layer)
        if self._holder_of:
            self._handles.append(self._last_layer().register_forward_hook(Hook(self._leave_layer), with_kwargs=True))
        if sees_outputs(config):
            for leaf in _leaves(root, stack):
                self._on_forward(leaf, self._enter_leaf)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.entered, self._pending = {}, None
        # The course holds its hooks: what it has measured would stay until Python looks for such circles.
        self._course = None

    @property
    def _forward(self) -> Forward | None:
        """The forward that is being measured."""
        return None if self._course is None else self._course.forward

    def has_entered(self) -> bool:
        """Whether a forward has begun since this was last asked."""
        entered, self._has_entered = self._has_entered, False
        return entered

    def expect(self, module: nn.Module, output: Tensor, value: Tensor, visibility: Visibility) -> None:
        """Look out for the projection that takes the output of an attention call."""
        if output.ndim == 4:
            self._pending = _Output(module, output.detach(), value.detach(), visibility)

    def states_of(self, module: nn.Module) -> Tensor | None:
        """The hidden states that came to the layer that holds an attention module."""
        return self.entered.pop(self._holder_of.get(module, module), None)

    def _last_layer(self) -> nn.Module:
        """The last layer of the list that the attention layers are in, whether it has attention or not."""
        holder = list(self._holder_of.values())[-1]
        for module in self.root.modules():
            if isinstance(module, nn.ModuleList) and any(child is holder for child in module):
                return module[-1]
        return holder

    def _on_forward(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(Hook(hook), with_kwargs=True))

    def _enter_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_replay():
            self._has_entered = self.sees_forwards = True

    def _take_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() and not is_replay():
            self.tokens = ids.detach()

    def _enter_layer(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        if isinstance(states, Tensor) and states.ndim == 3 and states.is_floating_point() and not is_replay():
            self.entered[holder] = states.detach()

    def _leave_layer(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if self._forward is not None and isinstance(states, Tensor) and states.ndim == 3 and not is_replay():
            self._forward.leave_last_layer(states.detach())

    def _enter_leaf(self, leaf: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pending, forward = self._pending, self._forward
        if pending is None or forward is None or not args or not isinstance(args[0], Tensor) or is_replay():
            return
        if pending.is_given(args[0]):
            self._pending = None
            forward.take_projection(pending.module, leaf, pending.value, pending.visibility)


class Hook:
    """A hook that a copied or pickled model does not take along."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        """See a forward; in a compiled graph it would be seen when the graph is over, and told to the next forward."""
        if not torch.compiler.is_compiling():
            self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """What is left of a hook in a copy."""


class _Output:
    """The output of an attention call on its way to a projection."""

    def __init__(self, module: nn.Module, output: Tensor, value: Tensor, visibility: Visibility) -> None:
        self.module, self.value, self.visibility = module, value, visibility
        self._output = rearrange(output, "batch query head channel -> (batch query) (head channel)")

    def is_given(self, states: Tensor) -> bool:
        """Whether these are the output, and not something made of it."""
        if states.shape[-1] != self._output.shape[-1] or states.numel() != self._output.numel():
            return False
        return torch.equal(states.detach().reshape(self._output.shape), self._output)


def _wants_tokens(config: AttentionStatsConfig) -> bool:
    return config.statistics == "all" or any("tokens" in statistic.needed for statistic in named(config))


def owner_of(root: nn.Module, stack: Stack) -> nn.Module:
    """The nearest model above the layers, else the root: what runs once for every forward of the stack."""
    return next(_models_above(root, stack), root)


def _models_above(root: nn.Module, stack: Stack) -> Iterator[PreTrainedModel]:
    """Models that the layers are in, the nearest first."""
    _, path = next(iter(stack.layers.values()))
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = root.get_submodule(".".join(parts[:end]))
        if isinstance(module, PreTrainedModel):
            yield module


def _embeddings(root: nn.Module, stack: Stack) -> nn.Module | None:
    """Those of the nearest model that has some: an encoder and a decoder read different ids."""
    for model in _models_above(root, stack):
        try:
            embeddings: nn.Module | None = model.get_input_embeddings()
        except NotImplementedError:
            continue
        if embeddings is not None:
            return embeddings
    return None


def _leaves(root: nn.Module, stack: Stack) -> list[nn.Module]:
    """Modules of the layers that may be projections: those without parts, and those that adapt another."""
    found: dict[nn.Module, None] = {}
    for _, holder in layer_modules(root, stack):
        for part in holder.modules():
            if hasattr(part, "base_layer") or not any(part.children()):
                found[part] = None
    return list(found)
