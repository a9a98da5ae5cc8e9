"""A corpus as plain JSON, for other viewers. The format is described in docs/corpus.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.corpus.bins import position_starts, value_bins
from llama_attn.corpus.examples import NO_TOKEN
from llama_attn.corpus.summary import summary_of
from llama_attn.stats.files import complete_file
from llama_attn.viz.corpus.numbers import (
    DECILES,
    SHARE,
    Source,
    deciles_of,
    keys_held,
    roles_of,
    scores_of,
    statistics_of,
    strongest_of,
    token_names,
)

if TYPE_CHECKING:
    from llama_attn.corpus.moments import Moments
    from llama_attn.corpus.summary import CorpusSummary
    from llama_attn.viz.corpus.numbers import Examples

FORMAT, VERSION = "llama_attn.corpus", 1
Json = dict[str, Any]


def corpus_json(summary: Source, path: str | os.PathLike[str]) -> Path:
    """Write the statistics and examples of a corpus as JSON; what is unknown is null. The page on corpora has every key.

    Args:
        summary: A summary, or the path of one.
        path: Where to; the file appears under its name only once it is complete.

    Returns:
        The path.

    Raises:
        ImportError: xarray or pandas is not installed.
        ValueError: It is no summary.
        FileNotFoundError: There is no such summary, or no such folder.
    """
    summary = summary_of("summary", summary)
    with complete_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        # Head by head, so that no more than one of them is in memory as text.
        file.write(json.dumps(_header(summary), allow_nan=False)[:-1] + ', "heads": [')
        for number, head in enumerate(_heads(summary)):
            file.write(("," if number else "") + "\n" + json.dumps(head, allow_nan=False))
        file.write("\n]}\n")
    return Path(path)


def _header(summary: CorpusSummary) -> Json:
    """Everything but the heads."""
    about, labels, sinks, massive = summary.about, summary.about.labels, summary.sinks, summary.massive
    dataset = summary.to_xarray()
    longest = max((moments.count.shape[-1] for moments in summary.by_position.values()), default=0)
    scores = scores_of(summary, dataset)
    named = np.flatnonzero(sinks.counts[:, :2].any(1))
    ids = sorted(summary.named_tokens())
    return {
        "format": FORMAT, "version": VERSION, "model": about.model, "weights": about.weights, "texts": summary.texts,
        "tokens": summary.tokens, "cut": summary.cut, "skipped": summary.skipped, "max_tokens": about.max_tokens,
        "direction": about.direction, "num_layers": about.num_layers, "num_heads": about.num_heads,
        "part": dataset.attrs["part"], "layers": list(about.layers), "query_heads": list(about.heads),
        "roles": list(about.roles), "share": SHARE,
        "positions": position_starts(2**longest - 1),
        "scores": [
            {"name": each.name, "unit": each.unit, "meaning": each.meaning, "source": each.source} for each in scores
        ],
        "statistics": [
            {
                "name": name, "unit": labels[name].unit, "meaning": labels[name].meaning, "source": labels[name].source,
                "of_heads": name in about.scores, "of": "queries" if "query" in labels[name].dims else "keys",
                "value_edges": value_bins(labels[name].unit).edges.tolist(),
            }
            for name in statistics_of(summary)
        ],
        # Of norms: layer by layer, and of each KV head.
        "others": {
            name: _moments(summary.by_text[name], summary.by_position[name])
            for name in statistics_of(summary) if name not in about.scores
        },
        "token_strings": dict(zip(ids, token_names(summary, ids), strict=True)),
        "sinks": [
            dict(zip(("token", "first", "behind", "times_first", "times_behind"), (token, *counts), strict=True))
            for token, counts in zip(sinks.keys[named, 0].tolist(), sinks.counts[named].tolist(), strict=True)
        ],
        "massive": [
            {"hidden_layer": layer, "channel": channel, "tokens": tokens, "texts": texts}
            for (layer, channel), (tokens, texts) in zip(massive.keys.tolist(), massive.counts.tolist(), strict=True)
        ],
    }  # fmt: skip


def _heads(summary: CorpusSummary) -> Iterator[Json]:
    """What is told of each head."""
    about = summary.about
    scores = scores_of(summary, summary.to_xarray())
    roles, keys = roles_of(summary), keys_held(summary)
    examples = {name: (strongest_of(summary, at), deciles_of(summary, at)) for at, name in enumerate(about.examples_of)}
    for layer, head in np.ndindex(len(about.layers), len(about.heads)):
        at = layer, head
        yield {
            "layer": about.layers[layer],
            "head": about.heads[head],
            "role": roles[layer][head],
            "role_texts": dict(zip(about.roles, summary.roles[:, layer, head].tolist(), strict=True)),
            "scores": {score.name: _plain(score.values[at]) for score in scores},
            "keys": None if keys is None else {"least": _plain(keys[0][at]), "most": _plain(keys[1][at])},
            "statistics": {
                name: _moments(summary.by_text[name], summary.by_position[name], at) for name in about.scores
            },
            "strongest": {name: _texts(summary, found, at) for name, (found, _) in examples.items()},
            "deciles": {name: _tenths(_texts(summary, found, at, empty=True)) for name, (_, found) in examples.items()},
        }


def _moments(by_text: Moments, by_position: Moments, at: tuple[int, ...] = ()) -> Json:
    """How a statistic spreads over texts, and at each bin of positions."""
    return {"texts": _told(by_text, at), "positions": _told(by_position, at)}


def _told(moments: Moments, at: tuple[int, ...]) -> Json:
    numbers = {"mean": moments.mean, "std": moments.std, "min": moments.low, "max": moments.high}
    known = moments.count[at] > 0
    return {
        "count": moments.count[at].tolist(),
        **{name: _plain(np.where(known, array[at], np.nan)) for name, array in numbers.items()},
        "histogram": moments.histogram[at].tolist(),
    }


def _texts(summary: CorpusSummary, found: Examples, at: tuple[int, int], *, empty: bool = False) -> list[Json | None]:
    """The texts of a head; empty places are None, or left out."""
    texts: list[Json | None] = []
    for place in range(found.score.shape[-1]):
        here = (*at, place)
        if np.isnan(found.score[here]):
            texts += [None] if empty else []
            continue
        ids = [token for token in found.ids[here].tolist() if token != NO_TOKEN]
        texts.append(
            {
                "file": summary.files[found.file[here]], "line": int(found.line[here]),
                "digest": f"{int(found.digest[here]) % 2**64:016x}", "score": float(found.score[here]),
                "position": int(found.position[here]), "start": int(found.start[here]), "tokens": ids,
                # As short as 16 bits are.
                "values": [float(str(value)) if np.isfinite(value) else None for value in found.values[here][: len(ids)]],
            }
        )  # fmt: skip
    return texts


def _tenths(texts: list[Json | None]) -> list[list[Json]]:
    """The texts of each decile."""
    each = len(texts) // DECILES
    return [[text for text in texts[at : at + each] if text] for at in range(0, len(texts), each)]


def _plain(values: np.ndarray) -> Any:
    """Numbers as JSON knows them: null for what is not finite."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim:
        return [_plain(part) for part in values]
    return float(values) if np.isfinite(values) else None
