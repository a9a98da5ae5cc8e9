"""What the report holds: every statistic of one row, at several levels of detail, and what it has to leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis import head_means, layer_evolution
from llama_attn.analysis.dataset import real_tokens
from llama_attn.analysis.layers import has_mean
from llama_attn.analysis.row import row_alone
from llama_attn.viz.figures.attention import bin_width
from llama_attn.viz.figures.multiples import pooled_maps
from llama_attn.viz.report.answer import OF_SEGMENT, ROWS, answer_parts, writers
from llama_attn.viz.report.embedding import Embedded, Level, Part, embed, embed_rounded
from llama_attn.viz.report.links import FEWEST_BINS, TOP_KEYS, first_seen, links_part
from llama_attn.viz.report.pooling import mean_of_known, pool_tokens, widths

if TYPE_CHECKING:
    import xarray
    from jaxtyping import Int

LAYER_AXES, HEAD_AXES, TOKEN_AXES = ("layer", "hidden_layer"), ("head", "kv_head"), ("query", "key")
# Statistics that have places of their own in the page, or none.
MAP, HISTOGRAM = "weights_map", "distance_histogram"
# What massive activations are found with.
OF_MASSIVE = ("hidden_max_channel", "hidden_top", "hidden_top_channel", "hidden_layer_median")
# As coarse as maps may become [bins].
FEWEST_MAP_BINS = 16
# How many times the size of another part single heads and maps may have before they are coarsened first.
WORTH_OF_HEADS, WORTH_OF_MAP = 2, 6


def one_row(dataset: xarray.Dataset, batch: int) -> xarray.Dataset:
    """One row of the batch without padding: axes as they were measured, layers and heads as in the model, one statistic per segment."""
    row = row_alone(dataset, batch)
    row = row.transpose(*LAYER_AXES, "batch", *HEAD_AXES, *TOKEN_AXES, ..., missing_dims="ignore")
    for axis in (*LAYER_AXES, *HEAD_AXES):
        # Nothing is sorted that is in order: a copy of a long run takes seconds.
        if axis in row.dims and not row.indexes[axis].is_monotonic_increasing:
            row = row.sortby(axis)
    if "segment_mass" in row:
        mass = row["segment_mass"]
        single = {f"{OF_SEGMENT}{name}": mass.isel(segment=i, drop=True) for i, name in enumerate(mass.segment.values)}
        for array in single.values():
            array.attrs = mass.attrs
        row = row.drop_vars("segment_mass").assign(single)
    return row


def from_the_first_token(row: xarray.Dataset) -> xarray.Dataset:
    """The row with all its tokens, without numbers of those that are no longer in the cache."""
    keys = row["key"].values
    if not keys[0]:
        return row
    return row.reindex(key=np.arange(keys[-1] + 1), fill_value={"visible_queries": 0, "key_token": ""})


def along_text(row: xarray.Dataset) -> list[str]:
    """Names of the statistics with a number per layer and token, and perhaps per head."""
    return [
        str(name)
        for name, values in row.data_vars.items()
        if has_mean(values)
        and set(values.dims) <= {*LAYER_AXES, *HEAD_AXES, *TOKEN_AXES, "batch"}
        and all(len(set(axes) & set(values.dims)) == 1 for axes in (LAYER_AXES, TOKEN_AXES))
        and len(set(HEAD_AXES) & set(values.dims)) <= 1
    ]


def not_shown(row: xarray.Dataset) -> list[str]:
    """Names of what was measured and has no place in the report."""
    shown = {*along_text(row), MAP, *TOP_KEYS, HISTOGRAM, *OF_MASSIVE, "visible_keys", "visible_queries"}
    if len(writers(row)):
        shown.add(ROWS)
    return [str(name) for name in row.data_vars if name not in shown]


def described(row: xarray.Dataset, name: str) -> dict[str, Any]:
    """What a statistic is, for the page."""
    values = row[name]
    (layer_axis,) = set(LAYER_AXES) & set(values.dims)
    (token_axis,) = set(TOKEN_AXES) & set(values.dims)
    return {
        "name": name,
        "unit": values.attrs.get("units", "?"),
        "meaning": values.attrs.get("long_name", ""),
        "source": values.attrs.get("source", ""),
        "layerAxis": layer_axis,
        "tokenAxis": token_axis,
        "headAxis": next((axis for axis in HEAD_AXES if axis in values.dims), None),
    }


def parts_of(row: xarray.Dataset, asked: Int[np.ndarray, " asked"]) -> list[Part]:
    """Everything that the page draws, ready to lose detail.

    Args:
        row: One row of the batch, with all its tokens.
        asked: Queries whose own lists of keys stay, as indices.
    """
    parts = [part for name in along_text(row) for part in _token_parts(row, name)]
    if MAP in row:
        parts.append(_map_part(row.isel(batch=0)))
    if all(name in row for name in TOP_KEYS):
        parts.append(links_part(row, asked))
    if HISTOGRAM in row:
        histogram = row[HISTOGRAM].isel(batch=0).transpose("layer", "head", ...).values
        parts.append(_fixed(HISTOGRAM, histogram))
    parts.extend(_summaries(row))
    parts.extend(answer_parts(row))
    real = real_tokens(row, "key").isel(batch=0).values.astype(np.uint8)
    parts.append(Part("real", [Level(real.size, lambda: {"real": embed(real)})]))
    if (seen := first_seen(row)) is not None:
        parts.append(Part("first seen", [Level(4 * seen.size, lambda: {"first_seen": embed(seen.astype(np.uint32))})]))
    return parts


def _fixed(name: str, values: np.ndarray) -> Part:
    numbers = np.ascontiguousarray(values, dtype=np.float32)
    return Part(name, [Level(numbers.nbytes, lambda: {name: embed(numbers)})])


def _summaries(row: xarray.Dataset) -> list[Part]:
    """Means per head, and the spread per layer, of every statistic along the text; not rounded."""
    names = along_text(row)
    if not names:
        return []
    evolution = layer_evolution(row[names])
    parts = [_fixed(f"layers {name}", evolution[name].values) for name in names]
    with_heads = [name for name in names if described(row, name)["headAxis"]]
    return parts + [_fixed(f"grid {name}", head_means(row, name).values) for name in with_heads]


def _token_parts(row: xarray.Dataset, name: str) -> list[Part]:
    about = described(row, name)
    axes = [axis for axis in (about["layerAxis"], about["headAxis"], about["tokenAxis"]) if axis]
    values = row[name].isel(batch=0).transpose(*axes).values
    if about["headAxis"] is None:
        return [Part(f"mean {name}", _token_levels(f"mean {name}", values))]
    mean = mean_of_known(values, 1)
    of_heads = [*_token_levels(f"heads {name}", values), Level(0, dict)]
    return [
        Part(f"mean {name}", _token_levels(f"mean {name}", mean)),
        Part(f"heads {name}", of_heads, WORTH_OF_HEADS),
    ]


def _token_levels(name: str, values: np.ndarray) -> list[Level]:
    """First 16 bits per number, then 8, then wider and wider bins of tokens."""
    length = values.shape[-1]
    rows = values.size // max(length, 1)

    def level(bits: int, width: int) -> Level:
        def make() -> dict[str, Embedded]:
            return {name: embed_rounded(pool_tokens(values, width), bits, width=width)}

        return Level(rows * -(-length // width) * bits // 8, make)

    return [level(16, 1), *(level(8, width) for width in widths(length, FEWEST_BINS))]


def _map_part(row: xarray.Dataset) -> Part:
    row = row.assign({MAP: row[MAP].transpose("layer", "head", "query_bin", "key_bin")})
    layers, heads, bins = row[MAP].shape[:3]
    width = bin_width(row)

    def level(bits: int, factor: int, mean: bool = False) -> Level:
        def make() -> dict[str, Embedded]:
            maps = pooled_maps(row, -(-bins // factor)).astype(np.float32)
            if mean:
                maps = mean_of_known(maps, 1)[:, None]
            return {MAP: embed_rounded(maps, bits, width=width * factor)}

        cells = (-(-bins // factor)) ** 2
        return Level(layers * (1 if mean else heads) * cells * bits // 8, make)

    factors = widths(bins, FEWEST_MAP_BINS)
    levels = [level(16, 1), *(level(8, factor) for factor in factors), level(8, factors[-1], mean=True)]
    return Part(MAP, levels, WORTH_OF_MAP)
