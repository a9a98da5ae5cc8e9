"""Which tokens of two runs are the same, how many they are, and what their positions alone explain."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from llama_attn.analysis.dataset import real_tokens

if TYPE_CHECKING:
    import xarray

Pairs = list[tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]]
# Below this share of the shorter text, what differs may be the texts.
LEAST_ALIGNED = 0.5
# Numbers so near, as a factor to either side, tell what is usual at a position: within half an octave.
NEAR = 2**0.5


def align_tokens(a: xarray.Dataset, b: xarray.Dataset) -> Pairs:
    """For every row, which positions of ``a`` and ``b`` hold the same token of the same text.

    Raises:
        ValueError: A row has no token in common, or there are no token strings and the lengths differ.
    """
    pairs: Pairs = []
    for row in range(a.sizes["batch"]):
        real = [np.flatnonzero(real_tokens(run, "key").values[row]) for run in (a, b)]
        positions = [run["key"].values for run in (a, b)]
        if "key_token" in a.coords and "key_token" in b.coords:
            tokens = [run.key_token.values[row][keys].tolist() for run, keys in zip((a, b), real, strict=True)]
            at_a, at_b = _common_runs(*tokens)
            if not at_a:
                raise ValueError(f"b: row {row} has no token in common with that of a")
            pairs.append((positions[0][real[0][at_a]], positions[1][real[1][at_b]]))
        elif a.sizes["key"] == b.sizes["key"]:
            pairs.append((positions[0], positions[1]))
        else:
            raise ValueError(
                f"b: expected {a.sizes['key']} tokens as in a, got {b.sizes['key']}; texts of different length are "
                "aligned by their tokens: use AttentionStats.with_tokens on both"
            )
    return pairs


def _common_runs(a: Sequence[str], b: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of a common subsequence of long runs."""
    shorter = min(len(a), len(b))
    # What the texts begin with in common needs no search, which is slow for long texts.
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    blocks = SequenceMatcher(None, a[start:], b[start:], autojunk=False).get_matching_blocks()
    at_a, at_b = list(range(start)), list(range(start))
    for block in blocks:
        at_a += range(start + block.a, start + block.a + block.size)
        at_b += range(start + block.b, start + block.b + block.size)
    return at_a, at_b


def how_much(a: xarray.Dataset, b: xarray.Dataset, pairs: Pairs) -> dict[str, Any]:
    """How much of two texts is aligned: ``aligned, tokens_a, tokens_b, moved``, ``summary`` and ``warning``."""
    aligned = moved = 0
    for row, (at_a, at_b) in enumerate(pairs):
        of_a, of_b = ranks(a, row, at_a), ranks(b, row, at_b)
        real = (of_a >= 0) & (of_b >= 0)
        aligned += int(real.sum())
        moved += int((of_a != of_b)[real].sum())
    in_a, in_b = (int(real_tokens(run, "key").sum()) for run in (a, b))
    summary = f"{aligned:,} of {in_a:,} tokens aligned"
    summary += f" (b has {in_b:,})" if in_b != in_a else ""
    summary += f", {moved:,} of them at another position" if moved else ""
    few = aligned < LEAST_ALIGNED * min(in_a, in_b)
    return {
        "aligned": aligned,
        "tokens_a": in_a,
        "tokens_b": in_b,
        "moved": moved,
        "summary": summary,
        "warning": f"the texts have little in common: {summary}; what differs may be the texts" if few else "",
    }


def ranks(run: xarray.Dataset, row: int, positions: Int[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
    """How many real tokens of the row come before each position; −1 for padding."""
    real = real_tokens(run, "key").values[row]
    return np.where(real, np.cumsum(real) - 1, -1)[np.searchsorted(run["key"].values, positions)]


def usual_at(
    values: Float[np.ndarray, "line token extra"],
    at: Int[np.ndarray, " token"],
    wanted: Int[np.ndarray, " some"],
) -> Float[np.ndarray, "line some extra"]:
    """The mean over the numbers whose rank, counted from 1, is within a factor √2 of the wanted one."""
    order = np.argsort(at, kind="stable")
    at, values = at[order] + 1, values[:, order]
    known = np.isfinite(values)
    sums, counts = (
        np.concatenate([0 * part[:, :1], np.cumsum(part, 1)], 1)
        for part in (np.where(known, values, 0.0), known.astype(np.int64))
    )
    first = np.searchsorted(at, (wanted + 1) / NEAR, side="left")
    stop = np.searchsorted(at, (wanted + 1) * NEAR, side="right")
    with np.errstate(invalid="ignore"):
        return (sums[:, stop] - sums[:, first]) / (counts[:, stop] - counts[:, first])
