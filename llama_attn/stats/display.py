"""How an `AttentionStats` shows itself: as text, and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from llama_attn.stats.shares import percent
from llama_attn.stats.token_text import printable, readable

if TYPE_CHECKING:
    from llama_attn.stats.container import AttentionStats

# Means of the table of layers, of those that were measured.
MEANS = ("entropy", "max_weight", "sink_mass", "local_mass", "mean_distance")
FIRST_TOKENS = 16


def as_text(stats: AttentionStats) -> str:
    """What was measured, one statistic per line."""
    first, *rest = _about(stats)
    rows = [(name, axes, unit) for name, axes, unit, _ in _statistics(stats)]
    width = max((len(name) for name, *_ in rows), default=0)
    lines = [f"  {name:<{width}}  ({axes})  [{unit}]" for name, axes, unit in rows]
    return "\n".join([f"AttentionStats: {first}", *(f"  {line}" for line in rest), *lines])


def as_html(stats: AttentionStats) -> str:
    """The same as `as_text`, and a table of means by layer. Whatever the model or the text brought is escaped."""
    first, *rest = (escape(line) for line in _about(stats))
    parts = [f"<b>AttentionStats</b>: {first}", *rest]
    if stats.tokens:
        shown = " ".join(f"<code>{escape(readable(token))}</code>" for token in stats.tokens[0][:FIRST_TOKENS])
        parts.append(f"text: {shown}{' …' if stats.num_keys > FIRST_TOKENS else ''}")
    content = _table(["statistic", "axes", "unit", "meaning"], _statistics(stats))
    return (
        f"<div>{'<br>'.join(parts)}{_layer_table(stats)}"
        f"<details><summary>{len(stats)} statistics</summary>{content}</details></div>"
    )


def _about(stats: AttentionStats) -> list[str]:
    """Size and origin, of which a file may say anything."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in stats.values.values())
    of = f" of {stats.num_heads}" if stats.num_heads else ""
    return [
        f"{len(stats.layers)} layers × {len(stats.heads)} heads, batch {stats.batch}, "
        f"{len(stats.queries)} queries, {stats.num_keys} keys, {size / 2**20:.1f} MiB",
        f"layers {_indices(stats.layers)} of {stats.num_layers}, heads {_indices(stats.heads)}{of}",
        "measured"
        + (f" by {stats.engine!r}" if stats.engine else "")
        + (f" on backend {stats.backend!r}" if stats.backend else "")
        + (f" of {printable(stats.model)}" if stats.model else "")
        + ("" if stats.tokens is None else ", with tokens")
        + (", replayed" if stats.replayed else ""),
    ]


def _indices(indices: Sequence[int]) -> str:
    """``0–29``, or the single ones."""
    if len(indices) > 2 and all(after == before + 1 for before, after in pairwise(indices)):
        return f"{indices[0]}–{indices[-1]}"
    return ", ".join(map(str, indices))


def _statistics(stats: AttentionStats) -> list[tuple[str, str, str, str]]:
    """Name, axes, unit and meaning of each."""
    rows = []
    for name, tensor in stats.values.items():
        label = stats.labels[name]
        axes = ", ".join(f"{dim}: {size}" for dim, size in zip(label.dims, tensor.shape, strict=True))
        rows.append((printable(name), axes, printable(label.unit), printable(label.meaning)))
    return rows


def _layer_table(stats: AttentionStats) -> str:
    """Means over rows, heads and tokens, and the key of the first row that all queries give most to; nothing without them."""
    headings = ["layer"]
    columns: list[list[str]] = [[str(layer) for layer in stats.layers]]
    for name in (name for name in MEANS if name in stats):
        means = torch.nanmean(stats[name], dim=(1, 2, 3)).tolist()
        headings.append(f"{name.replace('_', ' ')} [{printable(stats.labels[name].unit)}]")
        columns.append([f"{mean:.3g}" for mean in means])
    if "received" in stats:
        headings.append("strongest key, share of all attention")
        columns.append(_strongest(stats))
    return _table(headings, list(zip(*columns, strict=True))) if len(columns) > 1 else ""


def _strongest(stats: AttentionStats) -> list[str]:
    # Of the first row; one line per layer where the layers see different keys. What all queries give to a key, over
    # their number: a mean over those few that see a late key would make it the strongest by chance.
    given = stats["received"][:, 0].mean(1) * stats.visible_queries[..., 0, :]
    share, place = (given / (stats.visible_keys[..., 0, :] > 0).sum(-1, keepdim=True)).nan_to_num(-1).max(-1)
    positions = stats.coordinates()["key"]
    cells = []
    for mass, at in zip(share.tolist(), place.tolist(), strict=True):
        token = f" {readable(stats.tokens[0][at])}" if stats.tokens else ""
        cells.append("no data" if mass < 0 else f"{positions[at]}{token}, {percent(mass)}")
    return cells


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(headings, 'th')}</thead><tbody>{body}</tbody></table>"
