"""How well a model predicts a text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def losses_of(model: Any, ids: Tensor, first: int = 0) -> Tensor:
    """Cross-entropy of each token given those before it [nat], (batch, token).

    Args:
        model: A causal language model.
        ids: Its text, (batch, token).
        first: The first token that predicts another; those before it only are read.
    """
    # Logits of a long text take more memory than all else, so that only those that are needed are made.
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "logits_to_keep": ids.shape[1] - first}
    logits = model(ids, **{name: value for name, value in options.items() if name in known}).logits
    logits = logits[:, -(ids.shape[1] - first) : -1].float()
    return torch.nn.functional.cross_entropy(logits.mT, ids[:, first + 1 :], reduction="none")
