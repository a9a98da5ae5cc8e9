"""The HTML report in a browser, as a reader uses it: mouse, keyboard, both themes, narrow and wide."""

from __future__ import annotations

import base64
import io
import shutil
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_report import Page, measured
from test_viz import TOKENS

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import head_means, layer_evolution, sink_rate
from llama_attn.token_text import readable
from llama_attn.viz import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a report without a network; at the end, nothing may have been asked for and nothing complained of."""
    contexts, requests, complaints, opened = [], [], [], []

    def open_(path, **settings):
        context = chromium.new_context(offline=True, **({"viewport": {"width": 1280, "height": 900}} | settings))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        opened.append(path.as_uri())
        page.locator("html[data-ready=all]").wait_for(state="attached")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == opened
    assert complaints == []


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


def token(page, position):
    return page.locator(f'.token[data-position="{position}"]')


def shown_numbers(page):
    """What the panel says of the chosen token: name -> (number, how far it may be off)."""
    entries = page.locator("#token dd").evaluate_all(
        "all => all.map(each => [each.dataset.statistic, Number(each.dataset.value), Number(each.dataset.error)])"
    )
    return {name: (value, error) for name, value, error in entries}


def shown_links(page, direction):
    """The list of a direction: [(position, weight)], weights as stored in the page."""
    return page.locator(f".links.{direction} .link").evaluate_all(
        "all => all.map(each => [Number(each.dataset.start), Number(each.dataset.weight)])"
    )


def drawn(page, name, traces="all => all[0].data.map(({x, y, z}) => ({x, y, z}))"):
    """The data of a chart, once it is drawn."""
    page.locator(f"#{name}").scroll_into_view_if_needed()
    page.locator(f"#{name}[data-drawn]").wait_for()
    return page.locator(f"#{name} .plot").evaluate_all(traces)


def until(condition):
    """Waits for what comes soon."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def twice(tolerances):
    return {name: 2 * value for name, value in tolerances.items()}


def numbers(rows):
    return np.array([[np.nan if cell is None else cell for cell in row] for row in rows], dtype=float)


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
    np.testing.assert_allclose(numbers(trace["z"]).T, head_means(dataset, "sink_mass").values, rtol=1e-6)
    page.select_option("#grid-statistic", label="key norm")
    page.locator("#grid .chart-title", has_text="Key norm").wait_for()
    (trace,) = drawn(page, "grid")
    np.testing.assert_allclose(numbers(trace["z"]).T, head_means(dataset, "key_norm").values, rtol=1e-6)
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
    # A click in the grid chooses a head.
    page.locator("#grid").scroll_into_view_if_needed()
    page.locator("#grid .nsewdrag").first.click(position={"x": 8, "y": 8})
    assert page.locator("#layer").input_value() == "0"
    assert page.locator("#head").input_value() == "0"


@pytest.mark.smollm2
def test_the_model_view_chooses_and_shows_maps(demo_stats, demo_report, open_page):
    page = open_page(demo_report)
    view = page.locator("#model-view")
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    size = (box["width"] - 29) / 30
    view.click(position={"x": 28 + 17.4 * size, "y": 18 + 3.4 * size})
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
    cells = pixels[np.ix_(18 + 5 * int(size) + at, 28 + 16 * int(size) + at)]
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


def test_hostile_tokens_are_text(ids, open_page, tmp_path):
    stats = measured(ids)
    hacks = [
        "<b>bold</b></script><script>window.hacked = 1</script>",
        "<img src=x onerror='window.hacked=1'>",
        "\"'`&amp;<b>",
        "\u202eevil",
        "${1}",
        "{{code}}",
    ]
    tokens = [*hacks, *TOKENS]
    object.__setattr__(stats, "tokens", [[tokens[i % len(tokens)] for i in range(37)] for _ in range(2)])
    object.__setattr__(stats, "model", hacks[0])
    page = open_page(report(stats, tmp_path / "hostile.html"), viewport={"width": 400, "height": 800})
    shown = page.locator(".token").all_inner_texts()
    for position, each in enumerate(stats.tokens[0]):
        # An empty token has a thin space, so that it can be clicked.
        expected = readable(each, 80) or "\u2009"
        assert shown[position] == expected + ("[10,000 characters]" if len(each) > 80 else "")
    assert "\u202e" not in "".join(shown)
    assert page.locator("h1").inner_text() == hacks[0]
    for position in range(len(tokens)):
        token(page, position).click()
        page.locator("#token h3", has_text=f"Token {position} ").wait_for()
        assert page.locator("#token h3 .chip").inner_text() == shown[position].replace("\u2009", "(empty)")
    # Labels of charts read some HTML; tokens there are text as well.
    drawn(page, "hidden")
    page.locator("#hidden .nsewdrag").hover(position={"x": 2, "y": 100})
    page.locator("#hidden .hovertext").wait_for()
    assert readable(hacks[0], 80) in page.locator("#hidden .hovertext").text_content()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, b, script[src]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    direction = token(page, stats.tokens[0].index("שלום")).evaluate("each => getComputedStyle(each).unicodeBidi")
    assert direction == "isolate"


