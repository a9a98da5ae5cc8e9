"""What every engine is given and gives back, and the precision it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility


class Walk(NamedTuple):
    """What one walk over a layer gives.

    Args:
        output: Attention output, (batch, query, head, channel); ``None`` without values.
        logsumexp: ln Σ_j exp s_ij of every row, padding and the learned sink included, (batch, head, query); ``None`` if
            no backward needs it.
        raw: Running sums and rows of each statistic, before padding is marked.
    """

    output: Float[Tensor, "batch query head channel"] | None
    logsumexp: Float[Tensor, "batch head query"] | None
    raw: Mapping[str, Tensor]


class Gradients(NamedTuple):
    """What ``backward`` gives, each in the shape and dtype of what it is the gradient of.

    Args:
        query: Of the queries, (batch, head, query, channel).
        key: Of the keys, (batch, kv_head, key, channel).
        value: Of the values, (batch, kv_head, key, value_channel).
        position_bias: Of the position bias, (1 or batch, 1 or head, query, key); ``None`` without one.
        sinks: Of the learned sinks, (head); ``None`` without them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position_bias: Tensor | None = None
    sinks: Tensor | None = None


def check_call(query: Tensor, key: Tensor, value: Tensor | None, visibility: Visibility, scoring: Scoring) -> None:
    """Whether the tensors of a call fit one another; every engine asks first.

    Raises:
        ValueError: The message names the tensor that does not fit, what was expected and what came.
    """
    shapes = [(t.shape, t.dtype, t.device) for t in (query, key, value) if t is not None]
    if scoring.plain and visibility.__dict__.get("_fitting") == shapes:
        # The layers of a model make the same call over and over.
        return
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected floats (batch, head, token, channel), got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device}, got one on {tensor.device}")
    batch, heads, num_queries, channels = query.shape
    kv_heads, held = key.shape[1], key.shape[2]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"key: expected KV heads that divide the {heads} query heads, got {kv_heads}")
    if key.shape[0] != batch or key.shape[3] != channels:
        raise ValueError(f"key: expected batch {batch} and {channels} channels like the query, got {tuple(key.shape)}")
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected batch, KV heads and tokens {tuple(key.shape[:3])} like the key, got {tuple(value.shape)}"
        )
    fits = visibility.batch == batch and visibility.num_queries == num_queries and 0 < visibility.num_keys <= held
    if not fits:
        raise ValueError(
            f"visibility: expected batch {batch}, {num_queries} queries and at most {held} keys, got batch "
            f"{visibility.batch}, {visibility.num_queries} queries and {visibility.num_keys} keys"
        )
    mask, bias, sinks = visibility.mask, scoring.position_bias, scoring.sinks
    if mask is not None and mask.shape[1] not in (1, heads):
        raise ValueError(f"mask: expected 1 or {heads} heads, got {mask.shape[1]}")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks: expected one per head, ({heads},), got {tuple(sinks.shape)}")
    expected = (num_queries, visibility.num_keys)
    if bias is not None and (
        bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads) or bias.shape[2:] != expected
    ):
        raise ValueError(
            f"position_bias: expected (1 or {batch}, 1 or {heads}, {num_queries}, {visibility.num_keys}), "
            f"got {tuple(bias.shape)}"
        )
    visibility.__dict__["_fitting"] = shapes


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of softmax and sums: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


_UNCHANGED = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast: under it a float32 product would be computed in half precision."""
    # Entered only where it changes something: it takes a fifth of the time of a decoding step's attention.
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _UNCHANGED
