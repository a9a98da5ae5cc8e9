"""What the answer draws on: its attention on each segment, and along the text, token by token that it consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.dataset import direction_of, real_tokens
from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.analysis.sources import sink_by_segment, sink_keys
from llama_attn.viz.report.embedding import Embedded, Level, Part, embed, embed_rounded
from llama_attn.viz.report.links import FEWEST_BINS, TOP_KEYS, first_generated
from llama_attn.viz.report.pooling import mean_of_known, pool_tokens, widths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import xarray
    from jaxtyping import Float, Int

ROWS = "row_weights"
# How a statistic of one segment is named in a row; the space sets it apart from names of statistics.
OF_SEGMENT = "segment_mass "
# How many times the size of another part these may have before they lose detail first: shares, which are small; the
# text shaded by the mean over layers and heads, by the mean over the heads of a layer, and by single heads.
WORTH_OF_SHARES, WORTH_OF_MEAN, WORTH_OF_LAYERS, WORTH_OF_HEADS = 32, 16, 12, 2


def writers(row: xarray.Dataset) -> Int[np.ndarray, " writer"]:
    """Measured queries from which the answer was written, as indices: the last of the prompt, and generated ones.

    A query's attention makes the token that follows it, so that the last generated token has no query of its own.
    None without segments of the attention, or if nothing was generated.
    """
    start = first_generated(row)
    if start is None or direction_of(row) != "causal" or not _segment_names(row):
        return np.array([], dtype=int)
    real = real_tokens(row, "query").isel(batch=0).values
    return np.flatnonzero((row["query"].values >= start - 1) & real)


def about_answer(row: xarray.Dataset) -> dict[str, Any] | None:
    """What the page says of the answer, as plain JSON types; None if the run has none."""
    at = writers(row)
    if not len(at):
        return None
    names, keys, labels = _segment_names(row), row["key"].values, row["key_segment"].isel(batch=0).values
    real = real_tokens(row, "key").isel(batch=0).values
    labels = np.where(real, labels, "")
    starts = np.flatnonzero(np.append(True, labels[1:] != labels[:-1]))
    positions = row["query"].values[at]
    return {
        "queries": positions.tolist(),
        "segments": [{"name": name, "tokens": int((labels == name).sum())} for name in names],
        "unnamed": int(real.sum() - np.isin(labels, names).sum()),
        # Where the segment changes, and to which; −1 for none.
        "runs": [[int(keys[i]), names.index(labels[i]) if labels[i] in names else -1] for i in starts],
        "sink": _sink(row, names),
        "exact": [int(position) in _rows(row) for position in positions],
        "listed": all(name in row for name in TOP_KEYS),
        "learned": "learned_sink_mass" in row and bool((row["learned_sink_mass"] > 0).any()),
    }


def answer_shares(row: xarray.Dataset) -> Float[np.ndarray, "layer head writer share"]:
    """Attention of the answer's queries on each segment, on no segment, and on the sink [probability].

    What is on no segment includes a learned sink. The sink is some of the keys, so that it is in their segments too: the
    last columns are its part in each of ``sink["places"]`` of `about_answer`, none if it is unknown.
    """
    answer = row.isel(query=writers(row))
    mass = [answer[f"{OF_SEGMENT}{name}"] for name in _segment_names(row)]
    single = [*mass, *_sink_by_segment(row).values()]
    shares = np.stack([each.isel(batch=0).transpose("layer", "head", "query").values for each in single], -1)
    shares = shares.astype(np.float64)
    rest = np.clip(1 - shares[..., : len(mass)].sum(-1), 0, None)
    return np.insert(shares, len(mass), rest, -1)


def answer_parts(row: xarray.Dataset) -> list[Part]:
    """Everything that the page draws of the answer, ready to lose detail; nothing if the run has none.

    ``answer mean`` (1 + layer, 1 + head, share): means over the answer, in float32; 0 is the mean over the axis.
    ``answer shares`` (1 + layer, writer, share) and ``answer head shares`` (layer, head, writer, share).
    ``answer text`` (1 + layer, key), ``answer head text`` (layer, head, key): weights along the text, mean over the
    answer. ``answer rows`` (1, writer, key), ``answer layer rows`` (layer, writer, key), ``answer head rows``
    (layer, head, writer, key): those of single tokens.

    Args:
        row: One row of the batch, with all its tokens.
    """
    if not len(writers(row)):
        return []
    return [*_share_parts(answer_shares(row)), *_text_parts(AnswerRows(row))]


def _share_parts(shares: Float[np.ndarray, "layer head writer share"]) -> list[Part]:
    def with_mean(values: np.ndarray, axis: int) -> np.ndarray:
        return np.concatenate([np.expand_dims(mean_of_known(values, axis), axis), values], axis)

    mean = with_mean(with_mean(mean_of_known(shares, 2), 1), 0).astype(np.float32)
    single = with_mean(mean_of_known(shares, 1), 0)

    def levels(name: str, values: np.ndarray) -> list[Level]:
        def level(bits: int) -> Level:
            return Level(values.size * bits // 8, lambda: {name: embed_rounded(values, bits)})

        return [level(16), level(8), Level(0, dict)]

    return [
        Part("answer mean", [Level(mean.nbytes, lambda: {"answer mean": embed(mean)})]),
        Part("answer shares", levels("answer shares", single), WORTH_OF_SHARES),
        Part("answer head shares", levels("answer head shares", shares), WORTH_OF_SHARES),
    ]


class AnswerRows:
    """Attention weights of the answer's queries along the text: exact where they were measured, else as far as listed.

    Layer by layer, since all of them at once may be larger than what else the report needs by far.
    """

    def __init__(self, row: xarray.Dataset) -> None:
        at = writers(row)
        positions = row["query"].values[at]
        known = {position: place for place, position in enumerate(_rows(row))}
        self.first_key = int(row["key"].values[0])
        self.exact = np.array([int(position) in known for position in positions])
        self.shape = (row.sizes["layer"], row.sizes["head"], len(at), row.sizes["key"])
        self._rows = self._lists = None
        if self.exact.any():
            places = [known[int(position)] for position in positions[self.exact]]
            weights = row[ROWS].isel(batch=0).transpose("layer", "head", "row", "key").values
            self._rows = weights if len(places) == weights.shape[2] else weights[:, :, places]
        if not self.exact.all() and all(name in row for name in TOP_KEYS):
            lists = row[list(TOP_KEYS)].isel(batch=0, query=at[~self.exact]).transpose("layer", "head", "query", "rank")
            self._lists = tuple(lists[name].values for name in TOP_KEYS)
        self._mean_text: np.ndarray | None = None
        self._mean_rows: np.ndarray | None = None

    @property
    def known(self) -> bool:
        """Whether there are weights of any query."""
        return self._rows is not None or self._lists is not None

    def head(self, layer: int, head: int) -> Float[np.ndarray, "writer key"]:
        """The weights of one head: 0 at keys that are not listed, NaN where nothing is known of a query."""
        weights = np.full(self.shape[2:], np.nan, np.float32)
        if self._rows is not None:
            weights[self.exact] = self._rows[layer, head]
        if self._lists is not None:
            listed, keys = (values[layer, head] for values in self._lists)
            places = np.flatnonzero(~self.exact)[:, None].repeat(keys.shape[1], 1)
            weights[~self.exact] = 0
            there = keys >= 0
            weights[places[there], keys[there] - self.first_key] = listed[there]
        return weights

    def layer(self, layer: int) -> Float[np.ndarray, "writer key"]:
        """The mean over the heads of a layer."""
        total = self.head(layer, 0)
        for head in range(1, self.shape[1]):
            total += self.head(layer, head)
        return total / self.shape[1]

    def means(self) -> tuple[Float[np.ndarray, "one_and_layers key"], Float[np.ndarray, "one writer key"]]:
        """Means over heads: of each layer over the answer, that over layers first; and of each query over layers."""
        if self._mean_text is None or self._mean_rows is None:
            texts: list[np.ndarray] = []

            def of_layer(layer: int) -> np.ndarray:
                rows = self.layer(layer)
                texts.append(mean_of_known(rows, 0))
                return rows

            self._mean_rows = mean_of_made(of_layer, self.shape[0])[None]
            self._mean_text = np.stack([mean_of_known(self._mean_rows[0], 0), *texts])
        return self._mean_text, self._mean_rows


def mean_of_made(make: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """The mean of ``count`` arrays of which one at a time is made, of what is not NaN."""
    first = make(0)
    total, known = np.zeros(first.shape), np.zeros(first.shape, int)
    for at in range(count):
        values = make(at) if at else first
        total += np.nan_to_num(values)
        known += ~np.isnan(values)
    return np.where(known > 0, total / np.maximum(known, 1), np.nan).astype(np.float32)


def _text_parts(rows: AnswerRows) -> list[Part]:
    if not rows.known:
        return []
    layers, heads, queries, keys = rows.shape

    def part(name: str, count: int, make: Callable[[int], np.ndarray], worth: float) -> Part:
        """Levels of ``count`` lines along the text; made, in bins of a width, only once a level is tried that may fit."""

        def level(bits: int, width: int) -> Level:
            def made() -> dict[str, Embedded]:
                return {name: embed_rounded(make(width), bits, width=width)}

            return Level(count * -(-keys // width) * bits // 8, made)

        coarse = [level(8, width) for width in widths(keys, FEWEST_BINS)]
        return Part(name, [level(16, 1), *coarse, Level(0, dict)], worth)

    # Pooled one by one: all at once they may be larger than anything that the page can hold.
    def layer_rows(width: int) -> np.ndarray:
        return np.stack([pool_tokens(rows.layer(layer), width) for layer in range(layers)])

    def of_heads(of: Callable[[np.ndarray], np.ndarray], width: int) -> np.ndarray:
        pooled = [[pool_tokens(of(rows.head(layer, head)), width) for head in range(heads)] for layer in range(layers)]
        return np.array(pooled)

    def head_text(width: int) -> np.ndarray:
        return of_heads(lambda weights: mean_of_known(weights, 0), width)

    def head_rows(width: int) -> np.ndarray:
        return of_heads(lambda weights: weights, width)

    # With a single head, the means over heads are its own numbers.
    single = [
        part("answer head text", layers * heads, head_text, WORTH_OF_HEADS),
        part("answer head rows", layers * heads * queries, head_rows, WORTH_OF_HEADS),
    ]
    return [
        part("answer text", 1 + layers, lambda width: pool_tokens(rows.means()[0], width), WORTH_OF_MEAN),
        part("answer rows", queries, lambda width: pool_tokens(rows.means()[1], width), WORTH_OF_MEAN),
        part("answer layer rows", layers * queries, layer_rows, WORTH_OF_LAYERS),
        *(single if heads > 1 else []),
    ]


def _segment_names(row: xarray.Dataset) -> list[str]:
    return [str(name).removeprefix(OF_SEGMENT) for name in row.data_vars if str(name).startswith(OF_SEGMENT)]


def _rows(row: xarray.Dataset) -> Sequence[int]:
    """Positions of the queries whose weights were measured, one by one."""
    return [int(position) for position in row["row"].values] if ROWS in row else []


def _sink_by_segment(row: xarray.Dataset) -> dict[str, xarray.DataArray]:
    """What the answer's queries give the sink, by segment; nothing if that cannot be known."""
    if row["key"].values[0]:
        return {}
    try:
        return sink_by_segment(row.isel(query=writers(row)), sink_keys(row))[0]
    except NotMeasuredError:
        return {}


def _sink(row: xarray.Dataset, names: Sequence[str]) -> dict[str, Any] | None:
    """The sink's tokens, and places among the shares of the segments that they lie in; None if it cannot be taken out."""
    holding = _sink_by_segment(row)
    if not holding:
        return None
    marks = sink_keys(row).isel(batch=0).values
    places = [names.index(name) if name in names else len(names) for name in holding]
    return {"keys": row["key"].values[marks].tolist(), "places": places}
