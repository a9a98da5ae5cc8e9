"""What differs between two corpora, or between two models on the same one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from llama_attn.analysis.compare import ERROR
from llama_attn.corpus.summary import CorpusSummary, summary_of

if TYPE_CHECKING:
    import pandas


def compare(
    a: CorpusSummary | str | os.PathLike[str], b: CorpusSummary | str | os.PathLike[str], *, confidence: float = 0.95
) -> pandas.DataFrame:
    r"""Differences b − a of every head's statistics, means over texts, with effect sizes and confidence intervals.

    Where both have sampled the same texts (the same characters, whatever is put around them), these are compared one by
    one as well, which takes away how much texts differ from each other.

    Args:
        a: Summary of a corpus, or the file that it was saved in.
        b: Another: the same model on other texts, or another one (fine-tuned, quantised) on the same.
        confidence: Of the intervals, which hold for large numbers of texts (they are those of a normal distribution).

    Returns:
        One line per statistic, layer and head that both have, the largest effect first. The columns are

        - ``statistic``, ``layer``, ``head``;
        - ``mean_a`` and ``mean_b`` over all texts;
        - ``difference``, with ``low`` and ``high`` around it, as far apart as the texts and rounding make them;
        - ``effect``, the difference over the root mean square of both standard deviations over texts (standardised
          mean difference), or over the rounding error of the statistic where that is larger;
        - ``texts`` that both have sampled;
        - ``paired_difference`` over these, with ``paired_low`` and ``paired_high``, and ``paired_effect``, it over the
          standard deviation of the differences, or over the rounding error.

        NaN where there are less than two texts. ``attrs`` hold ``models``, the name, layers and heads of
        both if they differ, and how many layers and heads are ``compared``, those with the same number in both;
        ``texts_a``, ``texts_b``, ``texts_in_both`` and what is ``only_in_a`` and ``only_in_b``.

    Raises:
        ValueError: They have no statistic, layer and head in common, the confidence is not in (0, 1), or a file is
            damaged or holds something else.
        FileNotFoundError: There is no such file.

    Source: Cohen (1988), Statistical power analysis, 2.2 and 2.3 (d, d_z); Welch (1947) (interval).
    """
    import pandas

    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    a, b = summary_of("a", a), summary_of("b", b)
    names = [name for name in a.about.scores if name in b.about.scores]
    layers = [layer for layer in a.about.layers if layer in b.about.layers]
    heads = [head for head in a.about.heads if head in b.about.heads]
    if not names or not layers or not heads:
        raise ValueError(
            f"b: expected a statistic, layer and head that a has too; a has {list(a.about.scores)} in layers "
            f"{list(a.about.layers)} and heads {list(a.about.heads)}, b has {list(b.about.scores)} in layers "
            f"{list(b.about.layers)} and heads {list(b.about.heads)}"
        )
    width = NormalDist().inv_cdf(0.5 + confidence / 2)
    _, in_a, in_b = np.intersect1d(a.sample.digest, b.sample.digest, return_indices=True)
    frames = []
    for name in names:
        columns = dict(_columns(a, b, name, layers, heads, width, in_a, in_b))
        grid = np.meshgrid(layers, heads, indexing="ij")
        frames.append(
            pandas.DataFrame(
                {"statistic": name, "layer": grid[0].ravel(), "head": grid[1].ravel()}
                | {column: values.ravel() for column, values in columns.items()}
            )
        )
    frame = pandas.concat(frames, ignore_index=True)
    strength = frame[["effect", "paired_effect"]].abs().max(axis=1).fillna(-1)
    frame = frame.loc[strength.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)
    models = [_model(a), _model(b)]
    frame.attrs |= {
        "models": models if models[0] != models[1] else [],
        "compared": f"{len(layers)} layers × {len(heads)} heads",
        "texts_a": a.texts, "texts_b": b.texts, "texts_in_both": len(in_a), "confidence": confidence,
        "only_in_a": [name for name in a.about.scores if name not in names],
        "only_in_b": [name for name in b.about.scores if name not in names],
    }  # fmt: skip
    return frame


def _model(summary: CorpusSummary) -> str:
    about = summary.about
    return f"{about.model or 'no name'}, {len(about.layers)} layers × {len(about.heads)} heads"


def _columns(
    a: CorpusSummary,
    b: CorpusSummary,
    name: str,
    layers: list[int],
    heads: list[int],
    width: float,
    in_a: np.ndarray,
    in_b: np.ndarray,
) -> Iterator[tuple[str, Float[np.ndarray, "layer head"]]]:
    places = [
        np.ix_(
            [summary.about.layers.index(layer) for layer in layers], [summary.about.heads.index(head) for head in heads]
        )
        for summary in (a, b)
    ]
    moments = [summary.by_text[name] for summary in (a, b)]
    counts, means, stds = (
        [array[place] for array, place in zip(arrays, places, strict=True)]
        for arrays in ([one.count for one in moments], [one.mean for one in moments], [one.std for one in moments])
    )
    means = [np.where(count > 0, mean, np.nan) for count, mean in zip(counts, means, strict=True)]
    difference = means[1] - means[0]
    yield "mean_a", means[0]
    yield "mean_b", means[1]
    yield "difference", difference
    # The variance of the mean, from that of the texts: divided by n − 1.
    variances = [std**2 / np.where(count > 1, count - 1, np.nan) for count, std in zip(counts, stds, strict=True)]
    # In a statistic that is the same for all texts, such as the mass nearby of short ones, nothing but rounding differs.
    rounding = ERROR * (1 + np.maximum(*np.abs(means)))
    error = width * np.sqrt(variances[0] + variances[1]) + rounding
    yield "low", difference - error
    yield "high", difference + error
    yield "effect", difference / np.maximum(np.sqrt((stds[0] ** 2 + stds[1] ** 2) / 2), rounding)
    scores = [
        summary.sample.means[same, summary.about.scores.index(name)][(slice(None), *place)].astype(np.float64)
        for summary, same, place in zip((a, b), (in_a, in_b), places, strict=True)
    ]
    apart = scores[1] - scores[0]
    texts = len(apart)
    unknown = np.full(difference.shape, np.nan)
    paired = apart.mean(0) if texts else unknown
    spread = apart.std(0, ddof=1) if texts > 1 else unknown
    yield "texts", np.full(difference.shape, texts)
    yield "paired_difference", paired
    error = width * spread / np.sqrt(max(texts, 1)) + rounding
    yield "paired_low", paired - error
    yield "paired_high", paired + error
    yield "paired_effect", paired / np.maximum(spread, rounding)
