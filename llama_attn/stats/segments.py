"""Spans of the prompt whose attention mass is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_attn.stats.config import Segments


def read_segments(
    segments: Segments | None, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Segments as integers, and their names.

    Args:
        segments: Integer tensor (batch, key) with −1 for "none", or one list of labels per row with None for it.
        shape: The (batch, key) that they must have.
        device: Where the integers are needed.

    Raises:
        ValueError: Another shape, floats, or a number below −1.
    """
    if segments is None:
        return None, None
    if isinstance(segments, Tensor):
        if segments.is_floating_point() or segments.is_complex() or segments.dtype == torch.bool:
            raise ValueError(f"segments: expected integers, got {segments.dtype}")
        if tuple(segments.shape) != shape:
            raise ValueError(f"segments: expected shape {shape}, got {tuple(segments.shape)}")
        if segments.numel() and int(segments.min()) < -1:
            raise ValueError(f"segments: expected −1 or more, got {int(segments.min())}")
        count = int(segments.max()) + 1 if segments.numel() else 0
        if count == 0:
            raise ValueError("segments: expected at least one segment, got only −1")
        return segments.to(device=device, dtype=torch.long), tuple(str(index) for index in range(count))
    lengths = [len(row) for row in segments]
    if len(lengths) != shape[0] or any(length != shape[1] for length in lengths):
        raise ValueError(f"segments: expected shape {shape}, got {len(lengths)} rows of lengths {lengths}")
    names = tuple(dict.fromkeys(label for row in segments for label in row if label is not None))
    if not names:
        raise ValueError("segments: expected at least one label, got only None")
    index: dict[str | None, int] = {name: i for i, name in enumerate(names)} | {None: -1}
    return torch.tensor([[index[label] for label in row] for row in segments], device=device), names
