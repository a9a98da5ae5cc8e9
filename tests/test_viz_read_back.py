"""Every exported figure shows what was measured: in every layer, row and head, read back from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from asked import Asked
from conftest import tiny_model
from read_back import NAMES, READ_BACK, drawn, takes

from llama_attn import AttentionStatsConfig

LENGTH, PADDING, NEW = 16, 5, 6


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [f"t{i}" for i in ids]


@pytest.fixture(scope="module")
def runs():
    """Two models on the same two rows, one padded; layers and heads in an order of their own."""
    ids = torch.arange(3, 3 + 2 * LENGTH).view(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    # The last tokens as if they had been generated.
    parts = ["left"] * 4 + [None] + ["right"] * (LENGTH - 5 - NEW) + ["generated"] * NEW
    segments = [[None] * PADDING + parts[:2] + parts[PADDING + 2 :], parts]
    config = AttentionStatsConfig(
        statistics="all", norms=True, layers=(1, 2, 0), heads=(4, 1, 0), rows=slice(-3, None), segments=segments
    )
    found = []
    for seed in (0, 1):
        with torch.no_grad():
            stats = tiny_model(seed=seed)(ids, attention_mask=mask, output_attention_stats=config).attention_stats
        for row, layer, token, channel in ((0, 2, 7, 3), (1, 0, 3, 9), (1, 2, 5, 9), (1, 0, 8, 2)):
            at = stats.hidden_layers.index(layer)
            # The largest two of the token, in channels that others have too.
            stats["hidden_top"][at, row, token, :2] = torch.tensor([1e5, 9e4]) * (1 + seed)
            stats["hidden_top_channel"][at, row, token, :2] = torch.tensor([channel, 3 if channel == 9 else 9])
        # Heads with roles, another in each row.
        stats["sink_mass"][0, :, 1] = 0.9
        stats["previous_token"][1, 0, 2] = 0.8
        stats["induction"][1, 1, 2] = 0.7
        found.append(stats.with_tokens(Tokenizer(), ids))
    return found


def test_every_exported_plot_is_read_back():
    assert sorted(READ_BACK) == sorted(NAMES)


@pytest.mark.parametrize("layer", [2, 0])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_was_measured(name, batch, layer, runs):
    for head in (1, None) if takes(name, "head") else (1,):
        for kind in ("weights", "logits") if takes(name, "kind") else ("weights",):
            asked = Asked(*runs, layer=layer, head=head, batch=batch, kind=kind)
            figure = drawn(name, asked)
        READ_BACK[name](figure, asked)
        if name == "plot_massive_activations":
            assert len(figure.axes[0].lines) > 1, "there is something to mark, in several channels"


@pytest.mark.parametrize("name", NAMES)
def test_reading_back_can_fail(name, runs):
    """A figure of something else is not taken for the one that was asked for."""
    asked = Asked(*runs)
    others = {
        "a": runs[1],
        "b": runs[0],
        "layer": 2,
        "head": 0,
        "batch": 0,
        "kind": "logits",
        "query_slice": slice(0, 4),
    }
    changes = {key: value for key, value in others.items() if takes(name, key)} | {"a": runs[1]}
    for key, value in changes.items():
        other = replace(asked, **{key: value})
        with pytest.raises(AssertionError):
            READ_BACK[name](drawn(name, other), asked)
