"""What is told of a corpus, whatever it is written as: scores of heads, and texts that show them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from llama_attn.analysis.coverage import bounds_of
from llama_attn.analysis.sinks import EPSILON
from llama_attn.corpus.summary import CorpusSummary

if TYPE_CHECKING:
    import xarray

Source = CorpusSummary | str | os.PathLike[str]
"""A summary, or the path of its file."""
DECILES = 10
# Texts of each decile.
EACH = 2
# The share of the attention that keys are counted for.
SHARE = 0.95
KEYS = "keys_for_95_percent"


@dataclass(frozen=True, eq=False)
class Score:
    """One number per head.

    Args:
        name: What it is called.
        unit: Its unit.
        meaning: One line in words.
        source: Where the definition comes from.
        values: The numbers, NaN where there is no data.
    """

    name: str
    unit: str
    meaning: str
    source: str
    values: Float[np.ndarray, "layer head"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts that show one statistic of each head.

    Args:
        score: Mean of the statistic over the text; NaN where a place is empty.
        digest: Which text.
        file: Place of its file in ``files`` of the summary.
        line: Its line.
        position: Where the statistic is highest in it [token].
        start: First of the tokens that are shown.
        ids: These tokens, −1 behind the end of the text.
        values: The statistic of each.
    """

    score: Float[np.ndarray, "layer head place"]
    digest: Int[np.ndarray, "layer head place"]
    file: Int[np.ndarray, "layer head place"]
    line: Int[np.ndarray, "layer head place"]
    position: Int[np.ndarray, "layer head place"]
    start: Int[np.ndarray, "layer head place"]
    ids: Int[np.ndarray, "layer head place around"]
    values: Float[np.ndarray, "layer head place around"]


def statistics_of(summary: CorpusSummary) -> list[str]:
    """Names of the statistics of single queries or keys, in the order in which they were asked for."""
    return [name for name in summary.about.labels if name in summary.by_position]


def scores_of(summary: CorpusSummary, dataset: xarray.Dataset) -> list[Score]:
    """Every number per head: means over texts, sink rate, shares of the roles that any head ever has, keys needed.

    Args:
        summary: The summary.
        dataset: Its `to_xarray`.
    """
    labels = summary.about.labels
    found = [
        Score(name, labels[name].unit, labels[name].meaning, labels[name].source, dataset[f"{name}_text_mean"].values)
        for name in summary.about.scores
    ]
    if summary.first_key[..., 1].any():
        rate = dataset.sink_rate
        meaning = f"{rate.attrs['long_name']}: α > {EPSILON}"
        found.append(Score("sink_rate", rate.attrs["units"], meaning, rate.attrs["source"], rate.values))
    for role in summary.about.roles:
        if (share := dataset.role_share.sel(role=role).values).any() and np.isfinite(share).any():
            meaning = f"share of texts in which {role.replace('_', ' ')} is what the head is most"
            found.append(Score(f"{role}_share", "fraction", meaning, "llama_attn", share))
    if (bounds := keys_held(summary)) is not None:
        meaning = f"keys per query that hold {SHARE:.0%} of the attention, at most, if they are chosen best"
        found.append(Score(KEYS, "keys", meaning, "llama_attn", bounds[1]))
    return found


def keys_held(summary: CorpusSummary) -> Float[np.ndarray, "bound layer head"] | None:
    """Bounds on the keys per query that hold most of the attention, over all queries of all texts; None if unknown."""
    if not summary.weight_mass.size:
        return None
    bounds = np.full((2, *summary.weight_mass.shape[:2]), np.nan)
    for layer, head in np.argwhere(summary.weight_mass.any(-1)):
        counts, masses = (
            each[layer, head] / summary.queries[layer] for each in (summary.weight_count, summary.weight_mass)
        )
        bounds[:, layer, head] = bounds_of(counts, masses, np.array([SHARE]))[:, 0]
    return bounds


def roles_of(summary: CorpusSummary) -> list[list[str | None]]:
    """The role that each head has in most texts, layer by layer; None where it is unknown."""
    heads = len(summary.about.heads)
    roles = [role if isinstance(role, str) else None for role in summary.to_pandas().role]
    return [roles[at : at + heads] for at in range(0, len(roles), heads)] if heads else []


def strongest_of(summary: CorpusSummary, statistic: int) -> Examples:
    """The texts with the highest scores, the highest first; ``statistic`` is its place among those with examples."""
    found = summary.strongest
    score = np.where(np.isfinite(found.score[statistic]), found.score[statistic], np.nan)
    return Examples(
        score, found.digest[statistic], found.file[statistic], found.line[statistic], found.position[statistic],
        found.start[statistic], found.ids[statistic], found.values[statistic],
    )  # fmt: skip


def deciles_of(summary: CorpusSummary, statistic: int) -> Examples:
    """Random texts from each decile of a head's scores, the lowest first, `EACH` of every one, as `strongest_of`."""
    about, sample = summary.about, summary.sample
    means = sample.means[:, about.scores.index(about.examples_of[statistic])]
    text = decile_texts(means)
    empty, at = text < 0, np.maximum(text, 0)
    layer, head, _ = np.ogrid[: text.shape[0], : text.shape[1], :1]
    start, ids = sample.window(at, statistic, layer, head)
    return Examples(
        np.where(empty, np.nan, means[at, layer, head]), sample.digest[at], sample.file[at], sample.line[at],
        sample.position[at, statistic, layer, head], start, ids, sample.values[at, statistic, layer, head],
    )  # fmt: skip


def decile_texts(means: Float[np.ndarray, "text layer head"], each: int = EACH) -> Int[np.ndarray, "layer head place"]:
    """Of each tenth of the texts by a head's mean, those that come first, by their mean; −1 where there are fewer.

    Args:
        means: A score of every text, NaN for none. Texts are in the order in which they are to be taken.
        each: How many of each tenth.
    """
    found = np.full((*means.shape[1:], DECILES, each), -1)
    # What is no number is sorted to the end, as NaN is, and not in front of all others.
    finite = np.isfinite(means)
    order = np.argsort(np.where(finite, means, np.nan), 0, kind="stable")
    known = finite.sum(0)
    for layer, head in np.ndindex(*means.shape[1:]):
        ends = known[layer, head] * np.arange(DECILES + 1) // DECILES
        for decile, (start, end) in enumerate(pairwise(ends)):
            tenth = order[start:end, layer, head]
            # Those that come first, in the order of their scores.
            chosen = tenth[np.sort(np.argsort(tenth)[:each])]
            found[layer, head, decile, : len(chosen)] = chosen
    return found.reshape(*means.shape[1:], DECILES * each)


def token_names(summary: CorpusSummary, ids: Sequence[int]) -> list[str]:
    """What tokens are called; ``<id:7>`` where the summary does not know."""
    return [summary.strings.get(token, f"<id:{token}>") for token in ids]
