"""The report of a corpus: one HTML file that needs no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from llama_attn.analysis.activations import needed
from llama_attn.analysis.sinks import EPSILON
from llama_attn.corpus.bins import position_starts, value_bins
from llama_attn.corpus.examples import AROUND, NO_TOKEN
from llama_attn.corpus.summary import summary_of
from llama_attn.stats.files import complete_file
from llama_attn.stats.token_text import drawn
from llama_attn.viz.corpus.numbers import (
    DECILES,
    EACH,
    SHARE,
    Examples,
    Source,
    deciles_of,
    keys_held,
    roles_of,
    scores_of,
    statistics_of,
    strongest_of,
    token_names,
)
from llama_attn.viz.report.assembly import Shell, bytes_of, name_of, plotly_code, shown_token
from llama_attn.viz.report.embedding import Embedded, Level, Part, embed, embed_rounded

if TYPE_CHECKING:
    from llama_attn.corpus.moments import Moments
    from llama_attn.corpus.summary import CorpusSummary
    from llama_attn.viz.corpus.numbers import Score

SHELL = Shell(
    "corpus",
    ("page", "corpus"),
    (
        "data", "words", "colours", "choosing", "boxes", "drawing", "pictures", "frame",
        "corpus_state", "corpus_heads", "corpus_head", "corpus_examples", "corpus_tables", "corpus_main",
    ),
    "corpus",
)  # fmt: skip
# Lines of the tables of tokens and channels.
MOST_LINES = 200
# Longer names of files are cut.
LONGEST_NAME = 120
# How many times the size of another part examples may have before they are coarsened first.
WORTH_OF_EXAMPLES = 3


def corpus_report(summary: Source, path: str | os.PathLike[str], *, max_megabytes: float = 12) -> Path:
    """Write one HTML file that shows a corpus: all heads by their scores, each head with the texts that show it, sinks.

    It opens from the file system in any browser of 2024 or later and makes no request. Scores of heads are not rounded.
    If not everything fits, numbers by position are rounded, to 16 bits and then to 8, and texts are left out: the
    weaker ones, then all of them; the page says so.

    Args:
        summary: A summary, or the path of one.
        path: Where to; the file appears under its name only once it is complete.
        max_megabytes: Largest size of the file [10⁶ bytes]; about 2 of them are plotly.

    Returns:
        The path.

    Raises:
        ImportError: xarray, pandas or plotly is not installed.
        ValueError: It is no summary, or the report does not fit into ``max_megabytes``.
        FileNotFoundError: There is no such summary, or no such folder.
    """
    most = bytes_of(max_megabytes)
    plotly_code()
    summary = summary_of("summary", summary)
    with complete_file(path) as unfinished:
        scores = scores_of(summary, dataset := summary.to_xarray())
        names = Names.of(summary)
        about = _about(summary, scores, names) | {"part": dataset.attrs["part"]}
        unfinished.write_text(SHELL.fitting(about, list(_parts(summary, scores, names)), most), "utf-8")
    return Path(path)


@dataclass(frozen=True, eq=False)
class Names:
    """What the page may name, each in ascending order.

    Args:
        ids: Tokens.
        files: Places in ``files`` of the summary: a corpus may have many more than are named.
    """

    ids: Int[np.ndarray, " token"]
    files: Int[np.ndarray, " file"]

    @classmethod
    def of(cls, summary: CorpusSummary) -> Names:
        """Those of the texts and the sinks of a summary."""
        files = np.concatenate([summary.strongest.file.ravel(), summary.sample.file])
        return cls(np.array(sorted(summary.named_tokens()), np.int64), np.unique(files))


def _about(summary: CorpusSummary, scores: list[Score], names: Names) -> dict[str, Any]:
    """Everything but the arrays, as plain JSON types."""
    about = summary.about
    sinks, massive = summary.sinks, summary.massive
    named = _first(sinks.counts[:, :2].sum(1))
    channels = _first(massive.counts[:, 1])
    return {
        "model": name_of(about.model),
        "texts": summary.texts, "tokensRead": summary.tokens, "cut": summary.cut, "skipped": summary.skipped,
        "maxTokens": about.max_tokens, "direction": about.direction, "layers": list(about.layers),
        "heads": list(about.heads), "numLayers": about.num_layers, "numHeads": about.num_heads,
        "scores": [
            {
                "name": score.name, "unit": score.unit, "meaning": score.meaning, "source": score.source,
                # Whether it has a spread over texts.
                "spread": score.name in summary.by_text,
            }
            for score in scores
        ],
        "statistics": [_described(summary, name) for name in statistics_of(summary)],
        "positions": position_starts(2 ** _positions(summary) - 1), "examplesOf": list(about.examples_of),
        "ranks": summary.strongest.score.shape[-1], "deciles": DECILES, "each": EACH, "roles": roles_of(summary),
        "files": [drawn(summary.files[at], LONGEST_NAME) for at in names.files],
        "tokens": [shown_token(name) for name in token_names(summary, names.ids.tolist())],
        "sinks": [[int(sinks.keys[at, 0]), *sinks.counts[at].tolist()] for at in named],
        "sinkTokens": np.searchsorted(names.ids, sinks.keys[named, 0]).tolist(),
        "otherSinks": int(sinks.counts[:, :2].any(1).sum()) - len(named),
        "massive": [[*massive.keys[at].tolist(), *massive.counts[at].tolist()] for at in channels],
        "otherMassive": len(massive.keys) - len(channels),
        "massiveKnown": all(name in about.labels for name in needed(about.labels)),
        "sinksKnown": "received" in about.labels, "epsilon": EPSILON, "share": SHARE,
    }  # fmt: skip


def _first(counts: np.ndarray) -> np.ndarray:
    """Where the largest counts are, the largest first; none that are 0."""
    order = np.argsort(-counts, kind="stable")[:MOST_LINES]
    return order[counts[order] > 0]


def _described(summary: CorpusSummary, name: str) -> dict[str, Any]:
    label, moments = summary.about.labels[name], summary.by_position[name]
    return {
        "name": name,
        "unit": label.unit,
        "meaning": label.meaning,
        "hidden": label.dims[0] == "hidden_layer",
        "of": "queries" if "query" in label.dims else "keys",
        "kind": "head" if "head" in label.dims else "kv_head" if "kv_head" in label.dims else None,
        # How many heads there are on its axis.
        "heads": moments.count.shape[1] if moments.count.ndim == 3 else 1,
    }


def _positions(summary: CorpusSummary) -> int:
    return max((moments.count.shape[-1] for moments in summary.by_position.values()), default=0)


def _parts(summary: CorpusSummary, scores: list[Score], names: Names) -> Iterator[Part]:
    """Everything that the page draws, ready to lose detail."""
    for score in scores:
        yield _fixed(f"score {score.name}", score.values)
    for name in statistics_of(summary):
        moments = summary.by_text[name]
        yield _fixed(f"texts {name}", _told(moments))
        yield _histogram_part(name, moments, summary.about.labels[name].unit)
        yield _position_part(name, _told(summary.by_position[name])[..., :-1])
    if (bounds := keys_held(summary)) is not None:
        yield _fixed("keys", bounds)
    heads, ranks = len(summary.about.layers) * len(summary.about.heads), summary.strongest.score.shape[-1]
    # Half as many texts, and half of these.
    halves = [ranks >> half for half in range(ranks.bit_length())]
    for at, name in enumerate(summary.about.examples_of):
        yield _examples_part(f"strongest {name}", partial(strongest_of, summary, at), halves, 1, heads, names)
        yield _examples_part(f"deciles {name}", partial(deciles_of, summary, at), (EACH, 1), DECILES, heads, names)


def _fixed(name: str, values: np.ndarray) -> Part:
    numbers = np.ascontiguousarray(values, dtype=np.float32)
    return Part(name, [Level(numbers.nbytes, lambda: {name: embed(numbers)})])


def _told(moments: Moments) -> np.ndarray:
    """Mean, standard deviation, smallest, largest and count, on a last axis; NaN for none."""
    known = moments.count > 0
    numbers = (moments.mean, moments.std, moments.low, moments.high, moments.count)
    return np.stack([np.where(known, each, np.nan) for each in numbers], -1)


def _histogram_part(name: str, moments: Moments, unit: str) -> Part:
    """How many texts in each bin of values, from the first bin that has any to the last."""
    filled = np.flatnonzero(moments.histogram.any(tuple(range(moments.histogram.ndim - 1))))
    first, end = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
    counts = moments.histogram[..., first:end].astype(np.uint32)
    # Lower edges: none below the first bin.
    edges = [None, *value_bins(unit).edges.tolist(), None][first : end + 1]
    key = f"histogram {name}"
    return Part(key, [Level(counts.nbytes, lambda: {key: embed(counts, edges=edges)}), Level(0, dict)])


def _position_part(name: str, values: np.ndarray) -> Part:
    key = f"positions {name}"

    def level(bits: int) -> Level:
        return Level(values.size * bits // 8, lambda: {key: embed_rounded(values, bits)})

    exact = values.astype(np.float32)
    return Part(key, [Level(exact.nbytes, lambda: {key: embed(exact)}), level(16), level(8), Level(0, dict)])


def _examples_part(
    name: str, make: Callable[[], Examples], counts: Sequence[int], groups: int, heads: int, names: Names
) -> Part:
    """Texts of each head: ``groups`` of so many as ``counts`` says, then of fewer, then none."""

    def level(count: int) -> Level:
        # Two bytes for each token, four for its value, and five numbers.
        size = heads * groups * count * (AROUND * 6 + 20)
        return Level(size, lambda: _examples(name, make(), count, groups, names))

    return Part(name, [*map(level, counts), Level(0, dict)], WORTH_OF_EXAMPLES)


def _examples(name: str, found: Examples, count: int, groups: int, names: Names) -> dict[str, Embedded]:
    """The arrays of the first ``count`` texts of each group."""
    total = found.score.shape[-1]
    kept = np.arange(total).reshape(groups, -1)[:, :count].ravel() if total else np.arange(0)
    places = [
        each[:, :, kept] for each in (np.searchsorted(names.files, found.file), found.line, found.position, found.start)
    ]
    tokens = found.ids[:, :, kept]
    # 0 is none.
    shown = np.where(tokens == NO_TOKEN, 0, np.searchsorted(names.ids, tokens) + 1)
    return {
        f"{name} score": embed(found.score[:, :, kept].astype(np.float32), count=count),
        f"{name} place": embed(np.stack(places, -1).astype(np.uint32)),
        f"{name} tokens": embed(shown.astype(np.uint16 if len(names.ids) < 2**16 else np.uint32)),
        # They have 16 bits, and the zeros behind cost nothing when they are compressed.
        f"{name} values": embed(found.values[:, :, kept].astype(np.float32)),
    }
