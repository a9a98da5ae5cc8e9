"""The table of backends, and the only adapter to transformers' own two tables.

transformers looks an attention function up in one table and the function that builds its mask in another. A name
that stands in the first alone gets no mask at all, so padding would be ignored in silence: here both are filled.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_attn import backends
from llama_attn.backends import _streaming
from llama_attn.backends._rules import AttentionCall, by_mask, by_request
from llama_attn.stats.visibility import Visibility

# transformers reads these in a name as "a FlashAttention variant", "a kernel on the hub" and "paged".
# A space means nothing to it, nor to a shell that quotes it, and no file is named after a backend.
# A plus joins the names of several backends in what was measured with them.
RESERVED = ("flash", "/", "|", "+")


@dataclass(frozen=True)
class Backend:
    """One value of ``attn_implementation``.

    Args:
        name: That value.
        attend: The attention function, see `llama_attn.backends`.
        mask: Builds its mask; None where transformers has one under this name.
        unavailable: Why it does not run here; None if it does.
        accepts_masks_of: Backends whose masks it reads.
        sees: Its rule: who sees whom in a call of it.
        engine: Name of the engine it runs on, if it names one.
        ignores: Arguments of a call that it is given and knows nothing of.
    """

    name: str
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    mask: Callable[..., Any] | None
    unavailable: Callable[[], str | None]
    accepts_masks_of: tuple[str, ...]
    sees: Callable[[AttentionCall], Visibility]
    engine: str | None = None
    ignores: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether transformers knows it only through this registry."""
        return self.mask is not None

    @property
    def is_streaming(self) -> bool:
        """Whether it measures from its own blocks."""
        return self.sees is _streaming.sees

    def check_mask(self, origin: str, attention_mask: Any, num_queries: int, num_keys: int) -> None:
        """Refuse a mask that was made for the backend ``origin`` and would be misread here.

        Raises:
            ValueError: The mask does not suit this backend.
        """
        causal = attention_mask is None and num_queries in (1, num_keys)
        # Without a mask, sdpa and FlashAttention mean the same as long as no keys come from a cache.
        alike = origin == "sdpa" and self.name.startswith("flash") and causal
        if origin not in self.accepts_masks_of and not alike:
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else None
            raise ValueError(
                f"attention_mask: layers pinned to {self.name!r} cannot read a mask made for {origin!r} (shape {shape}); "
                f"set the model's attn_implementation to one of {list(self.accepts_masks_of)}"
            )


def all_backends() -> dict[str, Backend]:
    """Every backend by name, whether it runs here or not."""
    return dict(_BACKENDS)


