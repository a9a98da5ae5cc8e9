"""What a mask was asked for: masks that transformers makes carry the request with which they were made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llama_attn.backends._masks import MaskRequest

# Where a mask carries it.
REQUEST = "_llama_attn_request"


class _Notes(threading.local):
    """Requests whose answer was no mask, which carries nothing; those of the forward that runs in this thread."""

    def __init__(self) -> None:
        self.requests: list[MaskRequest] = []
        self.are_used = False


_notes = _Notes()


class Noting:
    """A mask function whose result can be traced back to what was asked for."""

    def __init__(self, make: Callable[..., Any], was_local: bool) -> None:
        self.make, self.was_local = make, was_local
        # What `inspect.unwrap` finds: whoever registers it under another name keeps it.
        self.__wrapped__, self.is_open = make, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The mask, which carries its request."""
        mask = self.make(*args, **kwargs)
        if self.is_open and not isinstance(mask, MaskRequest) and not args:
            _note(MaskRequest(**kwargs), mask)
        return mask


def _note(request: MaskRequest, mask: Any) -> None:
    if mask is not None:
        setattr(mask, REQUEST, request)
    elif not torch.compiler.is_compiling():
        if _notes.are_used:
            # Of a forward whose layers have run.
            _notes.requests, _notes.are_used = [], False
        _notes.requests.append(request)


def request_of(mask: Any, module: nn.Module, num_queries: int, num_slots: int) -> MaskRequest | None:
    """What was asked for when ``mask`` was made."""
    if isinstance(mask, MaskRequest):
        return mask
    if mask is not None:
        made: MaskRequest | None = getattr(mask, REQUEST, None)
        return made
    if torch.compiler.is_compiling():
        return None
    _notes.are_used = True
    fitting = [request for request in _notes.requests if request.fits(num_queries, num_slots)]
    own = [request for request in fitting if request.config is getattr(module, "config", None)]
    found = own or fitting
    return found[-1] if found else None


def forget() -> None:
    """Drop the requests of forwards that have run."""
    _notes.requests.clear()
