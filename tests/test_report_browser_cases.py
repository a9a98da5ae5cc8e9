"""The HTML report in a browser: hostile tokens, unusual runs, long texts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from browsing import HACKS, drawn, shown_links, token
from conftest import tiny_model
from report_page import Page, measured
from test_viz import TOKENS

from llama_attn.stats.token_text import readable
from llama_attn.viz import report


def test_hostile_tokens_are_text(ids, open_page, tmp_path):
    stats = measured(ids)
    tokens = [*HACKS, *TOKENS]
    object.__setattr__(stats, "tokens", [[tokens[i % len(tokens)] for i in range(37)] for _ in range(2)])
    object.__setattr__(stats, "model", HACKS[0])
    page = open_page(report(stats, tmp_path / "hostile.html"), viewport={"width": 400, "height": 800})
    shown = page.locator(".token").all_inner_texts()
    for position, each in enumerate(stats.tokens[0]):
        expected = readable(each, 80)
        assert shown[position] == (expected or "(empty)") + ("[10,000 characters]" if len(each) > 80 else "")
    assert "\u202e" not in "".join(shown)
    assert page.locator("h1").inner_text() == HACKS[0]
    for position in range(len(tokens)):
        token(page, position).click()
        page.locator("#token h3", has_text=f"Token {position} ").wait_for()
        assert page.locator("#token h3 .chip").inner_text() == shown[position]
    # Labels of charts read some HTML; tokens there are text as well.
    drawn(page, "hidden")
    page.locator("#hidden .nsewdrag").hover(position={"x": 2, "y": 100})
    page.locator("#hidden .hovertext").wait_for()
    assert readable(HACKS[0], 80) in page.locator("#hidden .hovertext").text_content()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, b, script[src]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    direction = token(page, stats.tokens[0].index("שלום")).evaluate("each => getComputedStyle(each).unicodeBidi")
    assert direction == "isolate"


def test_what_is_almost_all_is_not_all(ids, open_page, tmp_path):
    stats = measured(ids, statistics=("received", "topk_weight", "topk_position"), norms=False, top_k=4)
    stats["topk_weight"][2, 0, 5, 30] = torch.tensor([0.998, 0.0012, 0.0004, 0.0004])
    stats["topk_weight"][2, 0, 5, 20] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    page = open_page(report(stats, tmp_path / "almost.html"))
    page.select_option("#layer", "2")
    page.select_option("#head", label="5")
    for position, strongest in ((30, ">99%"), (20, "100%")):
        token(page, position).click()
        page.locator("#token h3", has_text=f"Token {position}").wait_for()
        assert page.locator(".links.from .link .weight").first.inner_text() == strongest


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
    settings = {"max_megabytes": 2.1} if case == "pooled" else {}
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
    assert ("tokens were pooled to their mean" in said) == (case == "pooled")
    # Maps of 211 tokens are in bins.
    binned = case in ("no data", "pooled")
    assert ("Nothing was pooled" not in said) == binned == bool(re.search(r"in bins of [48] × [48] tokens", said))
    if case == "pooled":
        for name, entry in Page(tmp_path / "unusual.html").about["arrays"].items():
            if name.startswith("heads ") and entry["width"] > 1:
                assert (
                    f"{name[6:].replace('_', ' ')} of single heads"
                    in said.split(f"In bins of {entry['width']} tokens:")[1]
                )
        assert "In bins of 2 tokens:" in said
        page.select_option("#head", label="2")
        entropy = page.locator("#shade option", has_text=re.compile("^entropy, in bins of [24] tokens$"))
        page.select_option("#shade", entropy.get_attribute("value"))
        page.locator("#shade-note", has_text="mean").wait_for()
        page.locator("#token summary", has_text="head 2").click()
        held = Page(tmp_path / "unusual.html").about["arrays"]
        width = held.get("heads entropy", held["mean entropy"])["width"]
        pooled = ("" if "heads entropy" in held else ", mean over heads") + f", mean over {width} tokens"
        assert page.locator("#token dd[data-statistic=entropy]").inner_text().endswith(f" nat{pooled}")
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
        }
        # Short lines, so that the text is higher than was guessed before it was made.
        | {"key_token": (("batch", "key"), [["sea" if i % 3 else "Ċ" for i in range(length)]])},
        {"config": '{"window": 64, "sink_tokens": 1}', "num_layers": 1},
    )
    page = open_page(report(stats, tmp_path / "long.html"))
    assert page.locator(".token").count() < length / 5
    token(page, 0).click()
    page.keyboard.press("End")
    last = token(page, length - 1)
    assert last.evaluate("each => each === document.activeElement")
    page.wait_for_timeout(500)  # The text around it is made meanwhile.
    inside = "each => { const box = each.getBoundingClientRect(), list = each.closest('#tokens').getBoundingClientRect(); return box.top >= list.top && box.bottom <= list.bottom && box.bottom <= window.innerHeight; }"
    assert last.evaluate(inside)
    page.keyboard.press("Enter")
    page.locator("#token h3", has_text=f"Token {length - 1}").wait_for()
    assert page.evaluate("performance.getEntriesByName('interactive').length") == 1
    last.hover()
    page.locator("#tip", has_text="received: 1 probability").wait_for()