def register_backend(
    name: str,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    mask: Callable[..., Any] | None = None,
) -> None:
    """Make ``attend`` available as ``attn_implementation=name``, statistics included.

    Args:
        name: The name to ask for. One that was registered here before is registered anew.
        attend: An attention function with transformers' signature, ``attend(module, query, key, value,
            attention_mask, scaling=…, dropout=…, **kwargs) -> (output, weights or None)``: query
            (batch, head, query, channel); key, value (batch, kv_head, key, channel); output
            (batch, query, head, channel).
        mask: A mask function with transformers' signature. By default ``attention_mask`` is what sdpa gets:
            bool (batch, 1, query, key), True = seen, or None for causal attention.

    Raises:
        TypeError: ``attend`` or ``mask`` is not callable.
        ValueError: The name is taken, or it would be misread: "flash", "/" and "|" mean something to transformers, and "+"
            joins the names of several backends.

    Source: https://huggingface.co/docs/transformers/attention_interface
    """
    for argument, function in (("attend", attend), ("mask", mask)):
        if not callable(function) and not (argument == "mask" and function is None):
            raise TypeError(f"{argument}: expected a function, got {function!r}")
    if not isinstance(name, str) or not name or any(part in name for part in RESERVED):
        raise ValueError(f"name: expected a string without any of {list(RESERVED)}, got {name!r}")
    if name in _built_in() or (name not in _BACKENDS and name in ALL_ATTENTION_FUNCTIONS.valid_keys()):
        raise ValueError(f"name: {name!r} is already a backend; choose another name than {sorted(all_backends())}")
    accepts, sees = ((name,), _by_its_own_mask) if mask else ((name, "sdpa"), _BACKENDS["sdpa"].sees)
    _BACKENDS[name] = Backend(name, attend, mask or sdpa_mask, lambda: None, accepts, sees)
    _fill_tables(_BACKENDS[name])


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it runs on this machine, else the reason why not and what to install."""
    return {name: backend.unavailable() for name, backend in sorted(all_backends().items())}


def get_backend(name: str) -> Backend:
    """The backend ``name``, if it runs here.

    Raises:
        ValueError: There is no such backend.
        ImportError: It does not run on this machine.
    """
    known = all_backends()
    if name not in known:
        # In the words of transformers, which its users and its tests know.
        raise ValueError(f'Specified `attn_implementation="{name}"` is not supported; there are {sorted(known)}')
    if reason := known[name].unavailable():
        raise ImportError(f"attn_implementation={name!r} does not run here: {reason}")
    return known[name]


def check_request(name: str) -> None:
    """Refuse an ``attn_implementation`` that does not run here, unless it is transformers' own affair.

    Its own affair are kernels of the hub, paged attention, and names of its table that are not in ours.

    Raises:
        ValueError: Nobody knows it.
        ImportError: It does not run on this machine.
    """
    if name in all_backends() or not (name in ALL_ATTENTION_FUNCTIONS or "/" in name or "|" in name):
        get_backend(name)


def rule_of(name: str) -> Backend:
    """The backend whose rule of who sees whom any ``attn_implementation`` follows, kernels of the hub included.

    Raises:
        ValueError: It is nobody's that is known.
    """
    if name in _BACKENDS:
        return _BACKENDS[name]
    masks = {sdpa_mask: "sdpa", eager_mask: "eager", flash_attention_mask: "flash_attention_2"}
    # While something is recorded, mask functions are found wrapped.
    made_by = inspect.unwrap(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.get(name, rule_of))
    rule = "flash_attention_2" if "flash" in name else masks.get(made_by)
    if rule is None:
        raise ValueError(
            f"attn_implementation: who sees whom under {name!r} is not known; register it with llama_attn.register_backend"
        )
    return _BACKENDS[rule]


def attention_function(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function behind any ``attn_implementation``, those of the hub included, as transformers would choose it."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, _BACKENDS["eager"].attend)


def is_streaming(name: str | None) -> bool:
    """Whether ``name`` is a backend that measures from its own blocks."""
    backend = _BACKENDS.get(name or "")
    return backend is not None and backend.is_streaming


def fill_tables() -> None:
    """Put every backend of ours into transformers' tables."""
    for backend in all_backends().values():
        _fill_tables(backend)


def clear_tables() -> None:
    """Take every backend of ours out of transformers' tables."""
    for backend in all_backends().values():
        if backend.is_ours:
            type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop(backend.name, None)
            type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop(backend.name, None)


def _fill_tables(backend: Backend) -> None:
    if backend.is_ours:
        ALL_ATTENTION_FUNCTIONS.register(backend.name, backend.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(backend.name, backend.mask)


def _by_its_own_mask(call: AttentionCall) -> Visibility:
    """As the mask was asked for, of which a function of somebody else's made what only he can read."""
    visibility = by_request(call)
    return by_mask(call) if visibility is None else visibility


def _built_in() -> tuple[str, ...]:
    names = (module.name for module in pkgutil.iter_modules(backends.__path__))
    return tuple(name for name in names if name != "registry" and not name.startswith("_"))


def _discover() -> dict[str, Backend]:
    found = {}
    for name in _built_in():
        module = importlib.import_module(f"{backends.__name__}.{name}")
        found[name] = Backend(
            name,
            module.attend,
            module.mask,
            module.unavailable,
            module.ACCEPTS_MASKS_OF,
            module.sees,
            getattr(module, "ENGINE", None),
            getattr(module, "IGNORES", ()),
        )
    return found


# Found once, at import: a plain dict, which torch.compile can read.
_BACKENDS = _discover()
