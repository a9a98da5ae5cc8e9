"""The interactive report: one HTML file that needs no network."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis import as_dataset, classify_heads, massive_activations, require
from llama_attn.analysis.activations import MAGNITUDE, RATIO, needed
from llama_attn.analysis.dataset import check_measured, direction_of, real_tokens, without_attention
from llama_attn.analysis.heads import NEEDED
from llama_attn.analysis.part import measured_layers, named_layers
from llama_attn.analysis.row import row_alone, unasked_keys
from llama_attn.stats.files import complete_file
from llama_attn.stats.token_text import readable
from llama_attn.viz.report.answer import about_answer
from llama_attn.viz.report.assembly import LONGEST_TOKEN, Shell, bytes_of, name_of, plotly_code, shown_token
from llama_attn.viz.report.contents import (
    HISTOGRAM,
    MAP,
    along_text,
    described,
    from_the_first_token,
    not_shown,
    one_row,
    parts_of,
)
from llama_attn.viz.report.findings import findings
from llama_attn.viz.report.links import TOP_KEYS, asked_queries, first_generated
from llama_attn.viz.style import tokens_of

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source
    from llama_attn.viz.report.links import Positions

PAGE = Shell(
    "page",
    ("page",),
    (
        "data", "words", "colours", "choosing", "boxes", "drawing", "pictures", "frame",
        "state", "lists", "shades", "text", "links", "maps", "charts", "answer", "main",
    ),
    "run",
)  # fmt: skip
# So many characters of the text stand in the title.
OPENING = 60
# What the page has a place for; what is missing is named.
WANTED = (
    "received", "entropy", "sink_mass", "local_mass", "mean_distance", MAP, *TOP_KEYS, HISTOGRAM,
    "previous_token", "duplicate_token", "induction", "hidden_norm", "hidden_max", "hidden_max_channel",
    "hidden_median", "key_norm", "value_norm",
)  # fmt: skip


def report(
    source: Source,
    path: str | os.PathLike[str],
    *,
    max_megabytes: float = 12,
    batch: int = 0,
    exact: Positions | None = None,
) -> Path:
    """Write one HTML file that shows a run: findings in words, what the answer draws on, the text, maps, heads, layers and norms.

    It opens from the file system in any browser of 2024 or later and makes no request. Statistics that were not
    measured are left out and named. Numbers are rounded to 16 bits, on a scale that keeps small ones apart. If they do
    not fit, they are rounded to 8 bits, then pooled over bins of tokens, then over heads; the page says which were and
    by how much. Means per head and per layer are never rounded.

    Where the most attended keys of every query do not fit, some queries keep their own and the others are pooled: first
    those that ``exact`` names, then generated tokens (known where ``segments`` were given), the last ones of the
    prompt, ends of segments, and as many others as there is room for, from the last. The page says which is which.

    Args:
        source: Any statistics.
        path: Where to; the file appears under its name only once it is complete.
        max_megabytes: Largest size of the file [10⁶ bytes]; about 2 of them are plotly.
        batch: Row of the batch. It is shown as its own text: positions are counted from its first token.
        exact: Positions of queries whose own most attended keys must be in the page [token]: integers, negative ones
            from the end of the row, or slices.

    Returns:
        The path.

    Raises:
        ImportError: xarray, pandas or plotly is not installed.
        ValueError: The row was not measured or is all padding, it is of cross-attention, or the report does not fit
            into ``max_megabytes`` however much is pooled; or ``exact`` names no measured query, or there are no
            ``topk_weight`` and ``topk_position``.
        FileNotFoundError: The folder does not exist.
    """
    most = bytes_of(max_megabytes)
    plotly_code()
    dataset = as_dataset(source)
    require(dataset, "visible_keys", "visible_queries")
    if direction_of(dataset) == "cross":
        raise ValueError(
            "source: the report shows one text, and cross-attention has two; use the figures of llama_attn.viz"
        )
    check_measured(dataset, "batch", batch)
    if not (dataset.visible_queries.sel(batch=batch) > 0).any():
        raise ValueError(f"batch: row {batch} is all padding")
    row = one_row(dataset, batch)
    asked = asked_queries(row, exact)
    with complete_file(path) as unfinished:
        # In words, segments are parts of one statistic.
        found = [asdict(finding) for finding in findings(row_alone(dataset, batch))]
        about = _about(row) | {"findings": found, "row": int(batch), "rows": dataset.sizes["batch"]}
        parts = parts_of(from_the_first_token(row), asked)
        unfinished.write_text(PAGE.fitting(about, parts, most), "utf-8")
    return Path(path)


def _about(row: xarray.Dataset) -> dict[str, Any]:
    """Everything but the arrays, as plain JSON types."""
    tokens = tokens_of(from_the_first_token(row).isel(batch=0), "key")
    first, last = (int(row["key"].values[end]) for end in (0, -1))
    absent = without_attention(row)
    hidden = row["hidden_layer"].values.tolist() if "hidden_layer" in row.dims else []
    layers = row["layer"].values.tolist() if "layer" in row.dims else hidden[:-1]
    total = int(row.attrs.get("num_layers", len(layers)))
    return {
        "model": name_of(str(row.attrs.get("model", ""))),
        "backend": str(row.attrs.get("backend", "")),
        "engine": str(row.attrs.get("engine", "")),
        "replayed": bool(row.attrs.get("replayed", 0)),
        "layers": layers,
        "hiddenLayers": hidden,
        "numLayers": total,
        # Which layers speak, where not all that could do.
        "part": measured_layers(row),
        "heads": row["head"].values.tolist() if "head" in row.dims else [],
        "kvHeads": row["kv_head"].values.tolist() if "kv_head" in row.dims else [],
        "withoutAttention": named_layers(absent) if absent else "",
        "length": last + 1,
        # Those that are text or padding, which nothing says.
        "unasked": int(unasked_keys(row).sum()),
        "firstKey": first,
        # Where the first bin of the maps begins: before the text if it holds padding too.
        "mapStart": int(row["key_bin"].values[0]) if MAP in row else 0,
        "queries": _queries(row["query"].values),
        "tokens": None if tokens is None else [shown_token(token) for token in tokens],
        "opening": _opening(row),
        "direction": direction_of(row),
        "generated": first_generated(row),
        "answer": about_answer(row),
        "topK": row.sizes.get("rank", 0),
        "statistics": [described(row, name) for name in along_text(row)],
        "distances": row["distance_bin"].values.tolist() if HISTOGRAM in row else [],
        "roles": _roles(row),
        "massive": _massive(row),
        "missing": [name for name in WANTED if name not in row],
        "notShown": not_shown(row),
    }


def _queries(positions: np.ndarray) -> dict[str, Any]:
    """Which tokens are measured queries: at equal distances, or position by position."""
    stride = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    found: dict[str, Any] = {"first": int(positions[0]), "stride": stride, "count": len(positions)}
    return found if (np.diff(positions) == stride).all() else found | {"positions": positions.tolist()}


def _opening(row: xarray.Dataset) -> str:
    """The first words of the text, by which its reader knows it; nothing if the tokens are unknown."""
    tokens = tokens_of(row.isel(batch=0), "key")
    real = real_tokens(row, "key").isel(batch=0).values
    # More tokens than this are not needed for the words.
    known = [] if tokens is None else [token for token, there in zip(tokens, real, strict=True) if there][:OPENING]
    text = "".join(readable(token, LONGEST_TOKEN) for token in known)
    words = " ".join(text.translate(str.maketrans("␣⏎⇥", "   ")).split())
    return words if len(words) <= OPENING else words[: OPENING - 1].rstrip() + "…"


def _roles(row: xarray.Dataset) -> list[list[str | None]] | None:
    """The role of every head, layer by layer; None if it is unknown."""
    if not all(name in row for name in NEEDED):
        return None
    roles = classify_heads(row).role.tolist()
    heads = row.sizes["head"]
    known = [role if isinstance(role, str) else None for role in roles]
    return [known[i : i + heads] for i in range(0, len(known), heads)]


def _massive(row: xarray.Dataset) -> dict[str, Any] | None:
    """The largest magnitude of every hidden layer, where it is, and what would be massive; None if it is unknown."""
    if not all(name in row for name in needed(row)):
        return None
    found = massive_activations(row).isel(batch=0)
    magnitude = found.magnitude.transpose("hidden_layer", "query").fillna(-1)
    at = magnitude.argmax("query")
    largest, median = magnitude.max("query").values, found["median"].values
    bound = np.maximum(MAGNITUDE, RATIO * median)
    return {
        "largest": _numbers(np.where(largest < 0, np.nan, largest)),
        "median": _numbers(median),
        "bound": _numbers(bound),
        "position": found["query"].values[at.values].tolist(),
        "channel": found.channel.transpose("hidden_layer", "query").isel(query=at).values.tolist(),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
