"""A row of a padded batch is shown as the text that it is: as if it had been measured without the others."""

from __future__ import annotations

import re

import cli_models
import numpy as np
import pytest
import torch
from browsing import drawn, token
from conftest import tiny_model
from imagined import Model, Rule, Text
from report_page import Page, measured
from test_cli import invoke

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import summarize_layers
from llama_attn.analysis.row import row_alone
from llama_attn.viz import plot_attention_map, plot_model_view, report

LENGTH, SHORT = 37, 11


def batch_of(ids, side):
    """The first row is short, and padded; the ids of its text."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, : LENGTH - SHORT] = 0
    if side == "right":
        mask = mask.flip(1)
    return mask, ids[:1][mask[:1].bool()][None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_what_its_text_is_alone(side, ids):
    mask, text = batch_of(ids, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    config = AttentionStatsConfig(statistics="all", norms=True, rows=slice(0, None))
    with torch.no_grad():
        both = tiny_model()(ids, attention_mask=mask, position_ids=positions, output_attention_stats=config)
        alone = tiny_model()(text, output_attention_stats=config).attention_stats.to_xarray()
    row = row_alone(both.attention_stats.to_xarray(), 0)
    assert {*row.data_vars} == {*alone.data_vars}
    for name, values in alone.data_vars.items():
        found = row[name].transpose(*values.dims)
        for dim in values.dims:
            np.testing.assert_array_equal(found[dim], values[dim], err_msg=f"{name}: {dim}")
        # Maps of weights are 0 where nothing is seen.
        np.testing.assert_allclose(found, values, rtol=2e-4, atol=2e-5, err_msg=name)
    frame, expected = summarize_layers(both.attention_stats), summarize_layers(alone)
    np.testing.assert_allclose(frame.to_numpy(float), expected.to_numpy(float), rtol=2e-4)


def test_the_other_row_stays_as_it_is(ids):
    mask, _ = batch_of(ids, "left")
    dataset = measured(ids, mask).to_xarray()
    assert row_alone(dataset, 1).equals(dataset.sel(batch=[1]))
    with pytest.raises(ValueError, match=r"batch: 2 was not measured; there are \[0, 1\]"):
        row_alone(dataset, 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("map_size", [10, 2])
def test_bins_that_hold_padding_too_are_drawn_where_they_are(side, map_size, ids, open_page, tmp_path):
    """The batch is in bins of 4 or 32 tokens; a text that begins at 26 begins within one."""
    mask, _ = batch_of(ids, side)
    stats, width = measured(ids, mask, map_size=map_size), {10: 4, 2: 32}[map_size]
    start = LENGTH - SHORT if side == "left" else 0
    bins = sorted({at // width for at in range(start, start + SHORT)})
    figure = plot_attention_map(stats, layer=1, head=2)
    axes = figure.axes[0]
    (image,) = axes.images
    first = bins[0] * width - start
    assert image.get_extent() == [
        first - 0.5,
        first + len(bins) * width - 0.5,
        first + len(bins) * width - 0.5,
        first - 0.5,
    ]
    assert axes.get_xlim() == axes.get_ylim()[::-1] == (-0.5, SHORT - 0.5)
    assert f"bins of {width} tokens" in axes.get_title()
    cells = stats["weights_map"][1, 0, 2].numpy()[np.ix_(bins, bins)]
    lower = np.tril_indices(len(bins))
    np.testing.assert_allclose(image.get_array().data[lower], cells[lower])
    assert f"{len(bins)} × {len(bins)} cells of {width} tokens" in " ".join(
        plot_model_view(stats).axes[0].get_title().split()
    )
    of_map = stats.to_xarray().drop_vars(["topk_weight", "topk_position"])
    page = Page(report(of_map, tmp_path / "row.html"))
    assert page.about["length"] == SHORT
    assert page.array("weights_map")[0].shape[2:] == cells.shape
    # Who attends to whom, by the map: the last token is of the last bin.
    opened = open_page(tmp_path / "row.html")
    opened.select_option("#layer", "1")
    opened.select_option("#head", "2")
    token(opened, SHORT - 1).click()
    opened.locator("#token summary", has_text="layer 1, head 2").wait_for()
    opened.locator(".links.from .link").first.wait_for()
    within = [[at for at in range(SHORT) if (at + start) // width == number] for number in bins]
    links = opened.locator(".links.from .link").evaluate_all(
        "all => all.map(({dataset: {start, last, weight}}) => [start, last, weight].map(Number))"
    )
    assert [each[:2] for each in sorted(links)] == [[each[0], each[-1]] for each in within]
    np.testing.assert_allclose([each[2] for each in sorted(links)], cells[-1], **page.stated("weights_map", 1))
    (chart,) = drawn(opened, "map")
    np.testing.assert_allclose(chart["x"], [first + width * at + (width - 1) / 2 for at in range(len(bins))])
    assert chart["x"] == chart["y"]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rule", [Rule(), Rule(window=4), Rule(window=2), Rule(direction="bidirectional")])
def test_positions_count_from_the_first_token_with_any_stride(rule, stride):
    for padding in range(7):
        for behind in range(4):
            real = [False] * padding + [True] * 14 + [False] * behind
            row = row_alone(Model(Text(real, [0] * len(real), stride=stride), {0: rule, 1: rule}, 2).dataset(), 0)
            names = row["key_token"].values[0].tolist()
            shift = int(names[0][1:])
            assert [int(name[1:]) - shift for name in names] == row["key"].values.tolist()
            # No token of the text is ever lost; what cannot be told to be padding stays with its old number.
            assert {f"t{at}" for at in range(padding, padding + 14)} <= {*names}
            assert shift in (0, padding)
            if stride == 1 or rule.window is None:
                assert shift == padding or not padding
            assert len(names) <= padding - shift + 14 + (behind if stride > 1 else 0)


def test_what_no_measured_query_sees_is_not_taken_for_padding(ids):
    """Windows hide keys too: of some queries, of a cache."""
    model = Model(Text([True] * 20, [0] * 20, first_query=12), {0: Rule(window=4)}, 1)
    row = row_alone(model.dataset(), 0)
    assert row["key"].values.tolist() == list(range(20))
    assert row["query"].values.tolist() == list(range(12, 20))
    some = measured(ids).select(queries=[20, 21]).to_xarray()
    assert row_alone(some, 0)["key"].values.tolist() == list(range(LENGTH))


def test_of_two_texts_each_has_its_own_padding():
    """In cross-attention; here keys are padded on both sides, queries on the right."""
    dataset = Model(Text([False] * 2 + [True] * 6 + [False], [0] * 9), {0: Rule()}, 1).dataset(direction="cross")
    row = row_alone(dataset.isel(query=slice(2, None)).assign_coords(query=range(7)), 0)
    assert row["query"].values.tolist() == row["key"].values.tolist() == list(range(6))
    assert (
        row["key_token"].values[0].tolist() == row["query_token"].values[0].tolist() == [f"t{at}" for at in range(2, 8)]
    )
    places = dataset["topk_position"].values[:, :, :, 2:8]
    assert (row["topk_position"].values == places - 2).all()


def test_the_page_counts_from_the_first_token(ids, tmp_path):
    mask, _ = batch_of(ids, "left")
    page = Page(report(measured(ids, mask), tmp_path / "row.html", exact=[0, -1]))
    assert page.about["length"] == len(page.about["tokens"]) == SHORT
    assert page.about["queries"] == {"first": 0, "stride": 1, "count": SHORT}
    assert (page.about["row"], page.about["rows"]) == (0, 2)
    assert {"token": 0} in page.about["findings"][0]["words"]
    with pytest.raises(ValueError, match="exact: 20 is no measured query; there are 11, from 0 to 10"):
        report(measured(ids, mask), tmp_path / "row.html", exact=20)


def test_a_number_that_is_not_there_is_a_dash(ids, open_page, tmp_path):
    """Of a token that is no measured query the page has what is of keys; the rest is not passed over in silence."""
    page = open_page(report(measured(ids, query_stride=2), tmp_path / "row.html"))
    page.locator("#token summary, #tokens .token").first.wait_for()
    token(page, 7).click()
    page.locator("#token h3", has_text="Token 7 ").wait_for()
    page.locator("#token dd").first.wait_for(state="attached")
    names, said = (page.locator(f"#token {part}").all_text_contents() for part in ("dt", "dd"))
    numbers = dict(zip(names, said, strict=True))
    assert numbers["entropy"] == numbers["hidden norm"] == "–"
    assert numbers["received"].endswith(" probability")


@pytest.mark.parametrize("generate", [(), ("--generate", "3")])
def test_two_files_are_two_texts(generate, tmp_path):
    llama = cli_models.save("llama", tmp_path / "llama")
    (tmp_path / "long.txt").write_text("y" * 60)
    (tmp_path / "short.txt").write_text("Zebra")
    files = ["--file", tmp_path / "long.txt", "--file", tmp_path / "short.txt"]
    result = invoke("run", llama, *files, *generate, "--layers", "0", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    of_long, of_short = result.output.split("short.txt", 1)
    assert "long.txt" in of_long
    table = re.findall(r" (\d+) (\S+): .*×, ([\d,]+) .*×, (\d+) (\S+) *\n", of_short)
    assert len(table) == 3
    length = 7 if generate else 5
    for position, strongest, queries, peak, of_peak in table:
        for at, name in ((int(position), strongest), (int(peak), of_peak)):
            assert at < length
            assert at >= 5 or name == "Zebra"[at]
        assert int(queries) == length - int(position)
    page = Page(tmp_path / "out" / "short.txt" / "report.html")
    assert page.about["tokens"][:5] == list("Zebra")
    assert page.about["length"] == length
