"""What the report says above its pictures, and how they can be seen: titles, ticks, colours, directions, sizes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from browsing import drawn
from conftest import tiny_model
from report_page import measured, written

from llama_attn.analysis.heads import THRESHOLDS
from llama_attn.viz import report


def test_the_header_says_which_run_it_is(ids, open_page, tmp_path):
    stats = measured(ids, layers=(0, 2))
    object.__setattr__(stats, "model", "parrot")
    words = [" Ahoy", ",", "\n", "matey", *(f"Ġsea{i}" for i in range(33))]
    object.__setattr__(stats, "tokens", [words, words])
    page = open_page(report(stats, tmp_path / "part.html"))
    text = "Ahoy, matey sea0 sea1 sea2 sea3 sea4 sea5 sea6 sea7 sea8 se…"
    assert page.title() == f"Attention report · parrot · “{text}”"
    assert page.locator("#opening").inner_text() == f"“{text}”"
    assert "layers 0, 2 of 3 · " in page.locator("#facts").inner_text()
    for name in ("grid", "profile", "massive"):
        drawn(page, name)
        assert page.locator(f"#{name} .chart-title").inner_text().endswith(", layers 0, 2 of 3")
    whole = open_page(report(measured(ids, tokens=False), tmp_path / "whole.html"))
    assert whole.locator("#facts").inner_text().startswith("3 layers · ")
    assert whole.locator("#opening").inner_text() == ""
    drawn(whole, "grid")
    assert "of 3" not in whole.locator("#grid .chart-title").inner_text()
    # Layers without attention are not missing.
    hybrid = measured(ids, layers=(0, 2)).to_xarray().assign_attrs(without_attention="[1]")
    assert written(hybrid, tmp_path).about["part"] == ""


def test_the_header_counts_the_tokens_that_are_known(ids, open_page, tmp_path):
    for stride, words in ((1, " · 37 tokens · "), (5, " · at least 36 tokens · ")):
        page = open_page(report(measured(ids, query_stride=stride), tmp_path / f"{stride}.html"))
        assert words in page.locator("#facts").inner_text()


def test_padding_is_no_opening(ids, left_padding, tmp_path):
    stats = measured(ids, left_padding)
    object.__setattr__(stats, "tokens", [["pad"] * 9 + ["Ahoy"] + ["Ġsea"] * 27] * 2)
    assert written(stats, tmp_path).about["opening"].startswith("Ahoy sea sea")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_bar_hides_what_it_covers_and_no_role_looks_like_no_data(scheme, ids, open_page, tmp_path):
    page = open_page(report(measured(ids), tmp_path / "report.html"), color_scheme=scheme)
    assert re.fullmatch(
        r"rgb\(\d+, \d+, \d+\)", page.locator(".bar").evaluate("bar => getComputedStyle(bar).backgroundColor")
    )
    page.select_option("#grid-statistic", "roles")
    page.locator("#grid .chart-title", has_text="Role").wait_for()
    legend = drawn(page, "grid", "all => all[0].data.slice(1).map(({name, marker}) => [name, marker.color])")
    assert len({colour for _, colour in legend}) == len(legend) == len(THRESHOLDS) + 1
    for name, colour in legend:
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        assert max(red, green, blue) - min(red, green, blue) > 40, f"{name} is grey, which means “no data”"


@pytest.mark.parametrize(("heads", "scrolls"), [(6, False), (24, True)])
def test_small_maps_can_be_hit_on_a_phone(heads, scrolls, ids, open_page, tmp_path):
    model = tiny_model(num_attention_heads=heads, num_key_value_heads=2, head_dim=8)
    page = open_page(
        report(measured(ids, model=model), tmp_path / "narrow.html"), viewport={"width": 400, "height": 800}
    )
    view = page.locator("#model-view")
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    size = (box["height"] - 19) / 3
    assert size >= 24
    assert box["width"] == pytest.approx(29 + heads * size)
    assert (box["width"] > 400) == scrolls
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    view.click(position={"x": 28 + 4.5 * size, "y": 18 + 1.5 * size})
    assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("1", "4")


def test_ticks_of_logarithmic_axes_are_numbers_in_full(ids, open_page, tmp_path):
    stats = measured(ids)
    for name in ("hidden_max", "hidden_top", "hidden_norm"):
        stats[name][1:, :, 0] = 24_926
    page = open_page(report(stats, tmp_path / "spiky.html"))
    for name in ("massive", "hidden"):
        assert drawn(page, name, "all => all[0]._fullLayout.yaxis.type") == "log"
        ticks = page.locator(f"#{name} .ytick text")
        says = [float(text.replace(",", "")) for text in ticks.all_text_contents()]
        heights = ticks.evaluate_all("all => all.map(each => each.getBoundingClientRect().y)")
        assert len(says) >= 3
        # On a logarithmic axis, heights are linear in the logarithms of what is written.
        slope, start = np.polyfit(np.log10(says), heights, 1)
        np.testing.assert_allclose(start + slope * np.log10(says), heights, atol=1.5)
