"""How well a model predicts a text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_attn.observe.options import known_options

# What transformers calls a cache, from 5.24 on and before.
CACHES = ("cache", "past_key_values")


def losses_of(model: Any, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it [nat], (batch, token − 1)."""
    logits = model(ids, **known_options(model, use_cache=False)).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")


@dataclass(frozen=True)
class Continuation:
    """The end of a text, which is read again and again behind a cache of what comes before.

    Args:
        model: A causal language model.
        ids: The end, (batch, token).
        cache: Keys and values of what comes before.
        name: What the model calls its cache.
    """

    model: Any
    ids: Tensor
    cache: Any
    name: str

    @classmethod
    def of(cls, model: Any, ids: Tensor, first: int) -> Continuation:
        """The tokens of ``ids`` from the ``first`` on, the others read.

        Raises:
            ValueError: The model has no cache.
        """
        output = model(ids[:, :first], **known_options(model, use_cache=True, logits_to_keep=1))
        name = next((name for name in CACHES if getattr(output, name, None) is not None), None)
        if name is None:
            raise ValueError(
                f"{type(model).__name__} gives no cache, behind which the end of a text could be read again"
            )
        return cls(model, ids[:, first:], getattr(output, name), name)

    def losses(self) -> Tensor:
        """Cross-entropy of each of its tokens but the first [nat], (batch, token − 1)."""
        # A forward would add its keys to the cache.
        logits = self.model(self.ids, **{self.name: copy.deepcopy(self.cache)}).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.mT, self.ids[:, 1:], reduction="none")
