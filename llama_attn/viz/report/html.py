"""The interactive report: one HTML file that needs no network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis import as_dataset, classify_heads, massive_activations, require
from llama_attn.analysis.activations import MAGNITUDE, RATIO, needed
from llama_attn.analysis.dataset import direction_of, real_tokens, without_attention
from llama_attn.analysis.heads import NEEDED
from llama_attn.analysis.part import measured_layers, named_layers
from llama_attn.analysis.row import row_alone
from llama_attn.stats.files import complete_file
from llama_attn.stats.token_text import readable
from llama_attn.viz.report.answer import about_answer
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
from llama_attn.viz.report.embedding import Embedded, Part, arrays_of, embed, fit
from llama_attn.viz.report.findings import findings
from llama_attn.viz.report.links import TOP_KEYS, asked_queries, first_generated
from llama_attn.viz.style import tokens_of

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source
    from llama_attn.viz.report.links import Positions

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("data", "words", "colours", "state", "lists", "shades", "text", "links", "maps", "charts", "answer", "main")
MEGABYTE = 1_000_000
# Longer tokens are cut in the page.
LONGEST_TOKEN = 80
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
    if isinstance(max_megabytes, bool) or not isinstance(max_megabytes, (int, float)) or not max_megabytes > 0:
        raise ValueError(f"max_megabytes: expected a positive number, got {max_megabytes!r}")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'llama_attn[viz]'") from error
    dataset = as_dataset(source)
    require(dataset, "visible_keys", "visible_queries")
    if direction_of(dataset) == "cross":
        raise ValueError(
            "source: the report shows one text, and cross-attention has two; use the figures of llama_attn.viz"
        )
    if batch not in dataset["batch"].values:
        raise ValueError(f"batch: {batch} was not measured; there are {dataset['batch'].values.tolist()}")
    if not (dataset.visible_queries.sel(batch=batch) > 0).any():
        raise ValueError(f"batch: row {batch} is all padding")
    row = one_row(dataset, batch)
    asked = asked_queries(row, exact)
    with complete_file(path) as unfinished:
        # In words, segments are parts of one statistic.
        found = [asdict(finding) for finding in findings(row_alone(dataset, batch))]
        about = _about(row) | {"findings": found, "row": int(batch), "rows": dataset.sizes["batch"]}
        plotly = embed(np.frombuffer(get_plotlyjs().encode(), np.uint8))
        parts = parts_of(from_the_first_token(row), asked)
        unfinished.write_text(_fitting_page(about, plotly, parts, int(max_megabytes * MEGABYTE)), "utf-8")
    return Path(path)


def _fitting_page(about: dict[str, Any], plotly: Embedded, parts: Sequence[Part], most: int) -> str:
    """The page with as much detail as ``most`` bytes hold."""
    room = most - len(_page(about, plotly, {}).encode())
    while True:
        try:
            page = _page(about, plotly, fit(parts, room))
        except ValueError:
            page = _page(about, plotly, arrays_of(parts))
            # Of the few arrays that are left, less is said than the room was reduced for.
            if (size := len(page.encode())) <= most:
                return page
            # Rounded up, so that the number itself is enough.
            least = np.ceil(size / MEGABYTE * 100) / 100
            raise ValueError(
                f"max_megabytes: {most / MEGABYTE:g} is too small for this run; pooled as far as it goes, it needs {least:g}"
            ) from None
        # What is said of the arrays takes space too, and is known only now.
        excess = len(page.encode()) - most
        if excess <= 0:
            return page
        room -= excess


def _page(about: dict[str, Any], plotly: Embedded, arrays: dict[str, Embedded]) -> str:
    index = {name: array.described() | {"id": f"a{number}"} for number, (name, array) in enumerate(arrays.items())}
    text = json.dumps(about | {"arrays": index, "plotlySize": plotly.shape[0]}, allow_nan=False).encode()
    blocks = {"about": embed(np.frombuffer(text, np.uint8)), "plotly": plotly}
    blocks |= {f"a{number}": array for number, array in enumerate(arrays.values())}
    data = "\n".join(
        f'<script type="application/octet-stream" id="{name}">{block.text}</script>' for name, block in blocks.items()
    )
    code = "\n".join((PAGE / f"{name}.js").read_text("utf-8") for name in SCRIPTS)
    content = {"style": (PAGE / "page.css").read_text("utf-8"), "data": data, "code": code}
    # Base64 and the package's own files only: whatever came with the run is inside the compressed blocks.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match[1]], (PAGE / "page.html").read_text("utf-8"))


def _about(row: xarray.Dataset) -> dict[str, Any]:
    """Everything but the arrays, as plain JSON types."""
    tokens = tokens_of(from_the_first_token(row).isel(batch=0), "key")
    first, last = (int(row["key"].values[end]) for end in (0, -1))
    absent = without_attention(row)
    hidden = row["hidden_layer"].values.tolist() if "hidden_layer" in row.dims else []
    layers = row["layer"].values.tolist() if "layer" in row.dims else hidden[:-1]
    model = str(row.attrs.get("model", ""))
    total = int(row.attrs.get("num_layers", len(layers)))
    return {
        # Of a folder, its name is enough.
        "model": PurePath(model).name if PurePath(model).is_absolute() else model,
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
        "firstKey": first,
        # Where the first bin of the maps begins: before the text if it holds padding too.
        "mapStart": int(row["key_bin"].values[0]) if MAP in row else 0,
        "queries": _queries(row["query"].values),
        "tokens": None if tokens is None else [_shown(token) for token in tokens],
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


def _shown(token: str) -> str:
    """A token as text of the page; a long one ends with its length."""
    shown = readable(token, LONGEST_TOKEN)
    return shown if not shown.endswith("…") or len(token) <= LONGEST_TOKEN else f"{shown}[{len(token):,} characters]"


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
