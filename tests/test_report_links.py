"""Who attends to whom in the report: which queries keep their own lists, and what is said of the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from browsing import shown_links, token
from conftest import tiny_model
from imagined import Model, Rule, Text
from oracle import causal_weights
from report_page import Page, measured
from test_viz import Tokenizer

from llama_attn import AttentionStatsConfig
from llama_attn.viz import report
from llama_attn.viz.report.contents import one_row
from llama_attn.viz.report.links import LAST_OF_PROMPT, by_importance, first_seen

PROMPT, NEW, SEGMENT_ENDS = 500, 24, 300
ASKED = (211, 411)


@pytest.fixture(scope="module")
def run():
    """A prompt of two segments and what was generated after it, and all its weights in float64."""
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(3, 97, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    segments = (torch.arange(PROMPT)[None] >= SEGMENT_ENDS).long(), ("document", "question")
    config = AttentionStatsConfig(statistics="all", segments=segments)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    outputs = model.generate(ids, output_attention_stats=config, **settings)
    fed = outputs.sequences[:, :-1]
    stats = outputs.attention_stats.with_tokens(Tokenizer(), torch.arange(fed.shape[1])[None])
    return stats, causal_weights(model, fed)


@pytest.fixture(scope="module")
def small(run, tmp_path_factory):
    """A page with room for few lists."""
    path = report(run[0], tmp_path_factory.mktemp("links") / "small.html", max_megabytes=2.4, exact=ASKED)
    page = Page(path)
    assert page.about["arrays"]["pooled_weight"]["width"] > 1
    return path, page


def test_the_lists_that_matter_are_exact(run, small):
    """Each is made of the strongest keys of its own query, in float64."""
    weights, page = run[1], small[1]
    own = page.array("topk_query")[0].tolist()
    last = weights.shape[2]
    assert {*ASKED, *range(PROMPT, last), *range(PROMPT - LAST_OF_PROMPT, PROMPT)} <= set(own), "as far as they fit"
    assert SEGMENT_ENDS - 1 in own
    assert page.about["findings"][-1]["question"] == "Which part of the text gets the attention?"
    assert len(own) < last / 2
    listed, allowed = page.array("topk_weight")
    position = page.array("topk_position")[0].astype(int) - 1
    for place, query in enumerate(own):
        best = -np.sort(-weights[:, :, query], -1)[..., :8]
        assert (np.abs(listed[:, :, place] - best) <= allowed[:, :, place] + 1e-9).all(), query
        found = np.take_along_axis(weights[:, :, query], position[:, :, place], -1)
        np.testing.assert_allclose(found, best, rtol=1e-6)


def choose(page, position, layer, head):
    page.select_option("#layer", str(layer))
    page.select_option("#head", label="mean" if head is None else str(head))
    token(page, position).click()
    whose = f"layer {layer}, {'mean over heads' if head is None else f'head {head}'}"
    page.locator("#token h3", has_text=f"Token {position} ").wait_for()
    page.locator("#token summary", has_text=whose).wait_for()


def test_a_token_is_given_its_own_links_or_those_of_its_bin(run, small, open_page):
    weights, (path, held) = run[1], small
    page = open_page(path)
    own, width = held.array("topk_query")[0].tolist(), held.about["arrays"]["pooled_weight"]["width"]
    heading = page.locator(".links.from h4")
    for query in (ASKED[0], PROMPT + 3):
        choose(page, query, 1, 4)
        assert heading.inner_text() == "It attends to"
        links = shown_links(page, "from")
        line = weights[1, 4, query]
        assert sorted(at for at, _ in links) == sorted(np.argsort(-line, kind="stable")[:8].tolist())
        np.testing.assert_allclose([share for _, share in links], -np.sort(-line)[:8], **held.stated("topk_weight", 1))
        # Of means over heads that do not all list a key, bounds are given.
        choose(page, query, 1, None)
        mean = weights[1, :, query].mean(0)
        bounds = page.locator(".links.from .link").evaluate_all(
            "all => all.map(({dataset: {start, least, most}}) => [start, least, most].map(Number))"
        )
        for at, least, most in bounds:
            assert least <= mean[int(at)] <= most
        assert any(most > 1.01 * least for _, least, most in bounds)
        others = np.delete(mean, [int(at) for at, _, _ in bounds]).max()
        said = page.locator("#token .source").inner_text().split("No other key gets more than ")[1]
        assert others <= float(said.split("%")[0]) / 100
    query = 100
    assert query not in own
    first = query // width * width
    choose(page, query, 1, 4)
    assert heading.inner_text() == f"Tokens {first}–{first + width - 1}, mean, attend to"
    assert f"exact=[{query}]" in page.locator("#token .source").inner_text()
    mean = weights[1, 4, first : first + width].mean(0)
    stated = held.stated("pooled_weight", 1)
    for at, share in shown_links(page, "from"):
        assert share <= mean[at] * (1 + stated["rtol"]) + stated["atol"]
    # Those who attend to a token: single ones, and bins whose tokens have no lists of their own.
    choose(page, 0, 1, 4)
    for start, last, share in page.locator(".links.to .link").evaluate_all(
        "all => all.map(({dataset: {start, last, weight}}) => [start, last, weight].map(Number))"
    ):
        seen = weights[1, 4, int(start) : int(last) + 1, 0].mean()
        assert share <= seen * (1 + stated["rtol"]) + stated["atol"]


def shading(page):
    """Shares of the colour scale and kinds of all tokens."""
    return page.locator(".token").evaluate_all(
        "all => all.map(each => [Number(each.style.getPropertyValue('--share')), each.className])"
    )


@pytest.mark.parametrize("window", [None, 20])
def test_shading_shows_nothing_that_the_token_cannot_see(window, open_page, tmp_path):
    model = Model(Text([False] * 3 + [True] * 197, [0] * 200), {0: Rule(), 1: Rule(window=window)}, 2, heads=2)
    dataset = model.dataset().drop_vars("weights_map")
    page = open_page(report(dataset, tmp_path / "lists.html"))
    page.select_option("#shade", "from")
    for query in (60, 150):
        choose(page, query, 1, 0)
        page.locator("#shade-note", has_text="From its own 4 most attended keys").wait_for()
        shown = shading(page)
        line = model.weights[1, 0, query + 3, 3:]
        assert {at for at, (share, _) in enumerate(shown) if share} == set(np.argsort(-line)[:4].tolist())
        assert [("unseen" in kind) for _, kind in shown] == (~model.masks[1, query + 3, 3:]).tolist()
        token(page, query + 1).hover()
        page.locator("#tip", has_text=f"not seen by token {query}").wait_for()
    page.select_option("#shade", "to")
    page.locator("#shade-note", has_text="From the most attended keys of each query").wait_for()
    assert [("unseen" in kind) for _, kind in shading(page)] == (~model.masks[1, 3:, 153]).tolist()


def test_bins_are_named_at_the_control(run, small, open_page):
    """At this length the map is in bins of 16 tokens, and a page that fits pools lists as well."""
    page = open_page(small[0])
    control = page.locator("#shade")
    choose(page, 100, 1, 4)
    width = small[1].about["arrays"]["pooled_weight"]["width"]
    first = 100 // width * width
    labels = dict(control.locator("option").evaluate_all("all => all.map(each => [each.value, each.textContent])"))
    assert labels["from"] == f"attention of tokens {first}–{first + width - 1}, mean"
    assert labels["map from"] == "attention of tokens 96–111, mean, in bins of 16 tokens"
    assert labels["map to"] == "attention to tokens 96–111, in bins of 16 tokens"
    choose(page, ASKED[1], 1, 4)
    assert control.locator("option[value=from]").inner_text() == "attention of the chosen token"
    assert "in bins of" in control.locator("option[value='map from']").inner_text()
    control.select_option("map from")
    page.locator("#shade-note", has_text="that of a whole bin").wait_for()
    assert all(not share for share, _ in shading(page)[ASKED[1] + 1 :])
    # Of queries with lists of their own, the exact share or none; of others, bins.
    control.select_option("to")
    page.locator("#shade-note", has_text="have lists of their own").wait_for()
    assert labels["to"] == f"attention to the chosen token, partly in bins of {width} tokens"
    own, weights = small[1].array("topk_query")[0], run[1][1, 4]
    own = own[own >= ASKED[1]]
    listed = weights[own, ASKED[1]] >= -np.sort(-weights[own], -1)[:, 7]
    shown = np.array([share for share, _ in shading(page)])[own]
    assert 0 < listed.sum() < len(own)
    assert not shown[~listed].any()
    shares = weights[own, ASKED[1]][listed]
    high = float(page.locator("#high").inner_text())
    np.testing.assert_allclose(shown[listed], 100 * np.sqrt(shares / high), atol=0.6)


def test_a_page_with_a_map_in_bins_does_not_say_that_nothing_was_pooled(run, open_page, tmp_path):
    page = open_page(report(run[0], tmp_path / "whole.html"))
    said = page.locator("#pooling").inner_text()
    assert "Nothing was pooled" not in said
    assert "Attention maps are in bins of 16 × 16 tokens" in said


def test_some_queries_are_found_by_their_positions(run, open_page, tmp_path):
    """As `select` leaves them, or any other choice: at unequal distances."""
    chosen = [3, 4, 60, 200, 201, 333]
    dataset = run[0].to_xarray().isel(query=chosen).drop_vars("weights_map")
    page = open_page(report(dataset, tmp_path / "some.html"))
    for query in chosen[2:]:
        choose(page, query, 2, 1)
        best = np.argsort(-run[1][2, 1, query], kind="stable")[:8]
        assert sorted(at for at, _ in shown_links(page, "from")) == sorted(best.tolist())
    choose(page, 202, 2, 1)
    assert "Token 202 is no measured query." in page.locator("#token .source").inner_text()
    choose(page, 400, 2, 1)
    assert page.locator(".links.to .muted").inner_text() == "It is not among the keys listed for any query."


def test_the_order_of_queries(run):
    row = one_row(run[0].to_xarray(), 0)
    order = by_importance(row, np.array(ASKED)).tolist()
    last = PROMPT + NEW - 1
    prompt = range(PROMPT - 1, PROMPT - 1 - LAST_OF_PROMPT, -1)
    expected = [*ASKED, *range(PROMPT, last), *prompt, SEGMENT_ENDS - 1]
    assert order[: len(expected)] == expected
    assert sorted(order) == list(range(last))
    unknown = by_importance(row.drop_vars("key_segment"), np.array([]))
    assert unknown.tolist() == list(range(last))[::-1]


def test_who_sees_what_is_known_or_not_said(ids, left_padding):
    text = Text([False] * 3 + [True] * 30, [0] * 20 + [1] * 13)
    for rules in ({0: Rule()}, {0: Rule(), 1: Rule(window=4)}, {0: Rule(chunk=6), 1: Rule(window=40)}):
        model = Model(text, rules, 3)
        seen = first_seen(one_row(model.dataset(), 0))
        masks = model.masks if len(seen) > 1 else model.masks[:1]
        for mask, first in zip(masks, seen, strict=True):
            expected = (np.arange(30) >= first[:, None]) & (np.arange(30) <= np.arange(30)[:, None])
            np.testing.assert_array_equal(mask[3:, 3:], expected)
    # Holes in a mask of the user's: every other key.
    holes = torch.ones(37, 37, dtype=torch.bool).tril() & ((torch.arange(37)[:, None] - torch.arange(37)) % 2 == 0)
    stats = measured(ids, mask=holes.expand(2, 1, 37, 37))
    assert first_seen(one_row(stats.to_xarray(), 0)) is None


@pytest.mark.parametrize(
    ("exact", "message"),
    [
        (37, r"exact: 37 is no measured query; there are 37, from 0 to 36"),
        ([3, -38], r"exact: -38 is no measured query"),
        (slice(40, None), r"exact: slice\(40, None, None\) is no measured query"),
        ("last", r"exact: expected positions such as 6231, -1 or slice\(-32, None\), got 'last'"),
        ([1.0], r"exact: expected positions"),
        (True, r"exact: expected positions"),
    ],
    ids=str,
)
def test_bad_positions(exact, message, ids, tmp_path):
    with pytest.raises(ValueError, match=message):
        report(measured(ids), tmp_path / "report.html", exact=exact)
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_stays_or_the_page_does_not_fit(run, open_page, tmp_path):
    with pytest.raises(ValueError, match="is too small for this run") as error:
        report(run[0], tmp_path / "report.html", max_megabytes=1, exact=[slice(0, 400), -1])
    least = float(str(error.value).split()[-1])
    page = Page(report(run[0], tmp_path / "report.html", max_megabytes=least, exact=[slice(0, 400), -1]))
    assert page.array("topk_query")[0].tolist() == [*range(400), PROMPT + NEW - 2]
    assert "pooled_weight" not in page
    shown, width = open_page(tmp_path / "report.html"), page.about["arrays"]["weights_map"]["width"]
    for query in (450, 300):
        choose(shown, query, 1, None)
        first = query // width * width
        alone = "It attends to", "attention of the chosen token"
        bins = f"okens {first}–{first + width - 1}"
        pooled = f"T{bins}, mean, attend to", f"attention of t{bins}, mean, in bins of {width} tokens"
        label = shown.locator("#shade option[value=from]").text_content()
        assert (shown.locator(".links.from h4").inner_text(), label) == (pooled if query == 450 else alone)
        assert shown.locator(".links.to h4").inner_text() == f"T{bins}, attended to by"
    assert "401 of 523 have lists of their own, with 8 keys" in shown.locator("#pooling").inner_text()
    with pytest.raises(ValueError, match="topk_weight"):
        report(measured(torch.ones(1, 5, dtype=torch.long), statistics=("entropy",)), tmp_path / "x.html", exact=-1)


def test_generated_tokens_are_marked(run, small, open_page):
    page = open_page(small[0])
    assert page.locator(".token.generated").evaluate_all(
        "all => all.map(each => Number(each.dataset.position))"
    ) == list(range(PROMPT, PROMPT + NEW - 1))
    assert page.locator("#generated").is_visible()
    token(page, PROMPT + 2).hover()
    page.locator("#tip", has_text=" · generated · ").wait_for()
