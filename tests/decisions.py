"""What `rows` and `keep` of a configuration mean, by hand."""

from __future__ import annotations

import torch

from llama_attn import AttentionStatsConfig


def rows_at(config: AttentionStatsConfig, positions) -> list[int]:
    """Where the chosen rows stand among queries at ``positions``."""
    positions = [int(position) for position in positions]
    if config.rows == "generated":
        raise NotImplementedError("what was generated is not known here")
    stop = positions[-1] + 1
    wanted = range(stop)[config.rows] if isinstance(config.rows, slice) else [row % stop for row in config.rows]
    return [at for at, position in enumerate(positions) if position in wanted]


def kept_keys(config: AttentionStatsConfig, layer: int, length: int) -> torch.Tensor | None:
    """Which keys are kept in the ``layer``-th of the measured layers, (batch, 1 or kv_head, key)."""
    if config.keep is None:
        return None
    keep = config.keep if config.keep.ndim == 4 else config.keep[None, :, None]
    keep = keep[layer if len(keep) > 1 else 0]
    later = torch.ones(*keep.shape[:2], max(0, length - keep.shape[2]), dtype=torch.bool)
    return torch.cat([keep, later], -1)[..., :length]
