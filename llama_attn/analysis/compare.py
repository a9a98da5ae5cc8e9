"""What differs between two runs: two models, two backends, or two prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from llama_attn.analysis.dataset import as_dataset, direction_of, real_tokens

if TYPE_CHECKING:
    import pandas
    import xarray

    from llama_attn.analysis.dataset import Source

LAYER_DIMS, HEAD_DIMS = ("layer", "hidden_layer"), ("head", "kv_head")
# Axes that mean the same in both runs only if the texts are the same.
TEXT_DIMS = ("query_bin", "key_bin", "distance_bin")
# What a statistic in float32 may be off by, as |a − b| / (1 + |b|): docs/error_budget.md.
ERROR = 1e-5

Pairs = list[tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]]


def compare(a: Source, b: Source) -> pandas.DataFrame:
    """Differences between two runs, b − a, largest first.

    Runs are aligned by name: the statistics, layers, heads and segments that both have. Tokens are aligned by what
    they are: if the texts differ, by the longest common runs of tokens of each row; without token strings, by
    position, which needs rows of the same length. Maps and histograms are compared only where the texts are aligned
    from the first to the last token. The queries of cross-attention, which are of another text, are aligned by
    position. Positions and channels are not numbers to subtract and are left out.

    Args:
        a: Statistics of one run.
        b: Statistics of the other, with as many rows.

    Returns:
        One line per statistic, layer (hidden layer for the residual stream) and head (KV head for norms of keys and
        values; none where the statistic has no heads): ``statistic, layer, head``; ``mean_a, mean_b`` and
        ``difference`` = mean_b − mean_a over the aligned tokens [the statistic's unit]; ``effect``, the root mean
        square of the token-by-token difference over the standard deviation of the statistic, taken over all layers,
        heads and aligned tokens of both runs, or over its rounding error where that is larger [ratio]; ``largest``,
        the token-by-token difference of largest magnitude, with its ``batch``, its ``position`` in a and its
        ``token``. Sorted by effect; lines without data come last.

    Raises:
        ValueError: Nothing is common to both, or the texts cannot be aligned.
    """
    import pandas

    first, second = as_dataset(a), as_dataset(b)
    if first.sizes["batch"] != second.sizes["batch"]:
        raise ValueError(f"b: expected {first.sizes['batch']} rows as in a, got {second.sizes['batch']}")
    pairs = align_tokens(first, second)
    same_text = all(len(keys) == first.sizes["key"] == second.sizes["key"] for keys, _ in pairs)
    lines: list[dict[str, object]] = []
    for name in first.data_vars:
        if name not in second or not set(LAYER_DIMS) & set(first[name].dims):
            continue
        if not np.issubdtype(first[name].dtype, np.floating) or set(first[name].dims) != set(second[name].dims):
            continue
        if same_text or not set(TEXT_DIMS) & set(first[name].dims):
            lines.extend(_lines(str(name), first, second, pairs))
    if not lines:
        raise ValueError(
            "b: has no statistic, layer and head in common with a, which has "
            f"{sorted(map(str, first.data_vars))} of layers {first['layer'].values.tolist()}"
        )
    frame = pandas.DataFrame(lines).astype({"layer": "Int64", "head": "Int64", "batch": "Int64", "position": "Int64"})
    return frame.sort_values("effect", ascending=False, kind="stable", na_position="last", ignore_index=True)


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


def _lines(name: str, a: xarray.Dataset, b: xarray.Dataset, pairs: Pairs) -> list[dict[str, object]]:
    """The lines of one statistic."""
    import xarray

    dims = a[name].dims
    positions = next((str(dim) for dim in dims if dim in ("query", "key")), None)
    layer_dim = next(str(dim) for dim in dims if dim in LAYER_DIMS)
    head_dim = next((str(dim) for dim in dims if dim in HEAD_DIMS), None)
    free = {"batch", positions}
    left, right = xarray.align(a[name], b[name], join="inner", exclude=free & set(dims))
    if not left.sizes[layer_dim] or (head_dim and not left.sizes[head_dim]):
        return []
    values_a: list[np.ndarray] = []
    values_b: list[np.ndarray] = []
    where: list[tuple[int, int]] = []
    for row, (at_a, at_b) in enumerate(pairs):
        if positions is None:
            at_a = at_b = np.array([-1])
        elif positions == "query" and direction_of(a) == "cross":
            at_a = at_b = np.intersect1d(a["query"].values, b["query"].values)
        else:
            at_a, at_b = _measured(at_a, at_b, a[positions].values, b[positions].values)
        for values, array, at in ((values_a, left, at_a), (values_b, right, at_b)):
            values.append(_cells(array.isel(batch=row), layer_dim, head_dim, positions, at))
        extra = values_a[-1].shape[-1] // max(len(at_a), 1)
        where += [(row, at) for at in np.repeat(at_a, extra).tolist()]
    labels = [
        (int(layer), None if head is None else int(head))
        for layer in left[layer_dim].values
        for head in ([None] if head_dim is None else left[head_dim].values)
    ]
    joined_a, joined_b = np.concatenate(values_a, axis=-1), np.concatenate(values_b, axis=-1)

    def token(row: int, position: int) -> str | None:
        name = f"{positions}_token"
        return str(a[name].sel({positions: position}).values[row]) if name in a.coords else None

    return _measures(name, labels, joined_a, joined_b, where, token)


def _measured(
    at_a: np.ndarray, at_b: np.ndarray, measured_a: np.ndarray, measured_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    both = np.isin(at_a, measured_a) & np.isin(at_b, measured_b)
    return at_a[both], at_b[both]


def _cells(
    array: xarray.DataArray, layer_dim: str, head_dim: str | None, positions: str | None, at: np.ndarray
) -> Float[np.ndarray, "line cell"]:
    """The numbers of one row of the batch at some positions: one line per layer and head."""
    if positions is not None:
        array = array.sel({positions: at})
    lines = [dim for dim in (layer_dim, head_dim) if dim]
    cells = array.transpose(*lines, *([positions] if positions else []), ...).values
    return cells.reshape(np.prod(cells.shape[: len(lines)], dtype=int), -1).astype(np.float64)


def _measures(
    name: str,
    labels: list[tuple[int, int | None]],
    a: Float[np.ndarray, "line cell"],
    b: Float[np.ndarray, "line cell"],
    where: list[tuple[int, int]],
    tokens: Callable[[int, int], str | None],
) -> list[dict[str, object]]:
    known = np.isfinite(a) & np.isfinite(b)
    # One unit of effect: how much the statistic varies at all, or, if it hardly does, how exact it is.
    both = np.concatenate([a[known], b[known]])
    scale = max(np.std(both), ERROR * (1 + np.abs(both).mean())) if known.any() else np.nan
    lines = []
    for (layer, head), of_a, of_b, here in zip(labels, a, b, known, strict=True):
        line: dict[str, object] = {"statistic": name, "layer": layer, "head": head}
        numbers = dict.fromkeys(("mean_a", "mean_b", "difference", "effect", "largest"), np.nan)
        batch = position = token = None
        if here.any():
            difference = np.where(here, of_b - of_a, 0.0)
            root_mean_square = np.sqrt(np.square(difference[here]).mean())
            at = int(np.abs(difference).argmax())
            mean_a, mean_b = of_a[here].mean(), of_b[here].mean()
            effect = root_mean_square / scale if root_mean_square > 0 else 0.0
            numbers |= {"mean_a": mean_a, "mean_b": mean_b, "difference": mean_b - mean_a}
            numbers |= {"effect": effect, "largest": difference[at]}
            batch, position = where[at]
            position = None if position < 0 else position
            token = None if position is None else tokens(batch, position)
        lines.append(line | numbers | {"batch": batch, "position": position, "token": token})
    return lines
