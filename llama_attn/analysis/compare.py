"""What differs between two runs: two models, two backends, or two prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from llama_attn.analysis.alignment import Pairs, align_tokens, how_much, ranks, usual_at
from llama_attn.analysis.dataset import as_dataset, direction_of
from llama_attn.analysis.layers import has_mean
from llama_attn.analysis.part import in_ranges, measured_part
from llama_attn.analysis.row import starts_of_text

if TYPE_CHECKING:
    import pandas
    import xarray

    from llama_attn.analysis.dataset import Source

LAYER_DIMS, HEAD_DIMS = ("layer", "hidden_layer"), ("head", "kv_head")
# Axes that mean the same in both runs only if the texts are the same.
TEXT_DIMS = ("query_bin", "key_bin", "distance_bin")
# How much is seen, which is not a statistic.
COUNTS = ("visible_keys", "visible_queries")
# What a statistic in float32 may be off by, as |a − b| / (1 + |b|): docs/error_budget.md.
ERROR = 1e-5


def compare(a: Source, b: Source) -> pandas.DataFrame:
    """Differences between two runs, b − a, largest first.

    Runs are aligned by name: the statistics, layers, heads and segments that both have. Tokens are aligned by what
    they are: if the texts differ, by the longest common runs of tokens of each row; without token strings, by
    position, which needs rows of the same length. Maps and histograms are compared only where the texts are aligned
    from the first to the last token. The queries of cross-attention, which are of another text, are aligned by
    position. Positions and channels are not numbers to subtract and are left out.

    A token that stands later sees more keys, which alone changes most statistics. Where aligned tokens stand at
    different positions, counted in real tokens, they are therefore matched: from each number goes what both runs have
    on average in this layer and head near its position p, from p / √2 to √2 p. Tokens at equal positions keep theirs.

    Args:
        a: Statistics of one run.
        b: Statistics of the other, with as many rows.

    Returns:
        One line per statistic, layer (hidden layer for the residual stream) and head (KV head for norms of keys and
        values; none where the statistic has no heads), sorted by effect; lines without data come last. The columns are

        - ``statistic``, ``layer``, ``head``;
        - ``mean_a``, ``mean_b`` and ``difference``, mean_b − mean_a, over the aligned tokens [the statistic's unit];
        - ``matched``, the mean difference at matched positions;
        - ``effect``, the root mean square of the token-by-token difference at matched positions over the standard
          deviation of the statistic, taken over all layers, heads and aligned tokens of both runs, or over its rounding
          error where that is larger [ratio];
        - ``largest``, the token-by-token difference of largest magnitude, with its ``batch``, its ``position`` in a,
          counted from the first token of the row's own text, and its ``token``.

        ``attrs`` hold

        - ``aligned``, ``tokens_a`` and ``tokens_b``, how many real tokens both texts have in common, a has and b has;
        - ``moved``, how many of those in common stand at different positions;
        - ``summary``, this in words;
        - ``warning``, why it is too little, or ``""``;
        - ``left_out``, a list of what was not compared, and why;
        - ``part_a`` and ``part_b``, what was measured of the models, if not all of them.

    Warns:
        UserWarning: Fewer than half of the tokens of the shorter text are aligned.

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
    starts = [starts_of_text(first, row) for row in range(len(pairs))]
    left_out = _in_one_only(first, second)
    for name in _statistics(first):
        if name not in second:
            continue
        if not has_mean(first[name]) or set(first[name].dims) != set(second[name].dims):
            left_out.append(f"{name}: not numbers to subtract")
        elif same_text or not set(TEXT_DIMS) & set(first[name].dims):
            lines.extend(_lines(name, first, second, pairs, starts))
        else:
            left_out.append(f"{name}: the texts differ")
    if not lines:
        raise ValueError(
            "b: has no statistic, layer and head in common with a, which has "
            f"{sorted(map(str, first.data_vars))} of layers {first['layer'].values.tolist()}"
        )
    # Not of pandas' own type of strings, which holds no halves of characters.
    tokens = pandas.Series([line.pop("token") for line in lines], dtype=object)
    frame = (
        pandas.DataFrame(lines)
        .assign(token=tokens)
        .astype({"layer": "Int64", "head": "Int64", "batch": "Int64", "position": "Int64"})
    )
    frame = frame.sort_values("effect", ascending=False, kind="stable", na_position="last", ignore_index=True)
    frame.attrs.update(how_much(first, second, pairs), left_out=left_out)
    frame.attrs.update(part_a=measured_part(first), part_b=measured_part(second))
    if frame.attrs["warning"]:
        warnings.warn(frame.attrs["warning"], stacklevel=2)
    return frame


def _statistics(dataset: xarray.Dataset) -> list[str]:
    return [
        str(name)
        for name, values in dataset.data_vars.items()
        if set(LAYER_DIMS) & set(values.dims) and name not in COUNTS
    ]


def _in_one_only(a: xarray.Dataset, b: xarray.Dataset) -> list[str]:
    """Statistics, layers and heads that only one run has."""
    alone = []
    for of, one, other in (("a", a, b), ("b", b, a)):
        alone += [f"{name}: in {of} only" for name in _statistics(one) if name not in other]
        for axis in ("layer", "head"):
            numbers = np.setdiff1d(one[axis].values, other[axis].values) if axis in one and axis in other else ()
            named = f"{axis}{'s' if len(numbers) > 1 else ''} {in_ranges([int(number) for number in numbers])}"
            alone += [f"{named}: in {of} only"] if len(numbers) else []
    return alone


def _lines(
    name: str, a: xarray.Dataset, b: xarray.Dataset, pairs: Pairs, starts: list[dict[str, int]]
) -> list[dict[str, object]]:
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
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    where: list[tuple[int, int]] = []
    for row, (at_a, at_b) in enumerate(pairs):
        if positions is None:
            at_a = at_b = np.array([-1])
        elif positions == "query" and direction_of(a) == "cross":
            at_a = at_b = np.intersect1d(a["query"].values, b["query"].values)
        else:
            at_a, at_b = _measured(at_a, at_b, a[positions].values, b[positions].values)
        cells = [_cells(array.isel(batch=row), layer_dim, head_dim, positions) for array in (left, right)]
        found = _at(cells, (a, b), row, positions, (at_a, at_b))
        parts.append(tuple(values.reshape(len(values), -1) for values in found))  # type: ignore[arg-type]
        where += [(row, at) for at in np.repeat(at_a, cells[0].shape[-1]).tolist()]
    labels = [
        (int(layer), None if head is None else int(head))
        for layer in left[layer_dim].values
        for head in ([None] if head_dim is None else left[head_dim].values)
    ]
    joined_a, joined_b, moves = (np.concatenate(values, axis=-1) for values in zip(*parts, strict=True))

    def place(row: int, at: int) -> tuple[int | None, str | None]:
        name = f"{positions}_token"
        if positions is None:
            return None, None
        return at - starts[row][positions], str(a[name].sel({positions: at}).values[row]) if name in a.coords else None

    return _measures(name, labels, joined_a, joined_b, moves, where, place)


def _measured(
    at_a: np.ndarray, at_b: np.ndarray, measured_a: np.ndarray, measured_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    both = np.isin(at_a, measured_a) & np.isin(at_b, measured_b)
    return at_a[both], at_b[both]


def _cells(
    array: xarray.DataArray, layer_dim: str, head_dim: str | None, positions: str | None
) -> Float[np.ndarray, "line position extra"]:
    """The numbers of one row of the batch: one line per layer and head; one position where there are none."""
    lines = [dim for dim in (layer_dim, head_dim) if dim]
    cells = array.transpose(*lines, *([positions] if positions else []), ...).values
    shape = np.prod(cells.shape[: len(lines)], dtype=int), array.sizes[positions] if positions else 1
    return cells.reshape(*shape, -1).astype(np.float64)


def _at(
    cells: list[np.ndarray],
    runs: tuple[xarray.Dataset, xarray.Dataset],
    row: int,
    positions: str | None,
    at: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers of both runs at aligned positions, and by how much those of b are larger for their position alone."""
    if positions is None:
        return cells[0], cells[1], np.zeros_like(cells[0])
    axes = [run[positions].values for run in runs]
    a, b = (part[:, np.searchsorted(axis, wanted)] for part, axis, wanted in zip(cells, axes, at, strict=True))
    if positions == "query" and direction_of(runs[0]) == "cross":
        return a, b, np.zeros_like(a)
    of_a, of_b = (ranks(run, row, wanted) for run, wanted in zip(runs, at, strict=True))
    if np.array_equal(of_a, of_b):
        return a, b, np.zeros_like(a)
    every = np.concatenate([ranks(run, row, axis) for run, axis in zip(runs, axes, strict=True)])
    both = np.concatenate(cells, axis=1)
    real = every >= 0
    usual_a, usual_b = (usual_at(both[:, real], every[real], wanted) for wanted in (of_a, of_b))
    return a, b, usual_b - usual_a


def _measures(
    name: str,
    labels: list[tuple[int, int | None]],
    a: Float[np.ndarray, "line cell"],
    b: Float[np.ndarray, "line cell"],
    moves: Float[np.ndarray, "line cell"],
    where: list[tuple[int, int]],
    places: Callable[[int, int], tuple[int | None, str | None]],
) -> list[dict[str, object]]:
    known = np.isfinite(a) & np.isfinite(b)
    # One unit of effect: how much the statistic varies at all, or, if it hardly does, how exact it is.
    both = np.concatenate([a[known], b[known]])
    scale = max(np.std(both), ERROR * (1 + np.abs(both).mean())) if known.any() else np.nan
    lines = []
    for (layer, head), of_a, of_b, moved, here in zip(labels, a, b, moves, known, strict=True):
        line: dict[str, object] = {"statistic": name, "layer": layer, "head": head}
        numbers = dict.fromkeys(("mean_a", "mean_b", "difference", "matched", "effect", "largest"), np.nan)
        batch = position = token = None
        if here.any():
            difference = np.where(here, of_b - of_a, 0.0)
            matched = (of_b - of_a - moved)[here]
            root_mean_square = np.sqrt(np.square(matched).mean())
            at = int(np.abs(difference).argmax())
            mean_a, mean_b = of_a[here].mean(), of_b[here].mean()
            effect = root_mean_square / scale if root_mean_square > 0 else 0.0
            numbers |= {"mean_a": mean_a, "mean_b": mean_b, "difference": mean_b - mean_a}
            numbers |= {"matched": matched.mean(), "effect": effect, "largest": difference[at]}
            batch, at_a = where[at]
            position, token = places(batch, at_a)
        lines.append(line | numbers | {"batch": batch, "position": position, "token": token})
    return lines
