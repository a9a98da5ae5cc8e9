"""From the statistics of a batch of texts to the summary of these texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llama_attn.analysis.activations import massive_activations, needed
from llama_attn.analysis.roles import MIXED, THRESHOLDS, role_scores, strongest_roles
from llama_attn.analysis.sinks import EPSILON, sink_positions
from llama_attn.corpus.bins import position_starts, value_bins
from llama_attn.corpus.examples import Text, examples_of
from llama_attn.corpus.moments import Moments
from llama_attn.corpus.statistics import check_statistics, of_heads, of_positions, with_examples
from llama_attn.corpus.summary import About, CorpusSummary
from llama_attn.corpus.table import Table
from llama_attn.stats.weight_bins import NUM_WEIGHT_BINS

if TYPE_CHECKING:
    import xarray

    from llama_attn.stats.container import AttentionStats

ROLES = (*THRESHOLDS, "mixed")


def summarize(
    stats: AttentionStats, texts: Sequence[Text], *, weights: str, max_tokens: int, examples: int
) -> CorpusSummary:
    """The summary of the texts of one batch, as if none of them had been cut.

    Args:
        stats: Statistics of the batch, each row a text from its first token on, padding behind it.
        texts: What the rows are.
        weights: Hash of the weights of the model.
        max_tokens: What longer texts are cut to.
        examples: Texts that are kept of each head and statistic.

    Raises:
        ValueError: A statistic does not add up over texts.
    """
    labels = {name: stats.labels[name] for name in stats.names}
    check_statistics(labels, [name for name in labels if not stats[name].is_floating_point()])
    dataset = stats.to_xarray()
    by_position, scores, examples_for = of_positions(labels), of_heads(labels), with_examples(labels)
    if not scores:
        raise ValueError(f"statistics: expected one or more of single queries or keys of each head, got {list(labels)}")
    about = About(
        model=stats.model, weights=weights, config=json.dumps(stats.config.to_json(), sort_keys=True), labels=labels,
        layers=stats.layers, heads=stats.heads, num_layers=stats.num_layers, num_heads=stats.num_heads,
        direction=stats.direction, max_tokens=max_tokens, examples=examples, scores=scores, examples_of=examples_for,
        roles=ROLES,
    )  # fmt: skip
    starts = position_starts(stats.num_keys)
    means = {name: stats[name].nanmean(-1, dtype=torch.float64) for name in by_position}
    files = tuple(sorted({text.file for text in texts}))
    values = np.stack([stats[name].numpy() for name in examples_for]) if examples_for else _none(stats)
    means_of_heads = np.stack([means[name].numpy().transpose(1, 0, 2) for name in scores], 1)
    choosing = (stats.visible_keys > 1).expand(len(stats.layers), -1, -1).numpy()
    strongest, sample = examples_of(
        values, choosing, means_of_heads, [scores.index(name) for name in examples_for], texts, files, examples
    )
    counts, masses, queries = _weights(stats)
    sinks = sink_positions(dataset) if "received" in dataset else None
    return CorpusSummary(
        about=about,
        texts=len(texts),
        tokens=sum(len(text.ids) for text in texts),
        cut=0,
        skipped=0,
        files=files,
        by_position={name: _by_position(stats[name], starts, label.unit) for name, label in by_position.items()},
        by_text={name: Moments.of(mean.movedim(1, -1), value_bins(labels[name].unit)) for name, mean in means.items()},
        first_key=_first_key(stats),
        roles=_roles(dataset, sinks),
        weight_count=counts,
        weight_mass=masses,
        queries=queries,
        sinks=_sinks(sinks, texts),
        massive=_massive(dataset),
        strongest=strongest,
        sample=sample,
    )


def _by_position(values: Tensor, starts: Sequence[int], unit: str) -> Moments:
    """Of (layer, batch, …, position): (layer, …, position_bin)."""
    bins, ends = value_bins(unit), [*starts[1:], values.shape[-1]]
    parts = (values[..., start:end].movedim(1, -2).flatten(-2) for start, end in zip(starts, ends, strict=True))
    return Moments.stack([Moments.of(part, bins) for part in parts])


def _first_key(stats: AttentionStats) -> np.ndarray:
    if "received" not in stats:
        return np.zeros((len(stats.layers), len(stats.heads), 2), np.int64)
    alpha = stats["received"][..., 0]
    return torch.stack([(alpha > EPSILON).sum(1), alpha.isfinite().sum(1)], -1).numpy()


def _roles(dataset: xarray.Dataset, sinks: xarray.Dataset | None) -> np.ndarray:
    """Texts in which each head has each role, (role, layer, head)."""
    if "entropy" not in dataset:
        return np.zeros((len(ROLES), dataset.sizes["layer"], dataset.sizes.get("head", 0)), np.int64)
    best = strongest_roles(role_scores(dataset, per_row=True, sinks=sinks))
    return np.stack([(best == role).sum(1) for role in (*range(len(THRESHOLDS)), MIXED)])


def _weights(stats: AttentionStats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over queries of the histogram of weights, (layer, head, weight_bin), and the queries, (layer)."""
    seen = stats.visible_keys > 0
    queries = seen.sum(-1).expand(len(stats.layers), -1) if seen.ndim == 2 else seen.sum(-1)
    sums = []
    for name in ("weight_count", "weight_mass"):
        if name in stats:
            per_text = stats[name].double() * queries[:, :, None, None]
            sums.append(per_text.nan_to_num(nan=0.0).sum(1).numpy())
        else:
            sums.append(np.zeros((0, 0, NUM_WEIGHT_BINS)))
    return sums[0], sums[1], queries.sum(1).numpy()


def _sinks(found: xarray.Dataset | None, texts: Sequence[Text]) -> Table:
    """By token: heads to which it is a sink in first place, and behind; times that it comes first, and behind."""
    ids = np.concatenate([np.array(text.ids, np.int64) for text in texts])
    first = np.concatenate([np.arange(len(text.ids)) == 0 for text in texts])
    if found is not None:
        heads = found.sink.sum(["layer", "head"]).transpose("batch", "key").values
        named = np.concatenate([heads[row, : len(text.ids)] for row, text in enumerate(texts)])
    else:
        named = np.zeros(len(ids), np.int64)
    return Table.of(ids[:, None], np.stack([named * first, named * ~first, first, ~first], 1).astype(np.int64))


def _massive(dataset: xarray.Dataset) -> Table:
    """By hidden layer and channel: tokens with a massive activation there, and texts that have one."""
    if not all(name in dataset for name in needed(dataset)):
        return Table(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64))
    found = massive_activations(dataset)
    channels = found.channels.transpose("hidden_layer", "batch", "query", "rank").values
    layer, row, _, _ = places = np.nonzero(channels >= 0)
    channel = channels[places].astype(np.int64)
    layer = found["hidden_layer"].values[layer]
    once = Table.of(np.stack([layer, channel, row], 1), np.ones((len(row), 1), np.int64))
    return Table.of(once.keys[:, :2], np.stack([once.counts[:, 0], np.ones(len(once.keys), np.int64)], 1))


def _none(stats: AttentionStats) -> np.ndarray:
    return np.zeros((0, len(stats.layers), stats.batch, len(stats.heads), stats.num_keys), np.float32)
