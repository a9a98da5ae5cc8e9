"""Where the images of a prompt stand among its tokens, and how their tokens lie in the picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llama_attn.stats.integers import as_integer
from llama_attn.stats.token_ids import Row, read_ids, read_rows

Grid = tuple[int, int]
"""Rows and columns of the patches of a picture."""

TEXT = "text"
# Processors that stretch every picture to a square, whose tokens, `image_seq_length` of them, lie in it row by row.
SQUARE = ("Gemma3Processor", "PaliGemmaProcessor")


@dataclass(frozen=True)
class ImageSpan:
    """The tokens of one image in one row of the batch.

    Args:
        first: Position of the first of them, padding counted [token].
        stop: Position behind the last [token].
        grid: Rows and columns in which they lie in the picture; the first row comes first, from left to right.
    """

    first: int
    stop: int
    grid: Grid


@dataclass(frozen=True)
class ImageSegments:
    """The images of a batch of prompts. ``AttentionStatsConfig(segments=…)`` takes it as it is.

    Args:
        images: The images of every row of the batch, in the order of the prompt.
        names: ``text``, ``image 0``, ``image 1`` … as far as the row with most images goes.
        labels: Which of the names every token has, (batch, key); −1 for padding and for tokens of videos and sounds.
    """

    images: tuple[tuple[ImageSpan, ...], ...]
    names: tuple[str, ...]
    labels: Int[Tensor, "batch key"] = field(compare=False, repr=False)


def image_segments(processor_output: Any, processor: Any, *, grid: Grid | None = None) -> ImageSegments:
    """Which tokens of the prompts stand for which image, and how they lie in it.

    The grid is what the processor says: ``image_grid_thw`` over ``merge_size`` (Qwen2-VL and all that work like it), or
    a square of ``image_seq_length`` tokens (Gemma 3, PaliGemma). Tiles and crops that a processor cuts out of a picture
    (pan and scan) are images of their own.

    Args:
        processor_output: What the processor returned: ``input_ids`` (batch, key) or (key), with the ``attention_mask`` if
            they are padded.
        processor: The processor that made it.
        grid: Rows and columns of tokens of every image, for processors that do not tell.

    Raises:
        ValueError: The grid is not known, the tokens do not fill it, or no token stands for an image.
    """
    rows = read_rows(processor_output)
    token = _image_token(processor)
    grids, told = _grids(processor_output, processor, grid)
    images = tuple(tuple(_spans(row, number, token, grids)) for number, row in enumerate(rows))
    count = sum(map(len, images))
    if not count:
        raise ValueError(f"input_ids: expected tokens of images (id {token}), got none in {len(rows)} rows")
    if told is not None and count != told:
        raise ValueError(f"image_grid_thw: expected a grid for each of {count} images in the prompts, got {told}")
    names = (TEXT, *(f"image {index}" for index in range(max(map(len, images)))))
    others = {getattr(processor, f"{kind}_token_id", None) for kind in ("video", "audio")} - {None, token}
    labels = torch.full((len(rows), len(rows[0].ids)), -1)
    for number, (row, spans) in enumerate(zip(rows, images, strict=True)):
        for at in row.real or range(len(row.ids)):
            if row.ids[at] not in others:
                labels[number, at] = 0
        for index, span in enumerate(spans):
            labels[number, span.first : span.stop] = 1 + index
    return ImageSegments(images, names, labels)


def _image_token(processor: Any) -> int:
    # Gemma's processor calls the token that is written before it is expanded its image token; its tokenizer does not.
    for owner in (getattr(processor, "tokenizer", None), processor):
        if (token := getattr(owner, "image_token_id", None)) is not None:
            return int(token)
    raise ValueError(f"processor: expected one with an image_token_id, got {type(processor).__name__}")


def _grids(inputs: Any, processor: Any, grid: Grid | None) -> tuple[Iterator[Grid], int | None]:
    """The grids of all images of the batch in order, and how many they are; None if all images have the same."""
    if grid is not None:
        return itertools.repeat(_read_grid(grid)), None
    name = type(processor).__name__
    if isinstance(inputs, Mapping) and inputs.get("image_grid_thw") is not None:
        merge = getattr(getattr(processor, "image_processor", None), "merge_size", None)
        if merge is not None:
            patches = read_ids(inputs, "image_grid_thw").tolist()
            return iter([_merged(image, merge) for image in patches]), len(patches)
    elif {base.__name__ for base in type(processor).__mro__} & {*SQUARE}:
        length = processor.image_seq_length
        side = math.isqrt(length)
        if side * side == length:
            return itertools.repeat((side, side)), None
        raise ValueError(
            f"processor: expected a square of tokens, got image_seq_length={length}; give grid=(rows, columns)"
        )
    raise ValueError(
        f"processor: how the tokens of an image lie is known with image_grid_thw and a merge_size, and of {list(SQUARE)}, "
        f"not of {name}; give grid=(rows, columns)"
    )


def _read_grid(grid: Any) -> Grid:
    try:
        rows, columns = map(as_integer, grid)
        if rows > 0 and columns > 0:
            return rows, columns
    except (TypeError, ValueError):
        pass
    raise ValueError(f"grid: expected two positive integers (rows, columns), got {grid!r}")


def _merged(patches: list[int], merge: int) -> Grid:
    """The grid of tokens, of frames, rows and columns of patches."""
    if len(patches) != 3 or patches[0] != 1 or patches[1] % merge or patches[2] % merge:
        raise ValueError(
            f"image_grid_thw: expected 1 frame and multiples of merge_size={merge} rows and columns, got {patches}"
        )
    return patches[1] // merge, patches[2] // merge


def _spans(row: Row, number: int, token: int, grids: Iterator[Grid]) -> Iterator[ImageSpan]:
    """The images of one row, each with the next of the grids."""
    first = 0
    while token in row.ids[first:]:
        first = row.ids.index(token, first)
        found = next(grids, None)
        if found is None:
            raise ValueError(
                f"image_grid_thw: row {number} of input_ids has tokens of more images than there are grids"
            )
        stop = first + found[0] * found[1]
        length = next((i for i, here in enumerate(row.ids[first:]) if here != token), len(row.ids) - first)
        if first + length < stop:
            raise ValueError(
                f"input_ids: expected {found[0]} × {found[1]} tokens of an image from position {first} of row {number}, "
                f"got {length}"
            )
        yield ImageSpan(first, stop, found)
        first = stop