def test_links_from_lists_of_keys(ids, open_page, tmp_path):
    """Without a map, the lists of the most attended keys answer."""
    stats = measured(ids, statistics=("received", "topk_weight", "topk_position"), norms=False, top_k=4)
    page = open_page(report(stats, tmp_path / "keys.html"))
    page.select_option("#layer", "2")
    page.select_option("#head", label="5")
    token(page, 30).click()
    page.locator("#token h3", has_text="Token 30").wait_for()
    weight, position = stats["topk_weight"][2, 0, 5], stats["topk_position"][2, 0, 5]
    links = shown_links(page, "from")
    assert [at for at, _ in links] == position[30].tolist()
    stated = Page(tmp_path / "keys.html").stated("topk_weight", 2)
    np.testing.assert_allclose([share for _, share in links], weight[30], **stated)
    query, rank = np.nonzero((position == 30).numpy())
    expected = sorted(zip((-weight[query, rank]).tolist(), query.tolist(), strict=True))[:8]
    links = shown_links(page, "to")
    assert [at for at, _ in links] == [at for _, at in expected]
    np.testing.assert_allclose([share for _, share in links], [-share for share, _ in expected], **stated)
    page.select_option("#head", label="mean")
    page.locator("#token summary", has_text="mean over heads").wait_for()
    total = np.zeros(37)
    for head in range(6):
        np.add.at(
            total, stats["topk_position"][2, 0, head, 30].numpy(), stats["topk_weight"][2, 0, head, 30].numpy() / 6
        )
    links = shown_links(page, "from")
    np.testing.assert_allclose([share for _, share in links], np.sort(total)[::-1][: len(links)], **stated)
    text = page.locator("main").inner_text()
    assert "weights_map was not measured" in text
    assert "hidden_norm was not measured" in text
    assert "entropy" in page.locator("#missing").inner_text()


@pytest.mark.parametrize("case", ["one token", "no data", "two layers", "norms only", "pooled"])
def test_unusual_runs_open(case, ids, open_page, tmp_path):
    if case == "one token":
        stats = measured(ids[:, :1])
    elif case == "two layers":
        stats = measured(ids, layers=(2, 0), heads=(3,), query_stride=2)
    elif case == "norms only":
        stats = measured(ids, statistics=("hidden_norm",), norms=False, tokens=False)
    else:
        stats = measured(ids.repeat(1, 6)[:, :211], model=tiny_model())
    if case == "no data":
        for tensor in stats.values.values():
            if tensor.is_floating_point():
                tensor[:] = torch.nan
    settings = {"max_megabytes": 2.08} if case == "pooled" else {}
    page = open_page(report(stats, tmp_path / "unusual.html", **settings))
    assert page.locator("#trouble").is_hidden()
    token(page, 0).click()
    page.locator("#token h3", has_text="Token 0").wait_for()
    for option in page.locator("#shade option").all():
        page.select_option("#shade", option.get_attribute("value"))
    for name in page.locator(".chart").evaluate_all("all => all.map(each => each.id)"):
        drawn(page, name)
    if case == "no data":
        assert page.locator(".token.nothing").count() == page.locator(".token").count()
    if case == "two layers":
        assert page.locator("#layer option").all_inner_texts() == ["0", "2"]
    said = page.locator("#pooling").inner_text()
    assert ("pooled" in said and "Nothing was pooled" not in said) == (case == "pooled")
    if case == "pooled":
        for name, entry in Page(tmp_path / "unusual.html").about["arrays"].items():
            if name.startswith("heads ") and entry["width"] > 1:
                assert (
                    f"{name[6:].replace('_', ' ')} of single heads"
                    in said.split(f"In bins of {entry['width']} tokens:")[1]
                )
        assert "In bins of 2 tokens:" in said
        page.select_option("#shade", label="entropy")
        page.select_option("#head", label="2")
        page.locator("#shade-note", has_text="mean").wait_for()
        page.locator("#method summary").click()
        assert "bins of" in page.locator("#method table").inner_text()


def test_a_long_text_is_drawn_in_parts(open_page, tmp_path):
    import xarray

    length = 20_000
    seen = np.arange(1, length + 1, dtype=np.int32)[None]
    along = np.linspace(0, 1, length, dtype=np.float32)[None, None, None]
    stats = xarray.Dataset(
        {
            "received": (("layer", "batch", "head", "key"), along, {"units": "probability", "long_name": "received"}),
            "visible_keys": (("batch", "query"), seen),
            "visible_queries": (("batch", "key"), seen[:, ::-1]),
        },
        {
            name: range(size)
            for name, size in (("layer", 1), ("batch", 1), ("head", 1), ("key", length), ("query", length))
        },
        {"config": '{"window": 64, "sink_tokens": 1}', "num_layers": 1},
    )
    page = open_page(report(stats, tmp_path / "long.html"))
    assert page.locator(".token").count() < length / 5
    token(page, 0).click()
    page.keyboard.press("End")
    last = token(page, length - 1)
    assert last.evaluate("each => each === document.activeElement")
    page.keyboard.press("Enter")
    page.locator("#token h3", has_text=f"Token {length - 1}").wait_for()
    assert page.evaluate("performance.getEntriesByName('interactive').length") == 1
    last.hover()
    page.locator("#tip", has_text="received: 1 probability").wait_for()
