"""The one place where models are observed: the function that transformers' attention interface gives to a layer.

While something is observed, ``get_interface`` of every `AttentionInterface` in use is shadowed on the instance, and so
is the table of mask functions; the last observer to leave takes the shadows back. Nothing is written to a model or a
configuration, and layers that nobody watches get what they always got.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_attn.backends._rules import AttentionCall, is_paged, scoring, unknown_ways
from llama_attn.backends._streaming import streaming_call
from llama_attn.backends.registry import Backend, rule_of
from llama_attn.engines._fused import fused
from llama_attn.observe import compiled
from llama_attn.observe.plan import Plan
from llama_attn.observe.requests import Noting, forget, request_of
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility

# The interfaces that models use whose files have none of their own.
TRANSFORMERS_OWN = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
T = TypeVar("T")
TENSORS = ("query", "key", "value", "attention_mask")


class CallObserver(Protocol):
    """What measures attention calls."""

    def visibility(self, call: AttentionCall, backend: Backend) -> Visibility | None:
        """Who sees whom in the call, the same object for calls that see the same; None to leave it."""

    def planned(self, call: AttentionCall, name: str, backend: Backend) -> Plan | None:
        """How a streaming backend runs the call, and what is measured in its blocks; None to leave it."""

    def put(self, call: AttentionCall, visibility: Visibility, raw: Mapping[str, Tensor], engine: str) -> None:
        """Keep what was measured there."""

    def measure(
        self,
        call: AttentionCall,
        name: str,
        visibility: Visibility,
        scores: Scoring,
        output: Tensor,
        prefer: str | None,
    ) -> None:
        """Measure the call, beside its backend what the backend has not."""


class Observer(Protocol):
    """What watches attention layers."""

    # Whether it is part of the graph that is being compiled.
    is_traced: bool
    # Whether it is to be shown hidden states.
    sees_states: bool

    def for_call(self, module: nn.Module) -> CallObserver | None:
        """What measures the call that ``module`` makes now, if it is to be measured; asked once per call."""

    def enter_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take the hidden states that come to the layer of ``module``, where that layer shows them itself."""

    def leave_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take its output."""


class Intervention(Protocol):
    """What changes attention calls."""

    # The function that users call, for messages.
    name: str

    def change(self, call: AttentionCall, name: str) -> AttentionCall:
        """The call as it is made under the attention implementation ``name``; asked once per call, before it is made."""

    def change_output(self, call: AttentionCall, name: str, output: Tensor) -> Tensor:
        """What the layer gets of it, (batch, query, head, value_channel)."""

    def called(self, module: nn.Module) -> None:
        """A layer is called in a compiled graph, where `change` saw the call once, when the graph was made."""


# By identity: Dynamo would look into keys that are modules. `compiled.modules` keeps them alive.
_watched: dict[int, tuple[Observer, ...]] = {}
_intervening: dict[int, tuple[Intervention, ...]] = {}
_cross: dict[int, None] = {}
# Those who are shown hidden states.
_seeing: dict[int, Observer] = {}
_shadowed: dict[int, tuple[Any, int]] = {}


def watching(module: nn.Module) -> tuple[Observer, ...]:
    """Who watches a layer."""
    return _watched.get(id(module), ())


def are_seen() -> bool:
    """Whether anybody is shown hidden states."""
    return bool(_seeing)


def show_states(module: nn.Module, states: Tensor, *, entering: bool) -> None:
    """Show whoever watches ``module`` what comes into the layer that holds it, or what leaves it."""
    is_outside = False
    for observer in _watched.get(id(module), ()):
        if torch.compiler.is_compiling() and not observer.is_traced:
            is_outside = True
        elif entering:
            observer.enter_layer(module, states)
        else:
            observer.leave_layer(module, states)
    if is_outside:
        compiled.show_states(module, states, entering=entering)


def is_cross(module: nn.Module) -> bool:
    """Whether a layer attends to another sequence than its own."""
    return id(module) in _cross


def watch(
    modules: Iterable[nn.Module], observer: Observer, interfaces: Iterable[Any], cross: Iterable[nn.Module] = ()
) -> None:
    """Let ``observer`` see the attention calls of ``modules``.

    Args:
        modules: The layers.
        observer: Who is told.
        interfaces: The attention interfaces that these layers use, see `interfaces_of`.
        cross: Those of the layers that attend to another sequence than their own.
    """
    alone = (observer,)
    for module in modules:
        at = id(module)
        _watched[at] = (*_watched[at], observer) if at in _watched else alone
        compiled.modules[at] = module
    for module in cross:
        _cross[id(module)] = None
    if observer.sees_states:
        _seeing[id(observer)] = observer
    _take_shadows(interfaces)


def unwatch(modules: Iterable[nn.Module], observer: Observer, interfaces: Iterable[Any]) -> None:
    """Take back what `watch` did."""
    _seeing.pop(id(observer), None)
    for module in modules:
        at, everyone = id(module), _watched.get(id(module), ())
        # Of most layers it is the only one: every step of decoding comes by here.
        left = () if len(everyone) == 1 and everyone[0] is observer else _without(everyone, observer)
        if left:
            _watched[at] = left
        else:
            _watched.pop(at, None)
            _forget(at)
    _leave_shadows(interfaces)


def intervene(
    modules: Iterable[nn.Module], intervention: Intervention, interfaces: Iterable[Any], cross: Iterable[nn.Module] = ()
) -> None:
    """Let ``intervention`` change the attention calls of ``modules``, behind those that do already.

    Observers see the call as it is made, whether they came before or come later. Arguments as in `watch`.
    """
    for module in modules:
        at = id(module)
        _intervening[at] = (*_intervening.get(at, ()), intervention)
        compiled.modules[at] = module
    for module in cross:
        _cross[id(module)] = None
    _take_shadows(interfaces)


def stop_intervening(modules: Iterable[nn.Module], intervention: Intervention, interfaces: Iterable[Any]) -> None:
    """Take back what `intervene` did."""
    for module in modules:
        left = _without(_intervening.get(id(module), ()), intervention)
        if left:
            _intervening[id(module)] = left
        else:
            _intervening.pop(id(module), None)
            _forget(id(module))
    _leave_shadows(interfaces)


def _without(everyone: tuple[T, ...], one: T) -> tuple[T, ...]:
    return tuple(other for other in everyone if other is not one)


def _forget(at: int) -> None:
    """Keep nothing of a layer that nobody watches or changes any more."""
    if at not in _watched and at not in _intervening:
        _cross.pop(at, None)
        compiled.modules.pop(at, None)


def _take_shadows(interfaces: Iterable[Any]) -> None:
    for interface in interfaces:
        _, users = _shadowed.get(id(interface), (None, 0))
        if not users:
            _shadow(interface)
        _shadowed[id(interface)] = interface, users + 1


def _leave_shadows(interfaces: Iterable[Any]) -> None:
    for interface in interfaces:
        _, users = _shadowed[id(interface)]
        if users == 1:
            del _shadowed[id(interface)]
            _unshadow(interface)
        else:
            _shadowed[id(interface)] = interface, users - 1


def interfaces_of(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Every attention interface that the files of these layers use, transformers' own first, and its table of masks."""
    found = {id(ALL_ATTENTION_FUNCTIONS): ALL_ATTENTION_FUNCTIONS}
    for file in {type(module).__module__ for module in modules}:
        own = getattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS", None)
        if own is not None:
            found[id(own)] = own
    return (*found.values(), ALL_MASK_ATTENTION_FUNCTIONS)


