"""Statistics along the text, one panel each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis import as_dataset, require, sink_positions
from llama_attn.analysis.dataset import check_measured
from llama_attn.analysis.row import row_alone
from llama_attn.viz.figures.along import (
    MOST_POINTS,
    MOST_TOKENS,
    draw_line,
    draw_steps,
    name_outliers,
    of_bins,
    width_of,
    write_names,
)
from llama_attn.viz.figures.canvas import add_legend, entitle, label_axes
from llama_attn.viz.style import (
    AMBER,
    BLUE,
    ORANGE,
    about,
    empty_figure,
    label_tokens,
    of_head,
    of_segment,
    pick,
    pick_head,
    pick_segment,
    say_no_data,
    spiky,
    tokens_of,
    unit_of,
    written,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source

PANELS = ("received", "sink_mass", "hidden_norm", "key_norm", "value_norm")
# Height of a panel, alone or in one of several rows of tokens, and of the tokens below it [inches].
PANEL, PANEL_IN_ROWS, BELOW = 1.5, 0.8, 0.7


def plot_token_strip(
    source: Source,
    *,
    layer: int = 0,
    head: int | None = None,
    batch: int = 0,
    statistics: Sequence[str] | None = None,
    segment: str | None = None,
) -> Figure:
    """Statistics along the text, under each other: which tokens receive attention, and how large their states are.

    More than 160 tokens are written in several rows. Beyond 800, or where tokens are not known, there is one row that
    names those that stand out; beyond 800 points are means over several tokens, and the title says of how many. Marks
    in ``received`` are sinks, as `llama_attn.analysis.sink_positions` finds them: of the head, or of any of the layer.

    Args:
        source: Statistics with some of those to show.
        layer: Index of the layer; of the residual stream, what enters it.
        head: Index of the query head; None for the mean over heads. Norms of keys and values are always the mean
            over KV heads.
        batch: Row of the batch.
        statistics: What to show; None for those of ``received``, ``sink_mass``, ``hidden_norm``, ``key_norm`` and
            ``value_norm`` that were measured.
        segment: Name of the segment, for ``segment_mass``.

    Raises:
        ValueError: A statistic, layer, head, segment or row was not measured, or a statistic is not one of tokens.
    """
    dataset = as_dataset(source)
    if statistics is None:
        statistics = [name for name in PANELS if name in dataset] or PANELS[:1]
    if isinstance(statistics, str) or not isinstance(statistics, Sequence) or not statistics:
        raise ValueError(f"statistics: expected names, such as {list(PANELS[:2])}, got {statistics!r}")
    require(dataset, *statistics)
    divided = [name for name in statistics if "segment" in dataset[name].dims]
    row = pick(pick_segment(dataset, statistics, segment), layer=layer, batch=batch)
    if head is not None:
        # The title names it, also where no statistic has heads.
        check_measured(dataset, "head", head)
    if "hidden_layer" in row.dims:
        row = row.sel(hidden_layer=layer)
    values = [_along_text(row[name], head) for name in statistics]
    keys, tokens = row["key"].values, tokens_of(row, "key")
    rows = _rows(keys, tokens)
    height = (PANEL if len(rows) == 1 else PANEL_IN_ROWS) * len(values) + BELOW
    figure = empty_figure((width_of(len(keys)), 0.5 + height * len(rows)))
    panels = figure.subplots(len(rows) * len(values), 1, squeeze=False)[:, 0].reshape(len(rows), len(values))
    for column, name, along in zip(panels.T, statistics, values, strict=True):
        label = written(name.replace("_", " ")) + (f"\n{of_segment(segment).strip()}" if name in divided else "")
        for axes, held in zip(column, rows, strict=True):
            _draw_panel(axes, along.isel({along.dims[0]: np.isin(along[along.dims[0]], held)}))
            label_axes(axes, y=f"{label}\n{unit_of(along)}", fontsize=9 if len(rows) == 1 else 7)
            # Rows of one statistic can be compared.
            axes.sharey(column[0])
        if not _is_share(along) and spiky(along.values):
            column[0].set_yscale("log")
        if len(keys) > MOST_TOKENS and len(rows) == 1 and not _is_share(along):
            positions = along[along.dims[0]].values
            name_outliers(
                column[0], positions, along.values, tokens if along.dims == ("key",) else tokens_of(row, "query")
            )
    for line, held in zip(panels, rows, strict=True):
        for axes in line:
            axes.set_xlim(held[0] - 0.7, held[0] + len(rows[0]) - 0.3)
            axes.tick_params(labelbottom=axes is line[-1])
        label_tokens(
            line[-1], "x", held.tolist(), tokens and tokens[held[0] - keys[0] :][: len(held)], most=MOST_TOKENS
        )
    label_axes(panels[-1, -1], "position [token]")
    if "received" in statistics:
        at = list(statistics).index("received")
        sinks = _sinks(row_alone(dataset, batch).sel(layer=[layer]), head)
        _mark_sinks(
            figure, panels[:, at], rows, values[at].values, sinks, tokens, of="any head" if head is None else "the head"
        )
    part = f"layer {layer}, {of_head(dataset, head)}{of_bins(len(keys))}"
    entitle(figure, f"Along the text, {part}", about(dataset, batch))
    return figure


def _rows(keys: np.ndarray, tokens: Sequence[str] | None) -> list[np.ndarray]:
    """The positions of each row of tokens, as equal as can be; a single row where tokens are not written."""
    if tokens is None or len(keys) > MOST_POINTS:
        return [keys]
    return np.array_split(keys, -(-len(keys) // MOST_TOKENS))


def _is_share(values: xarray.DataArray) -> bool:
    return values.attrs.get("units") == "probability"


def _draw_panel(axes: Axes, along: xarray.DataArray) -> None:
    """Steps from 0 for shares; a line for magnitudes, which differ by factors."""
    positions = along[along.dims[0]].values
    if len(positions):
        if _is_share(along):
            draw_steps(axes, positions, along.values, BLUE)
        else:
            draw_line(axes, positions, along.values, ORANGE, linewidth=1, marker="o", markersize=2.5)
    axes.grid(alpha=0.4)
    say_no_data(axes, along.values)


def _sinks(dataset: xarray.Dataset, head: int | None) -> np.ndarray:
    """Whether each key is a sink of the head, or of any."""
    sinks = sink_positions(dataset).sink.isel(layer=0, batch=0)
    return (sinks.any("head") if head is None else sinks.sel(head=head)).values


def _mark_sinks(
    figure: Figure, panels: np.ndarray, rows: list[np.ndarray], received: np.ndarray, sinks: np.ndarray,
    tokens: list[str] | None, *, of: str,
) -> None:  # fmt: skip
    if not sinks.any():
        return
    keys = np.concatenate(rows)
    for axes, held in zip(panels, rows, strict=True):
        here = sinks & np.isin(keys, held)
        (marks,) = axes.plot(
            keys[here], received[here], linestyle="none", marker="v", color=AMBER, label=f"sink of {of}"
        )
        if len(rows) == 1 and len(keys) > MOST_TOKENS:
            write_names(axes, keys, received, tokens, np.where(sinks, received, 0))
    add_legend(figure, None, [marks], loc="outside lower right")


def _along_text(values: xarray.DataArray, head: int | None) -> xarray.DataArray:
    """One number per token."""
    if "head" in values.dims:
        values = pick_head(values, head)
    if "kv_head" in values.dims:
        values = values.mean("kv_head", skipna=False, keep_attrs=True)
    if values.dims not in (("query",), ("key",)):
        raise ValueError(f"statistics: expected statistics of tokens, got {values.name!r} with axes {values.dims}")
    return values
