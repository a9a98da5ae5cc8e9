"""Attention written out, in the precision of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask

from llama_attn.backends._rules import AttentionCall, by_mask, without_mask
from llama_attn.stats.visibility import Visibility

__all__ = ["ACCEPTS_MASKS_OF", "attend", "mask", "sees", "unavailable"]

# Whose masks it can read besides those of `mask`, by name.
ACCEPTS_MASKS_OF = (Path(__file__).stem, "sdpa")
# What transformers is to make of who sees whom: here bool, (batch, 1, query, key), or None for causal attention.
mask = sdpa_mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query is (batch, head, query, channel), key and value (batch, kv_head, key, channel); the output (batch, query, head, channel)."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def sees(call: AttentionCall) -> Visibility:
    """Who sees whom under the mask that arrived, for statistics."""
    return without_mask(call) if call.mask is None else by_mask(call)


def unavailable() -> str | None:
    """Why it does not run here, and what to install; None if it does."""
    return None
