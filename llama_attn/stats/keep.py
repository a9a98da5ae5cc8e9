"""Which keys are kept: the mask that ``kept_mass`` is measured under."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

Keep = Bool[Tensor, "layer batch kv_head key"]
DIMS = ("layer", "batch", "kv_head", "key")


def read_keep(keep: Any) -> Keep:
    """A mask of kept keys with all its axes, of which layer and KV head may have length 1 for "all alike".

    Args:
        keep: True for kept: (batch, key) or (layer, batch, kv_head, key), a tensor or what `keep_mask` returns.

    Raises:
        ValueError: Another shape or type, or a row that keeps nothing.
    """
    dims = getattr(keep, "dims", DIMS)
    if not isinstance(keep, Tensor):
        if tuple(dims) != DIMS:
            raise ValueError(f"keep: expected the axes {DIMS}, got {tuple(dims)}")
        keep = torch.as_tensor(getattr(keep, "values", keep))
    if keep.dtype != torch.bool or keep.ndim not in (2, 4) or not keep.numel():
        raise ValueError(
            f"keep: expected booleans (batch, key) or {DIMS}, got {keep.dtype} of shape {tuple(keep.shape)}"
        )
    keep = keep.detach() if keep.ndim == 4 else keep.detach()[None, :, None]
    nothing = ~keep.any(-1)
    if bool(nothing.any()):
        layer, row, head = nothing.nonzero()[0].tolist()
        raise ValueError(f"keep: nothing is kept in layer {layer}, row {row}, KV head {head} of the mask")
    return keep


def with_later(keep: Keep, num_keys: int) -> Keep:
    """The mask for so many keys: those beyond its length are kept."""
    missing = num_keys - keep.shape[-1]
    return pad(keep, (0, missing), value=True) if missing > 0 else keep[..., :num_keys]
