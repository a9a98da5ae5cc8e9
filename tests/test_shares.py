"""Shares in words: small ones are not nothing, and nothing is said of parts that says nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from llama_attn import AttentionStatsConfig, viz
from llama_attn.cli.showing import table_of_documents
from llama_attn.stats.shares import percent
from llama_attn.viz.report.findings import findings

LENGTH = 24


def measure(parts, model=None, **settings):
    """One text whose parts are named token by token."""
    config = AttentionStatsConfig(statistics="all", norms=True, segments=[parts], **settings)
    ids = torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (tiny_model() if model is None else model)(ids, output_attention_stats=config).attention_stats


def of_parts(stats):
    """The finding about parts of the text, if there is one."""
    return [each for each in findings(stats.to_xarray()) if each.question.startswith("Which part of the text")]


@pytest.mark.parametrize(
    ("share", "digits", "written"),
    [
        (0.0, 0, "0%"), (1e-8, 1, "0.0%"), (0.004, 0, "<1%"), (0.004, 1, "0.4%"), (0.0004, 1, "<0.1%"), (0.006, 0, "1%"), (1.0, 0, "100%"),
        (0.994, 0, "99%"), (0.998, 0, ">99%"), (0.998, 1, "99.8%"), (0.9996, 1, ">99.9%"), (1 - 1e-8, 1, "100.0%"), (0.316, 1, "31.6%"), (float("nan"), 0, "–"),
    ],
)  # fmt: skip
def test_what_is_not_nothing_is_not_0_percent_and_what_is_not_all_not_100(share, digits, written):
    assert percent(share, digits) == written


def test_small_shares_where_they_are_shown():
    stats = measure(["one"] * 8 + ["two"] * 13 + ["generated"] * 3)
    stats["segment_mass"][:] = torch.tensor([0.9960, 0.0004, 0.0036])
    stats["sink_mass"][:] = 0
    (finding,) = of_parts(stats)
    words = "".join(word for word in finding.words if isinstance(word, str))
    assert "“one” >99%" in words
    assert "“two” <0.1%" in words
    cells = [list(column.cells) for column in table_of_documents(stats, 21).columns]
    assert cells[1] == ["99.6%", "<0.1%", "0.4%"]
    stats["received"][:] = 0.001
    assert ", &lt;1%</td>" in stats._repr_html_()
    legend = [text.get_text() for text in viz.plot_sources(stats).legends[0].get_texts()]
    assert sorted(label.partition(" (")[0] for label in legend) == ["generated: <1%", "one: >99%", "two: <1%"]


@pytest.mark.parametrize("parts", [["prompt"] * LENGTH, ["prompt"] * 20 + ["generated"] * 4])
def test_of_a_text_of_one_part_nothing_is_said(parts):
    assert not of_parts(measure(parts))


def test_some_tokens_of_no_part_are_a_part():
    assert len(of_parts(measure([None] * 4 + ["prompt"] * 16 + ["generated"] * 4))) == 1


def test_the_longest_part_is_none_to_name():
    """With uniform attention, no part is; with some more on a short one, that one."""
    model = tiny_model()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    parts = ["short"] * 4 + ["long"] * 20
    stats = measure(parts, model)
    (finding,) = of_parts(stats)
    assert (finding.figure, finding.caption) == ("–", "no part gets more than uniform attention would give it")
    mass = stats["segment_mass"].clone()
    stats["segment_mass"][..., 0], stats["segment_mass"][..., 1] = mass[..., 0] + 0.1 * mass[..., 1], 0.9 * mass[..., 1]
    (finding,) = of_parts(stats)
    even = sum(4 / max(seen, 4) for seen in range(1, LENGTH + 1)) / LENGTH
    assert finding.caption == f"of all attention goes to “short”, uniform attention: {even:.0%}"
    assert finding.figure == f"{even + 0.1 * (1 - even):.0%}"
