"""Which attention stacks a model has: layers of one kind, told apart by their path."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from llama_attn.observe.forward import Stack

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# What transformers calls attention to another sequence.
CROSS_NAMES = ("encoder_attn", "crossattention", "cross_attn", "cross_attention", "EncDecAttention")


def name_of(path: str) -> str:
    """The name of the stack that a layer at ``path`` belongs to: the same with # for numbers."""
    return NUMBER.sub("#", path)


def stack_of(root: nn.Module, module: nn.Module) -> Stack:
    """The stack of an attention layer: every module of the same class at such a path.

    Layers have the number in their path where there is one, else that of their order; so have those of a model that
    lacks some.
    """
    paths = {held: path for path, held in root.named_modules()}
    name = name_of(paths[module])
    members = [(path, held) for held, path in paths.items() if name_of(path) == name and _is_alike(held, module)]
    numbers = [[int(number) for number in NUMBER.findall(path)] for path, _ in members]
    varying = [at for at in range(len(numbers[0])) if len({of_member[at] for of_member in numbers}) > 1]
    if len(varying) == 1 or (not varying and len(numbers[0]) == 1):
        at = varying[0] if varying else 0
        indices = [of_member[at] for of_member in numbers]
        modules = _list_of(root, members[0][0], at)
    else:
        indices, modules = list(range(len(members))), []
    num_layers = len(modules) or len(members)
    with_attention = {number for number, layer in enumerate(modules) if any(map(calls_interface, layer.modules()))}
    without = tuple(sorted({*range(len(modules))} - with_attention - {*indices}))
    layers = {held: (index, path) for index, (path, held) in zip(indices, members, strict=True)}
    return Stack(name, layers, max(num_layers, max(indices) + 1), is_cross(name), without)


def is_cross(name: str) -> bool:
    """Whether the layers of a stack attend to another sequence."""
    return any(part in CROSS_NAMES for part in name.split("."))


def candidates(root: nn.Module) -> dict[str, nn.Module]:
    """Stacks whose forward is seen to ask the attention interface, each with one of its layers."""
    found: dict[str, nn.Module] = {}
    for path, module in root.named_modules():
        if calls_interface(module):
            found.setdefault(name_of(path), module)
    return found


def named(root: nn.Module, stack: str, asking: Mapping[str, nn.Module]) -> nn.Module:
    """A layer of the stack of that name, which need not be seen to ask the interface.

    Args:
        root: The module.
        stack: The name.
        asking: What `candidates` gives for the module.

    Raises:
        ValueError: There is none, or the name is that of what holds attention or is part of it.
    """
    if stack in asking:
        return asking[stack]
    above = f"{stack}." if stack else ""
    related = any(name.startswith(above) or stack.startswith(f"{name}.") for name in asking)
    module = next((module for path, module in root.named_modules() if name_of(path) == stack), None)
    if module is None or related:
        raise ValueError(f"stack: there is no {stack!r}; there are {list(asking)}")
    return module


def calls_interface(module: nn.Module) -> bool:
    """Whether the code of a module's forward names ``get_interface``."""
    forward = inspect.unwrap(type(module).forward)
    return "get_interface" in getattr(getattr(forward, "__code__", None), "co_names", ())


def is_shared(root: nn.Module, stack: Stack) -> bool:
    """Whether a layer stands at several places of the model, so that one forward calls it several times."""
    places = Counter(module for _, module in root.named_modules(remove_duplicate=False) if module in stack.layers)
    return max(places.values(), default=0) > 1


def layer_modules(root: nn.Module, stack: Stack) -> Iterator[tuple[int, nn.Module]]:
    """The layer that holds each attention module: what stands in a list above it; with the index of the layer."""
    for index, path in stack.layers.values():
        numbers = [match for match in NUMBER.finditer(path) if _is_list(root, path[: match.start()].rstrip("."))]
        own = [match for match in numbers if _varies(stack, match.start())]
        if own or numbers:
            yield index, root.get_submodule(path[: (own or numbers)[-1].end()])


def _varies(stack: Stack, start: int) -> bool:
    return len({path[start:].split(".")[0] for _, path in stack.layers.values()}) > 1


def _is_list(root: nn.Module, path: str) -> bool:
    return isinstance(root.get_submodule(path), nn.ModuleList)


def _is_alike(module: nn.Module, other: nn.Module) -> bool:
    return type(module) is type(other) or calls_interface(module)


def _list_of(root: nn.Module, path: str, at: int) -> list[nn.Module]:
    """The modules of the list whose number is the ``at``-th of a path."""
    match = list(NUMBER.finditer(path))[at]
    return list(root.get_submodule(path[: match.start()].rstrip(".")).children())
