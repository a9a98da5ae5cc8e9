"""What `ablate_heads` and `block_keys` share: which attention calls of a module are changed, and which layer each is.

Calls are changed where they are observed, between the layer and the attention function. Nothing is written to the
model, so that behind the ``with`` block it is what it was.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama_attn.backends._rules import AttentionCall
from llama_attn.backends.registry import rule_of
from llama_attn.observe import compiled
from llama_attn.observe.forward import Stack, is_replay
from llama_attn.observe.hidden import Hook, owner_of
from llama_attn.observe.interface import interfaces_of, intervene, stop_intervening
from llama_attn.observe.stacks import candidates, is_cross, is_shared, name_of, named, stack_of
from llama_attn.stats.visibility import Visibility

# Masks that layers of one forward see through: full, a window, a chunk, and one to spare.
MOST_MASKS = 4


class Intervening:
    """Changes the attention calls of one stack of a module while its block runs.

    Args:
        module: The module.
        stack: Which attention layers, by path with # for numbers; None for the self-attention of the decoder, or the
            only stack there is.

    Raises:
        TypeError: ``module`` is no module.
    """

    name = ""

    def __init__(self, module: nn.Module, stack: str | None) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        self._module, self._asked = module, stack
        self._is_open = False

    # What each intervention is.

    def check(self, stack: Stack) -> None:
        """Refuse what the layers that were chosen do not have."""

    def change_call(self, call: AttentionCall, name: str, layer: int) -> AttentionCall:
        """The call of a layer as it is made instead."""
        return call

    def change_output(self, call: AttentionCall, name: str, output: Tensor) -> Tensor:
        """What the layer gets instead of the output."""
        return output

    def refuse_early(self) -> None:
        """Say what is wrong before a block is entered.

        Raises:
            ValueError: There is no such attention, stack, layer or head, as far as the module shows it.
        """
        chosen = self._chosen_layer()
        if chosen is not None:
            self.check(stack_of(self._module, chosen))

    def _chosen_layer(self) -> nn.Module | None:
        """A layer of the stack that was chosen or is the only one; None if calls have to show which it is."""
        asking = candidates(self._module)
        if self._asked is not None:
            return named(self._module, self._asked, asking)
        if not asking:
            raise ValueError(
                f"{self.name}: {type(self._module).__name__} has no attention that goes through transformers' attention "
                "interface, so there is nothing to change"
            )
        return next(iter(asking.values())) if len(asking) == 1 else None

    def __enter__(self) -> Self:
        if self._is_open:
            raise ValueError(f"{self.name}: this block has been entered already; call {self.name} again for another")
        paths = dict(self._module.named_modules())
        self._names = {module: name_of(path) for path, module in paths.items()}
        self._stack: Stack | None = None
        self._handle: RemovableHandle | None = None
        # Layers that have been called, all of them and those of the forward that runs.
        self._ran: dict[int, None] = {}
        self._called: set[nn.Module] = set()
        self._last: nn.Module | None = None
        self._calls = 0
        self._sees_forwards = False
        self._sights: list[tuple[tuple[Any, ...], tuple[Any, ...], Visibility]] = []
        chosen = self._chosen_layer()
        if chosen is not None:
            self._choose(chosen)
        self._interfaces = interfaces_of(self._names)
        cross = [module for module, name in self._names.items() if is_cross(name)]
        intervene(self._names, self, self._interfaces, cross)
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop_intervening(self._names, self, self._interfaces)
        if self._handle is not None:
            self._handle.remove()
        self._is_open = False
        self._sights.clear()
        if error is None:
            self._check_that_it_ran()

    def wanted_layers(self) -> tuple[int, ...]:
        """Layers that have to run, so that what was asked for has been done."""
        return ()

    def _check_that_it_ran(self) -> None:
        """Say so if nothing was changed, rather than let its numbers be taken for those of a change.

        Raises:
            ValueError: No layer was called, or not all of those that were named.
        """
        name, asking = type(self._module).__name__, list(candidates(self._module))
        if self._stack is None or not self._ran:
            raise ValueError(
                f"{self.name}: nothing was changed, as no attention of {name} that it is about was called; its stacks "
                f"are {asking}, and one can be named by stack="
            )
        if missing := [layer for layer in self.wanted_layers() if layer not in self._ran]:
            raise ValueError(
                f"{self.name}: expected layers that are called, got {missing}; of {self._stack.name!r} those that were "
                f"called are {sorted(self._ran)}"
            )

    def _choose(self, module: nn.Module) -> None:
        """Change the stack that an attention layer belongs to, and no other."""
        stack = stack_of(self._module, module)
        self.check(stack)
        self._stack = stack
        # Where one forward calls a module several times, each call is a layer, in the order of calls.
        self._is_shared = is_shared(self._module, stack)
        self._brackets = self._is_shared or len(stack.layers) == 1
        if self._brackets:
            owner = owner_of(self._module, stack)
            self._handle = owner.register_forward_pre_hook(Hook(self._begin), with_kwargs=True)

    def _begin(self, *_: Any) -> None:
        """A forward begins."""
        if not is_replay():
            self._calls, self._sees_forwards = 0, True
            self._new_forward()

    def _new_forward(self) -> None:
        self._called.clear()
        self._last = None
        # A mask may come again, and mean other slots of a cache.
        self._sights.clear()

    # What the interface asks.

    def change(self, call: AttentionCall, name: str) -> AttentionCall:
        """The call as it is made instead, if it is one of the stack."""
        if self._stack is None and call.is_decoder:
            self._choose(call.module)
            # The forward that shows which stack it is has begun.
            self._sees_forwards = True
        if self._stack is None or call.module not in self._stack.layers:
            return call
        return self.change_call(call, name, self._layer_of(call.module))

    def called(self, module: nn.Module) -> None:
        """A layer that one forward calls once is called.

        Raises:
            ValueError: It is called again before any other.
        """
        if self._stack is None or is_replay():
            return
        layer, _ = self._stack.layers[module]
        if module is self._last:
            raise ValueError(
                f"{self.name}: {type(module).__name__} calls attention several times in one forward (once per image, "
                f"window or part), so that there is no attention of a layer of {self._stack.name!r}"
            )
        if module in self._called:
            self._new_forward()
        self._called.add(module)
        self._last = module
        self._ran[layer] = None

    def _layer_of(self, module: nn.Module) -> int:
        """Which layer the call that ``module`` makes now is.

        Raises:
            ValueError: That cannot be told.
        """
        if self._stack is None:
            raise RuntimeError(f"{self.name}: no stack is chosen")
        index = self._stack.layers[module][0]
        if is_replay():
            if self._is_shared or self._calls > 1:
                raise ValueError(
                    f"{self.name}: layers of {self._stack.name!r} share a module, and when gradient checkpointing runs "
                    "them again it cannot be told which is which; switch it off"
                )
            return index
        if self._brackets and not self._sees_forwards:
            raise ValueError(
                f"{self.name}: layers of {self._stack.name!r} share a module or are alone, and in a compiled model it cannot "
                "be seen where one forward ends; use the model as it is"
            )
        if self._brackets:
            index = self._calls if self._calls or self._is_shared else index
            self._calls += 1
            self._ran[index] = None
        elif torch.compiler.is_compiling():
            # What has been called differs from forward to forward, and a graph that asked would be compiled anew.
            compiled.called(module, self)
        else:
            self.called(module)
        return index

    def sight(self, call: AttentionCall, name: str) -> Visibility:
        """Who sees whom in the call, the same object for layers that see the same."""
        backend = rule_of(name)
        if call.sight is not None or torch.compiler.is_compiling():
            return backend.sees(call) if call.sight is None else call.sight
        objects = call.mask, call.request
        numbers = (
            call.query.shape[0], call.num_queries, call.num_slots, call.is_causal, call.cross, call.key.device, name,
            call.options.get("sliding_window"),
        )  # fmt: skip
        for (mask, request), others, visibility in self._sights:
            if mask is call.mask and request is call.request and others == numbers:
                return visibility
        visibility = backend.sees(call)
        self._sights = [*self._sights[1 - MOST_MASKS :], (objects, numbers, visibility)]
        return visibility
