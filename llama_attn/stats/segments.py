"""Spans of the prompt whose attention mass is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_attn.stats.images import ImageSegments

Segments = Tensor | Sequence[Sequence[str | None]] | tuple[Tensor, Sequence[str]] | ImageSegments
"""Which part of the text every token belongs to, by number or by name."""
NumberedSegments = tuple[Tensor, tuple[str, ...]]

GENERATED, SPECIAL = "generated", "special"


def read_segments(segments: Segments) -> NumberedSegments:
    """Segments as integers, and their names.

    Args:
        segments: Integer tensor (batch, key) with −1 for "none", or one list of labels per row with None for it,
            or what `chat_segments` or `image_segments` returns.

    Raises:
        ValueError: Not two axes, floats, or a number below −1.
    """
    if isinstance(segments, ImageSegments):
        segments = segments.labels, segments.names
    if isinstance(segments, tuple) and len(segments) == 2 and isinstance(segments[0], Tensor):
        labels, names = _read_numbers(segments[0]), tuple(str(name) for name in segments[1])
        if int(labels.max()) >= len(names):
            raise ValueError(f"segments: expected a name for every number up to {int(labels.max())}, got {names}")
    elif isinstance(segments, Tensor):
        labels = _read_numbers(segments)
        names = tuple(str(index) for index in range(int(labels.max()) + 1))
        if not names:
            raise ValueError("segments: expected at least one segment, got only −1")
    else:
        labels, names = _read_labels(segments)
    return labels.long(), names


def add_generated(labels: Tensor, names: tuple[str, ...], num_keys: int) -> tuple[Tensor, tuple[str, ...]]:
    """Segments of a prompt, with one more for the tokens that were generated after it.

    Args:
        labels: Segments of the prompt, (batch, prompt).
        names: Their names.
        num_keys: Tokens fed so far, prompt included.
    """
    missing = num_keys - labels.shape[1]
    # A chunk of the prompt may be shorter than the prompt.
    labels = labels[:, :num_keys] if missing < 0 else torch.nn.functional.pad(labels, (0, missing), value=len(names))
    return labels, (*names, GENERATED)


def segments_of_keys(
    given: NumberedSegments, names: Sequence[str], keys: range, real_keys: Tensor | None = None
) -> Tensor:
    """Segment of every key of a run, (batch, key), int32: as given for the prompt, then those that were generated.

    Args:
        given: Segments of the prompt, and their names.
        names: Names of the segments of the run; one more if tokens were generated.
        keys: Positions of the keys [token].
        real_keys: Which keys are real, (batch, key), where a run knows; padding behind the end has no segment.
    """
    labels = given[0]
    if len(names) > len(given[1]):
        labels, _ = add_generated(*given, keys.stop)
    labels = labels[:, keys.start : keys.stop].int()
    if real_keys is None:
        return labels
    generated = torch.arange(keys.start, keys.stop, device=labels.device) >= given[0].shape[1]
    return labels.masked_fill(generated & ~real_keys.to(labels.device), -1)


def _read_numbers(segments: Tensor) -> Tensor:
    if segments.is_floating_point() or segments.is_complex() or segments.dtype == torch.bool:
        raise ValueError(f"segments: expected integers, got {segments.dtype}")
    if segments.ndim != 2 or not segments.numel():
        raise ValueError(f"segments: expected shape (batch, key), got {tuple(segments.shape)}")
    if int(segments.min()) < -1:
        raise ValueError(f"segments: expected −1 or more, got {int(segments.min())}")
    return segments


def _read_labels(segments: Sequence[Sequence[str | None]]) -> NumberedSegments:
    lengths = [len(row) for row in segments]
    if len(set(lengths)) != 1:
        raise ValueError(f"segments: expected rows of one length, got {len(lengths)} rows of lengths {lengths}")
    names = tuple(dict.fromkeys(label for row in segments for label in row if label is not None))
    if not names:
        raise ValueError("segments: expected at least one label, got only None")
    index: dict[str | None, int] = {name: i for i, name in enumerate(names)} | {None: -1}
    return torch.tensor([[index[label] for label in row] for row in segments]), names
