"""The HTML report in a browser, as a reader uses it: mouse, keyboard, both themes, narrow and wide."""

from __future__ import annotations

import base64
import io

import matplotlib.image
import numpy as np
import pytest
import torch
from browsing import drawn, numbers, shown_links, shown_numbers, token, twice, until
from report_page import Page

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import head_means, layer_evolution, sink_rate
from llama_attn.stats.token_text import readable
from llama_attn.viz import report


@pytest.fixture(scope="module")
def demo_stats(_smollm2):
    from llama_attn.demo import SYSTEM, USER

    model, tokenizer = _smollm2
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.set_attn_implementation("sdpa")
    config = AttentionStatsConfig(statistics="all", norms=True)
    with torch.no_grad():
        outputs = model(**inputs, use_cache=False, output_attention_stats=config)
    return outputs.attention_stats.with_tokens(tokenizer, inputs["input_ids"])


@pytest.fixture(scope="module")
def demo_report(demo_stats, tmp_path_factory):
    return report(demo_stats, tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.smollm2
def test_a_reader_explores_a_real_run(demo_stats, demo_report, open_page):
    page, held = open_page(demo_report), Page(demo_report)
    dataset = demo_stats.to_xarray()
    assert page.locator(".token").count() == demo_stats.num_keys
    assert page.locator(".token").all_inner_texts() == [readable(each) for each in demo_stats.tokens[0]]
    assert f"{float(sink_rate(dataset)):.0%}" == page.locator(".answer .figure strong").first.inner_text()
    seen = set()
    for layer, head, position in ((16, 0, 20), (3, 7, 33), (29, None, 1)):
        page.select_option("#layer", str(layer))
        page.select_option("#head", label="mean" if head is None else str(head))
        token(page, position).click()
        page.locator("#token h3", has_text=f"Token {position}").wait_for()
        label = f"Numbers of this token, layer {layer}, {'mean over heads' if head is None else f'head {head}'}"
        page.locator("#token summary", has_text=label).wait_for()
        of_head = dataset.isel(batch=0) if head is None else dataset.isel(batch=0).sel(head=head)
        shown = shown_numbers(page)
        for name, (value, error) in shown.items():
            values = of_head[name]
            values = values.sel({"layer" if "layer" in values.dims else "hidden_layer": layer})
            values = values.isel({"query" if "query" in values.dims else "key": position}).astype(float)
            assert abs(value - float(values.mean())) <= error + 1e-6 * abs(value), (name, layer, head)
        assert {"entropy", "received", "hidden_norm", "key_norm", "induction"} <= set(shown)
        maps = demo_stats["weights_map"][layer, 0]
        stated = held.stated("weights_map", layer)
        weights = (maps.mean(0) if head is None else maps[head]).double().numpy()
        for direction, line in (("from", weights[position]), ("to", weights[:, position])):
            links = shown_links(page, direction)
            best = np.argsort(-line, kind="stable")[: len(links)]
            assert len(links) == min(8, int((line > 0).sum()))
            np.testing.assert_allclose([weight for _, weight in links], line[best], **stated)
            np.testing.assert_allclose(line[[at for at, _ in links]], line[best], **twice(stated))
            seen.add((direction, tuple(at for at, _ in links)))
    assert len(seen) == 6, "layer, head and token change what is shown"


@pytest.mark.smollm2
def test_shades_tips_and_links_lead_on(demo_stats, demo_report, open_page):
    page = open_page(demo_report)
    page.select_option("#layer", "24")
    page.select_option("#head", label="4")
    page.select_option("#shade", label="sink mass")
    page.locator("#shade-note", has_text="layer 24, head 4").wait_for()
    shares = page.locator(".token").evaluate_all(
        "all => all.map(each => Number(each.style.getPropertyValue('--share')))"
    )
    mass = demo_stats["sink_mass"][24, 0, 4].numpy()
    np.testing.assert_allclose(shares, 100 * np.sqrt(mass / mass.max()), atol=0.51)
    token(page, 7).hover()
    value = float(page.locator("#tip").inner_text().split("sink mass:")[1].split()[0])
    assert value == pytest.approx(mass[7], rel=6e-3)
    # From a token to the one it attends to most.
    token(page, 20).click()
    page.locator("#token h3", has_text="Token 20").wait_for()
    page.locator(".links.from .link").first.click()
    page.locator("#token h3", has_text="Token 0").wait_for()
    assert token(page, 0).get_attribute("aria-selected") == "true"
    assert page.locator('.token[aria-selected="true"]').count() == 1
    page.select_option("#shade", "to")
    page.locator("#shade-note", has_text="From the attention map of layer 24, head 4").wait_for()
    shares = page.locator(".token").evaluate_all(
        "all => all.map(each => Number(each.style.getPropertyValue('--share')))"
    )
    column = demo_stats["weights_map"][24, 0, 4, :, 0].numpy()
    np.testing.assert_allclose(shares, 100 * np.sqrt(column / column.max()), atol=0.51)


@pytest.mark.smollm2
def test_charts_show_the_statistics(demo_stats, demo_report, open_page):
    page, held = open_page(demo_report), Page(demo_report)
    dataset = demo_stats.to_xarray()
    page.select_option("#layer", "18")
    page.select_option("#head", label="6")
    (trace,) = drawn(page, "grid")
    np.testing.assert_allclose(numbers(trace["z"]), head_means(dataset, "sink_mass").values, rtol=1e-6)
    page.select_option("#grid-statistic", label="key norm")
    page.locator("#grid .chart-title", has_text="Key norm").wait_for()
    (trace,) = drawn(page, "grid")
    np.testing.assert_allclose(numbers(trace["z"]), head_means(dataset, "key_norm").values, rtol=1e-6)
    page.select_option("#grid-statistic", "roles")
    page.locator("#grid .chart-title", has_text="Role").wait_for()
    evolution = layer_evolution(dataset)
    for name in ("entropy", "hidden_norm"):
        page.select_option("#profile-statistic", name)
        page.locator("#profile .chart-title", has_text=name.split("_")[0].capitalize()).wait_for()
        page.wait_for_timeout(300)
        line = drawn(page, "profile")[-1]
        np.testing.assert_allclose(line["y"], evolution[name].sel(summary="mean").values, rtol=1e-6)
    assert line["x"][-1] == "output"
    (trace,) = drawn(page, "map")
    weights = demo_stats["weights_map"][18, 0, 6].numpy()
    below = np.tril_indices(len(weights))
    np.testing.assert_allclose(numbers(trace["z"])[below] ** 2, weights[below], **held.stated("weights_map", 18))
    (trace,) = drawn(page, "distance")
    np.testing.assert_allclose(trace["y"], demo_stats["distance_histogram"][18, 0, 6], rtol=1e-6)
    (trace,) = drawn(page, "hidden")
    np.testing.assert_allclose(trace["y"], demo_stats["hidden_norm"][18, 0], **held.stated("mean hidden_norm", 18))
    mean, *of_heads = drawn(page, "kv")[:4]
    np.testing.assert_allclose(mean["y"], demo_stats["key_norm"][18, 0].mean(0), **held.stated("mean key_norm", 18))
    np.testing.assert_allclose(of_heads[1]["y"], demo_stats["key_norm"][18, 0, 1], **held.stated("heads key_norm", 18))
    largest = drawn(page, "massive")[0]
    np.testing.assert_allclose(largest["y"], demo_stats["hidden_max"][:, 0].amax(-1), rtol=1e-6)
    # A click in the grid, layers from top to bottom as in the figures, chooses a head.
    page.locator("#grid").scroll_into_view_if_needed()
    area = page.locator("#grid .nsewdrag").first
    box = area.bounding_box()
    area.click(position={"x": 2.5 / 9 * box["width"], "y": 29.5 / 30 * box["height"]})
    assert page.locator("#layer").input_value() == "29"
    assert page.locator("#head").input_value() == "2"


@pytest.mark.smollm2
def test_the_model_view_chooses_and_shows_maps(demo_stats, demo_report, open_page):
    page = open_page(demo_report)
    view = page.locator("#model-view")
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    size = (box["height"] - 19) / 30
    assert box["width"] == pytest.approx(29 + 9 * size)
    view.click(position={"x": 28 + 3.4 * size, "y": 18 + 17.4 * size})
    assert page.locator("#layer").input_value() == "17"
    assert page.locator("#head").input_value() == "3"
    page.locator("#map .chart-title", has_text="layer 17, head 3").wait_for()
    # The miniature of a head is its map: brighter where there is more weight.
    picture = base64.b64decode(view.evaluate("canvas => canvas.toDataURL()").split(",")[1])
    pixels = matplotlib.image.imread(io.BytesIO(picture))[..., :3].sum(-1)
    weights = demo_stats["weights_map"][16, 0, 5].numpy()
    bins = len(weights)
    inner = int(size) - max(1, round(int(size) / 12))
    at = np.floor((np.arange(bins) + 0.5) * inner / bins).astype(int)
    cells = pixels[np.ix_(18 + 16 * int(size) + at, 28 + 5 * int(size) + at)]
    below = np.tril_indices(bins)
    assert np.corrcoef(cells[below], np.sqrt(weights[below]))[0, 1] > 0.8


@pytest.mark.smollm2
def test_the_keyboard_alone_is_enough(demo_stats, demo_report, open_page):
    page = open_page(demo_report)
    press = page.keyboard.press

    def focused(what):
        return page.evaluate(f"document.activeElement.matches('{what}')")

    def tab_to(what):
        for _ in range(40):
            press("Tab")
            if focused(what):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"the focus on {what} is not seen"
                return
        raise AssertionError(f"{what} is not reached")

    tab_to("#theme")
    press("Enter")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    tab_to("#layer")
    press("Home")
    press("ArrowDown")
    tab_to("#head")
    press("ArrowDown")
    assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("1", "0")
    tab_to("#shade")
    tab_to(".token")
    assert focused('.token[data-position="0"]'), "one stop for all tokens"
    for _ in range(3):
        press("ArrowRight")
    press("ArrowLeft")
    press("Enter")
    page.locator("#token h3", has_text="Token 2").wait_for()
    assert token(page, 2).get_attribute("aria-selected") == "true"
    press("ArrowDown")
    down = page.evaluate("Number(document.activeElement.dataset.position)")
    assert token(page, down).bounding_box()["y"] > token(page, 2).bounding_box()["y"]
    press("ArrowUp")
    assert (
        token(page, page.evaluate("Number(document.activeElement.dataset.position)")).bounding_box()["y"]
        == token(page, 2).bounding_box()["y"]
    )
    press("End")
    press(" ")
    last = demo_stats.num_keys - 1
    page.locator("#token h3", has_text=f"Token {last}").wait_for()
    tab_to(".links.from .link")
    start = page.evaluate("document.activeElement.dataset.start")
    press("Enter")
    page.locator("#token h3", has_text=f"Token {start} ").wait_for()
    tab_to("#model-view")
    press("ArrowRight")
    press("ArrowDown")
    assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("2", "1")
    tab_to("#grid-statistic")
    tab_to("#profile-statistic")
    tab_to("#method summary")


@pytest.mark.smollm2
@pytest.mark.parametrize("width", [1280, 400])
def test_both_themes_fit_both_widths(width, demo_report, open_page):
    background = "getComputedStyle(document.body).backgroundColor"
    colours = {}
    for scheme in ("light", "dark"):
        page = open_page(demo_report, viewport={"width": width, "height": 800}, color_scheme=scheme)
        colours[scheme] = page.evaluate(background)
        for name in ("map", "grid", "profile", "hidden", "kv", "massive"):
            drawn(page, name)
        # No sideways scrolling, and nothing inside a card is cut off.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.locator("section :not(canvas):not(option)").evaluate_all(
            "(all, width) => all.filter(each => each.getBoundingClientRect().right > width + 1 && !each.closest('.scroller')).map(each => each.outerHTML.slice(0, 80))",
            width,
        )
        assert wide == []
    assert colours["light"] != colours["dark"]
    page.locator("#theme").click()
    assert page.evaluate(background) == colours["light"]
    assert page.locator("#theme").inner_text() == "Dark"
    drawn(page, "grid")
    muted = page.evaluate("getComputedStyle(document.querySelector('.muted')).color")
    until(lambda: page.locator("#grid .xtick text").first.evaluate("each => getComputedStyle(each).fill") == muted)
