"""Pictures in prompts of runs that never were: which tokens stand for them, and pixels of any kind."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from own_text import own_ends, real_tokens
from PIL import Image

from llama_attn import AttentionStats
from llama_attn.stats.images import ImageSegments, ImageSpan


@st.composite
def prompts(draw, stats: AttentionStats) -> ImageSegments:
    """In every row up to two images among its tokens, behind which some may have been generated."""
    images = []
    labels = torch.full((stats.batch, stats.num_keys), -1)
    for batch in range(stats.batch):
        real = real_tokens(stats, batch)
        labels[batch, torch.from_numpy(real)] = 0
        spans: list[ImageSpan] = []
        # Images lie in one piece.
        for run in np.split(np.arange(len(real)), np.flatnonzero(np.diff(real)) + 1):
            if real[run[0]] and len(spans) < 2:
                rows = draw(st.integers(1, min(3, len(run))))
                columns = draw(st.integers(1, len(run) // rows))
                first = int(run[0]) + draw(st.integers(0, len(run) - rows * columns))
                spans.append(ImageSpan(first, first + rows * columns, (rows, columns)))
                labels[batch, first : spans[-1].stop] = len(spans)
        images.append(tuple(spans))
    return ImageSegments(tuple(images), ("text", "image 0", "image 1"), labels)


def rows_of_prompt(stats: AttentionStats, segments: ImageSegments, batch: int, layer: int) -> list[int]:
    """Positions in the text of the queries whose weights are known in the layer."""
    first, stop = own_ends(stats, batch)
    weights = stats["row_weights"][stats.layers.index(layer), batch].numpy()
    finite = np.isfinite(weights).any((0, 2))
    return [row - first for row, known in zip(stats.rows, finite, strict=True) if known and first <= row < stop]


def _pixels(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 999)
IMAGES: dict[str, st.SearchStrategy] = {
    "grey": st.builds(_pixels, SIZES, SEEDS),
    "colours": st.builds(lambda size, seed: _pixels((*size, 3), seed), SIZES, SEEDS),
    "integers": st.builds(lambda size, seed: (255 * _pixels((*size, 4), seed)).astype(np.uint8), SIZES, SEEDS),
    "of PIL": st.builds(
        lambda size, seed: Image.fromarray((255 * _pixels((*size, 3), seed)).astype(np.uint8)), SIZES, SEEDS
    ),
}


def brightness(image: np.ndarray | Image.Image) -> np.ndarray:
    """As television weighs red, green and blue (ITU-R BT.601), from 0 to 1."""
    pixels = np.asarray(image)
    pixels = pixels / (255 if pixels.dtype == np.uint8 else 1)
    return pixels if pixels.ndim == 2 else 0.299 * pixels[..., 0] + 0.587 * pixels[..., 1] + 0.114 * pixels[..., 2]
