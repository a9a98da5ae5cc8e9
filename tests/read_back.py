"""Every figure read back from its artists, by the labels on its axes, and compared with what it was asked for."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

from asked import Asked
from own_text import own_ends, own_text
from read_answers import coverage, rows, sources
from read_maps import attention_map, comparison, layer_heads, model_view
from read_statistics import (
    distance_histogram,
    head_comparison,
    head_grid,
    head_roles,
    hidden_norms,
    kv_norms,
    layer_profile,
    massive_activations,
    token_strip,
)

from llama_attn import viz

# Those of tables (test_viz_tables.py) and of a picture (test_images.py) have tests of their own.
OF_MORE = {"plot_ablation", "plot_budget", "plot_image_rows"}
NAMES = [name for name in viz.__all__ if name.startswith("plot_") and name not in OF_MORE]


def of_own_text(read):
    """A figure of one row shows its own text alone; `head_comparison` is of all rows."""

    def of_row(figure, asked):
        first, stop = own_ends(asked.a, asked.batch)
        pairs = None if asked.pairs is None else asked.pairs[..., first:stop, first:stop]
        runs = {"a": own_text(asked.a, asked.batch), "b": own_text(asked.b, asked.batch)}
        read(figure, replace(asked, pairs=pairs, **runs))

    return read if read in (head_comparison, coverage) else of_row


READ_BACK = {
    f"plot_{read.__name__}": of_own_text(read)
    for read in (
        attention_map, comparison, distance_histogram, head_comparison, head_grid, head_roles, hidden_norms, kv_norms,
        layer_heads, layer_profile, massive_activations, model_view, token_strip, rows, sources, coverage,
    )
}  # fmt: skip


def drawn(name: str, asked: Asked):
    """The figure that the function makes of what was asked."""
    function = getattr(viz, name)
    known = inspect.signature(function).parameters
    sources = (asked.a, asked.b) if "a" in known else (asked.a,)
    return function(*sources, **options_of(name, asked))


def options_of(name: str, asked: Asked) -> dict[str, object]:
    """What the function takes; of most options None is what it does if it is not asked."""
    given = {field.name: getattr(asked, field.name) for field in fields(asked) if takes(name, field.name)}
    left_out = {key for key, value in given.items() if value is None and key not in ("layer", "head", "query_slice")}
    return {key: value for key, value in given.items() if key not in left_out | {"a", "b"}}


def takes(name: str, parameter: str) -> bool:
    return parameter in inspect.signature(getattr(viz, name)).parameters