def _shadow(interface: Any) -> None:
    if interface is ALL_MASK_ATTENTION_FUNCTIONS:
        for name in list(interface):
            interface[name] = Noting(interface[name], name in interface._local_mapping)
        return
    given = interface.get_interface

    def get_interface(name: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = given(name, default)
        return partial(_attend, attend, name or "eager") if _watched or _intervening else attend

    interface.get_interface = get_interface


def _attend(attend: Callable[..., Any], name: str, /, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the backend, in the sight of those who watch ``module``."""
    everyone, changes = _watched.get(id(module), ()), _intervening.get(id(module), ())
    outside = False
    if torch.compiler.is_compiling():
        # Outside a graph that is being compiled nobody can be asked.
        outside = not all(observer.is_traced for observer in everyone)
        everyone = tuple(observer for observer in everyone if observer.is_traced)
    asked = [observer.for_call(module) for observer in everyone]
    observers = [observer for observer in asked if observer is not None]
    if not observers and not outside and not changes:
        return attend(module, *args, **kwargs)
    return _observe(observers, changes, attend, name, module, args, kwargs, outside)


def _unshadow(interface: Any) -> None:
    if interface is not ALL_MASK_ATTENTION_FUNCTIONS:
        del interface.get_interface
        return
    for name in list(interface):
        made = interface._local_mapping.get(name)
        if isinstance(made, Noting):
            made.is_open = False
            if made.was_local:
                interface[name] = made.make
            else:
                del interface[name]
    forget()


def _observe(
    observers: list[CallObserver],
    changes: tuple[Intervention, ...],
    attend: Callable[..., Any],
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outside: bool,
) -> Any:
    """Run the backend, unchanged but for ``changes``, and measure what it was given; ``outside`` of the graph there is somebody too."""
    backend = rule_of(name)
    # Whoever streams takes them as its own.
    options = kwargs if backend.is_streaming else dict(kwargs)
    if len(args) == len(TENSORS):
        query, key, value, mask = args
    else:
        given = dict(zip(TENSORS, args, strict=False))
        query, key, value, mask = (given[n] if n in given else options.pop(n, None) for n in TENSORS)
    cross = is_cross(module)
    first = observers[0] if observers else None
    if backend.is_streaming:
        call = _changed(changes, streaming_call(module, query, key, value, mask, options, cross), name)
        plan = first.planned(call, name, backend) if first else None
        if plan is None:
            plan = Plan.of(call, backend, call.sight or backend.sees(call))
        visibility, scores, engine, share = plan
        prefer: str | None = engine
        wanted, seen, is_all = share or (None, visibility, False)
        output, raw = fused(query, key, value, seen, scores, engine, wanted)
        if first and share:
            first.put(call, visibility, raw, engine)
            observers = observers[1:] if is_all else observers
        result: Any = _with_output(changes, call, name, (output, None))
    else:
        _refuse(module, name, options, changes[0].name if changes and not observers else "record")
        request = request_of(mask, module, query.shape[2], key.shape[2])
        call = _changed(changes, AttentionCall(module, query, key, value, mask, options, request, cross), name)
        # Before anything has run, so that what cannot be measured is refused at once.
        known = first.visibility(call, backend) if first else (call.sight or backend.sees(call)) if outside else None
        if call.mask is not mask:
            args, kwargs = _with_mask(args, kwargs, call.mask)
        result = _with_output(changes, call, name, attend(module, *args, **kwargs))
        if known is None:
            return result
        visibility, prefer = known, None
        scores = scoring(call, visibility.num_keys, backend.ignores)
    for observer in observers:
        observer.measure(call, name, visibility, scores, result[0], prefer)
    if outside:
        compiled.observe(call, name, visibility, scores, result[0], prefer)
    return result


def _changed(changes: tuple[Intervention, ...], call: AttentionCall, name: str) -> AttentionCall:
    for intervention in changes:
        call = intervention.change(call, name)
    return call


def _with_mask(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with another mask at the place where one was given."""
    at = TENSORS.index("attention_mask")
    if len(args) > at:
        return (*args[:at], mask, *args[at + 1 :]), kwargs
    return args, {**kwargs, "attention_mask": mask}


def _with_output(changes: tuple[Intervention, ...], call: AttentionCall, name: str, result: Any) -> Any:
    """What an attention function returned, with the output that the layer gets in its place."""
    if not changes:
        return result
    output = result[0]
    for intervention in changes:
        output = intervention.change_output(call, name, output)
    return output, *result[1:]


def _tell(call: AttentionCall, name: str, scores: Scoring, output: Tensor, prefer: str | None) -> None:
    """Tell those outside of a compiled graph of a call in it."""
    backend = rule_of(name)
    for observer in watching(call.module):
        measuring = None if observer.is_traced else observer.for_call(call.module)
        if measuring is not None and (visibility := measuring.visibility(call, backend)) is not None:
            measuring.measure(call, name, visibility, scores, output, prefer)


def _tell_states(module: nn.Module, states: Tensor, entering: bool) -> None:
    """Show those outside of a compiled graph hidden states in it."""
    for observer in watching(module):
        if not observer.is_traced:
            (observer.enter_layer if entering else observer.leave_layer)(module, states)


def _tell_called(module: nn.Module, who: int) -> None:
    """Tell who changes the calls of a layer in a compiled graph that it is called."""
    for intervention in _intervening.get(id(module), ()):
        if id(intervention) == who:
            intervention.called(module)


compiled.receivers.update(call=_tell, states=_tell_states, called=_tell_called)


def _refuse(module: nn.Module, name: str, options: dict[str, Any], who: str) -> None:
    """Refuse calls that do not show ``who`` watches them what is attended to.

    Raises:
        ValueError: It says what is hidden.
    """
    if is_paged(options):
        raise ValueError(
            f"{who}: continuous batching (generate_batch) hands new keys alone to the attention of "
            f"{type(module).__name__}, and keeps the others in a paged cache; use generate"
        )
    if (unknown := unknown_ways(options)) and name not in ("eager", "sdpa"):
        raise ValueError(
            f"{who}: {type(module).__name__} says who sees whom in {unknown} under {name!r}, which is not known; "
            'use attn_implementation="eager" or "sdpa"'
        )
