"""What every engine gives back, and the precision it computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Walk(NamedTuple):
    """What one walk over a layer gives.

    Args:
        output: Attention output, (batch, query, head, channel); ``None`` without values.
        logsumexp: ln Σ_j exp s_ij of every row, padding included, (batch, head, query).
        raw: Running sums and rows of each statistic, before padding is marked.
    """

    output: Float[Tensor, "batch query head channel"] | None
    logsumexp: Float[Tensor, "batch head query"]
    raw: dict[str, Tensor]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of softmax and sums: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast: under it a float32 product would be computed in half precision."""
    # Entered only where it changes something: it takes a fifth of the time of a decoding step's attention.
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
