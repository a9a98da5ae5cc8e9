"""What the answer draws on, in the report: shares and shades are those of attention weights written out in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from browsing import until
from conftest import tiny_model
from oracle import causal_weights
from report_page import Page, written
from test_viz import Tokenizer

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import sources
from llama_attn.viz import report
from llama_attn.viz.report.answer import AnswerRows, answer_shares, writers
from llama_attn.viz.report.contents import one_row

PROMPT, NEW, SEGMENT_ENDS = 60, 8, (3, 41)
# Those that write the answer: the last of the prompt, and all that were fed back.
WRITERS = list(range(PROMPT - 1, PROMPT + NEW - 1))
SEGMENTS = ("document", "question", "generated")
STATISTICS = ("sink_mass", "received", "topk_weight", "topk_position")


def generated(model, rows="generated", sink_tokens=1, padding=0):
    ids = torch.randint(3, 97, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    # The first tokens have no segment, as those of a chat template.
    labels = torch.tensor([[sum(at >= end for end in SEGMENT_ENDS) - 1 for at in range(PROMPT)]])
    mask = torch.ones_like(ids)
    if padding:
        # A second row without padding, so that the first one has some.
        ids = torch.cat([torch.cat([torch.zeros(1, padding, dtype=ids.dtype), ids[:, : PROMPT - padding]], 1), ids])
        labels = torch.cat([torch.cat([labels.new_full((1, padding), -1), labels[:, : PROMPT - padding]], 1), labels])
        mask = (torch.arange(PROMPT) >= torch.tensor([padding, 0])[:, None]).long()
    config = AttentionStatsConfig(
        statistics=STATISTICS, segments=(labels, SEGMENTS[:2]), rows=rows, sink_tokens=sink_tokens, top_k=4
    )
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    outputs = model.generate(ids, attention_mask=mask, output_attention_stats=config, **settings)
    fed = outputs.sequences[:, :-1]
    return outputs.attention_stats.with_tokens(Tokenizer(), torch.arange(fed.numel()).view(fed.shape)), fed


@pytest.fixture(scope="module")
def run():
    """A prompt of two segments, what was generated after it, and all its weights in float64."""
    model = tiny_model(dtype=torch.float64)
    stats, fed = generated(model)
    return stats, causal_weights(model, fed)


def shares_of(weights):
    """On each segment, on none, and on the sink; of the last axis."""
    edges = [0, *SEGMENT_ENDS, PROMPT, weights.shape[-1]]
    none, *segments = (weights[..., a:b].sum(-1) for a, b in pairwise(edges))
    return np.stack([*segments, none, weights[..., 0]], -1)


def with_mean(values, axis):
    return np.concatenate([values.mean(axis, keepdims=True), values], axis)


def test_shares_are_sums_of_weights(run, tmp_path):
    stats, weights = run
    page = written(stats, tmp_path)
    shares = shares_of(weights[:, :, WRITERS])
    assert page.about["answer"]["queries"] == WRITERS
    assert [each["name"] for each in page.about["answer"]["segments"]] == list(SEGMENTS)
    assert [each["tokens"] for each in page.about["answer"]["segments"]] == [38, 19, NEW - 1]
    assert page.about["answer"]["runs"] == [[0, -1], [3, 0], [41, 1], [60, 2]]
    assert page.about["answer"]["sink"] == {"keys": [0], "places": [3]}
    mean = with_mean(with_mean(shares.mean(2), 1), 0)
    np.testing.assert_allclose(page.array("answer mean")[0], mean, atol=1e-6)
    page.check("answer shares", with_mean(shares.mean(1), 0))
    page.check("answer head shares", shares)


def test_rows_are_the_weights_of_every_key(run, tmp_path):
    stats, weights = run
    page, rows = written(stats, tmp_path), weights[:, :, WRITERS]
    assert page.about["answer"]["exact"] == [True] * NEW
    page.check("answer rows", rows.mean((0, 1))[None])
    page.check("answer layer rows", rows.mean(1))
    page.check("answer head rows", rows)
    page.check("answer text", with_mean(rows.mean((1, 2)), 0))
    page.check("answer head text", rows.mean(2))
    assert "row_weights" not in page.about["notShown"]


def listed(weights, count=4):
    """Only the largest of each row."""
    least = -np.sort(-weights, -1)[..., count - 1 : count]
    return np.where(weights >= least, weights, 0)


def test_without_rows_there_are_the_most_attended_keys(run, tmp_path):
    dataset, weights = run[0].to_xarray(), run[1][:, :, WRITERS]
    page = written(dataset.drop_vars("row_weights"), tmp_path)
    assert page.about["answer"]["exact"] == [False] * NEW
    page.check("answer head rows", listed(weights))
    page.check("answer rows", listed(weights).mean((0, 1))[None])
    some = [1, 4]
    page = written(dataset.isel(row=some), tmp_path)
    assert np.flatnonzero(page.about["answer"]["exact"]).tolist() == some
    mixed = listed(weights)
    mixed[:, :, some] = weights[:, :, some]
    page.check("answer layer rows", mixed.mean(1))
    page.check("answer text", with_mean(mixed.mean((1, 2)), 0))
    # Of queries with neither, nothing is known, and means are of the others.
    page = written(dataset.isel(row=some).drop_vars(["topk_weight", "topk_position"]), tmp_path)
    known = np.isin(np.arange(NEW), some)[:, None]
    page.check("answer layer rows", np.where(known, weights.mean(1), np.nan))
    page.check("answer text", with_mean(weights[:, :, some].mean((1, 2)), 0))
    page = written(dataset.drop_vars(["row_weights", "topk_weight", "topk_position"]), tmp_path)
    assert not [name for name in page.about["arrays"] if name.endswith(("rows", "text"))]
    assert "answer shares" in page


def test_without_an_answer_there_is_no_such_part(run, tmp_path):
    dataset = run[0].to_xarray()
    prompt = dataset.assign_coords(key_segment=dataset.key_segment.where(dataset.key < PROMPT, "question"))
    unnamed = dataset.drop_vars(["segment_mass", "key_segment"])
    for source in (prompt, unnamed, dataset.drop_vars("segment_mass")):
        page = written(source, tmp_path)
        assert page.about["answer"] is None
        assert not [name for name in page.about["arrays"] if name.startswith("answer")]
        assert "row_weights" in page.about["notShown"]


def without_sink(page):
    """What the cards of every token say once the sink is taken out, of single segments; the mean over layers and heads."""
    page.check("#answer-sink")
    shares = []
    for at in range(NEW):
        page.locator(".written-token").nth(1 + at).click()
        of_token = f"Token {PROMPT + at}" if at < NEW - 1 else "The last token"
        page.locator("#answer-whose", has_text=of_token).wait_for()
        shares.append([state(page)[0][name] for name in SEGMENTS])
    return shares


@pytest.mark.parametrize("sink_tokens", [1, 3, 5])
def test_a_sink_is_taken_out_of_every_segment_that_it_lies_in(sink_tokens, open_page, tmp_path):
    """As `sources` does: the first 3 tokens are of no segment, the others of the document."""
    model = tiny_model(dtype=torch.float64)
    stats, fed = generated(model, sink_tokens=sink_tokens)
    path = report(stats, tmp_path / "answer.html")
    places = [0, 3] if sink_tokens > SEGMENT_ENDS[0] else [3]
    assert sorted(Page(path).about["answer"]["sink"]["places"]) == places
    page = open_page(path)
    shares = without_sink(page)
    told = sources(stats).query("position >= 0").without_sink.to_numpy().reshape(NEW, len(SEGMENTS))
    np.testing.assert_allclose(shares, told, atol=2e-4)
    weights = causal_weights(model, fed)[:, :, WRITERS].mean((0, 1))
    edges = [*SEGMENT_ENDS, PROMPT, weights.shape[-1]]
    left = np.where(np.arange(weights.shape[-1]) < sink_tokens, 0, weights)
    expected = np.stack([left[:, a:b].sum(-1) for a, b in pairwise(edges)], -1) / left.sum(-1, keepdims=True)
    np.testing.assert_allclose(shares, expected, atol=2e-4)
    page.uncheck("#answer-sink")
    page.locator("#answer-cards", has_text="on the sink").wait_for()
    said = page.locator(".share", has_text="on the sink").evaluate_all("all => all.map(each => each.dataset.segment)")
    assert sorted(said) == ["", "document"][: len(places)]


def test_a_sink_in_two_segments_stays_where_no_weights_tell(tmp_path):
    stats, _ = generated(tiny_model(), sink_tokens=4, rows=None)
    assert written(stats, tmp_path).about["answer"]["sink"] is None


def test_a_sink_of_which_the_weights_tell(run, tmp_path):
    """What it gets is the same whether it was measured by itself or is summed from the rows of the answer."""
    dataset = run[0].to_xarray()
    rows_alone = dataset.drop_vars("sink_mass")
    sink_alone = dataset.drop_vars("row_weights")
    for source in (rows_alone, sink_alone):
        assert written(source, tmp_path).about["answer"]["sink"] == {"keys": [0], "places": [3]}
    of_sink, summed = (answer_shares(one_row(source, 0))[..., -1] for source in (sink_alone, rows_alone))
    assert np.isfinite(summed).all()
    np.testing.assert_allclose(summed, of_sink, atol=1e-6)
    neither = rows_alone.drop_vars("row_weights")
    assert written(neither, tmp_path).about["answer"]["sink"] is None
    assert answer_shares(one_row(neither, 0)).shape[-1] == len(SEGMENTS) + 1, "no column of what is not known"


def test_a_row_behind_padding(tmp_path):
    """Shares of segments are the sums of the row's weights, wherever the text begins."""
    stats, _ = generated(tiny_model(dtype=torch.float64), padding=5)
    for batch in (0, 1):
        row = one_row(stats.to_xarray(), batch)
        assert len(writers(row)) == NEW
        weights = np.stack([np.nan_to_num(AnswerRows(row).head(1, head)) for head in range(6)])
        labels = row.key_segment.isel(batch=0).values
        sums = np.stack([weights[..., labels == name].sum(-1) for name in SEGMENTS], -1)
        np.testing.assert_allclose(answer_shares(row)[1][..., :3], sums, atol=1e-6)
        page = written(stats, tmp_path, batch=batch)
        first = page.about["answer"]["sink"]["keys"][0]
        np.testing.assert_allclose(answer_shares(row)[1][..., -1], weights[..., first], atol=1e-6)


def test_the_answer_loses_single_heads_first(run, tmp_path):
    stats, weights = run
    sizes = [len(written(stats, tmp_path).html) / 1e6]
    with pytest.raises(ValueError, match="it needs") as error:
        report(stats, tmp_path / "small.html", max_megabytes=1)
    sizes.append(float(str(error.value).split()[-1]))
    order = ["answer head rows", "answer layer rows", "answer rows", "answer shares", "answer mean"]
    left = []
    for share in (1, 0.8, 0.6, 0.4, 0.2, 0.05, 0):
        page = written(stats, tmp_path, max_megabytes=sizes[1] + share * (sizes[0] - sizes[1]) + 0.001)
        there = [name for name in order if name in page]
        assert there == order[len(order) - len(there) :], "what is worth more stays longer"
        left.append(len(there))
        if "answer layer rows" in page:
            page.check("answer layer rows", weights[:, :, WRITERS].mean(1))
    assert left[0] == len(order)
    assert len(set(left)) > 2


def state(page):
    """Shares on the cards by segment, and shades of all tokens."""
    shares = page.locator(".share").evaluate_all(
        "all => all.map(each => [each.dataset.segment, Number(each.dataset.share)])"
    )
    shades = page.locator(".word").evaluate_all(
        "all => all.map(each => [Number(each.style.getPropertyValue('--share')), each.className])"
    )
    return dict(shares), shades


def shaded(line, last, out=()):
    """Shades that a line of weights should have: darkest where the prompt has most, beside the sink."""
    line = line[: last + 1]
    shades = np.minimum(100, 100 * np.sqrt(line / line[1:PROMPT].max()))
    shades[list(out)] = 0
    return np.append(shades, np.zeros(PROMPT + NEW - 1 - len(shades)))


def test_a_reader_asks_what_a_token_draws_on(run, open_page, tmp_path):
    stats, weights = run
    rows = weights[:, :, WRITERS]
    page = open_page(report(stats, tmp_path / "answer.html"))
    note, whose = page.locator("#answer-note"), page.locator("#answer-whose")
    names = [*SEGMENTS, ""]

    def check(line, last, without=False):
        shares, shades = state(page)
        expected = shares_of(line)
        if without:
            # The sink is of no segment here.
            expected[3] -= expected[4]
            expected /= 1 - expected[4]
        np.testing.assert_allclose([shares[name] for name in names], expected[:4], atol=2e-4)
        np.testing.assert_allclose([share for share, _ in shades], shaded(line, last, [0] * without), atol=0.6)
        assert [("unseen" in kind) for _, kind in shades] == [at > last for at in range(len(shades))]
        assert ("nothing" in shades[0][1]) == without

    note.filter(has_text="From the exact weights of every key").wait_for()
    assert whose.inner_text() == f"The whole answer, mean over {NEW} tokens, mean over layers and heads"
    check(rows.mean((0, 1, 2)), WRITERS[-1])
    assert page.locator("#answer-head").is_disabled()
    page.locator(".written-token").nth(1).click()
    note.filter(has_text=f"Token {PROMPT}, mean over layers").wait_for()
    check(rows[:, :, 0].mean((0, 1)), WRITERS[0])
    page.select_option("#answer-layer", "1")
    note.filter(has_text=f"Token {PROMPT}, layer 1, mean over heads").wait_for()
    check(rows[1, :, 0].mean(0), WRITERS[0])
    page.select_option("#answer-head", "4")
    note.filter(has_text="layer 1, head 4").wait_for()
    check(rows[1, 4, 0], WRITERS[0])
    strongest = int(rows[1, 4, 0].argmax())
    page.locator(f'.word[data-at="{strongest}"]').hover()
    tip = page.locator("#tip").inner_text()
    assert float(tip.split("·")[-1].split()[0]) == pytest.approx(rows[1, 4, 0, strongest], rel=6e-3)
    page.check("#answer-sink")
    note.filter(has_text="Without the first token").wait_for()
    check(rows[1, 4, 0], WRITERS[0], without=True)
    assert "shares are of the rest" in page.locator("#answer-shares-note").inner_text()
    # By keyboard to the last token, which was never read back.
    page.locator(".written-token").nth(1).press("End")
    assert "never read" in page.locator(".written-token").last.locator("bdi").get_attribute("title")
    whose.filter(has_text="The last token, written and not read again, layer 1, head 4").wait_for()
    note.filter(has_text="The last token").wait_for()
    check(rows[1, 4, -1], WRITERS[-1], without=True)
    # A look at another token changes the shares only, as long as it lasts.
    page.locator(".written-token").nth(3).hover()
    whose.filter(has_text=f"Token {PROMPT + 2}").wait_for()
    expected = shares_of(rows[1, 4, 2])
    assert abs(state(page)[0]["document"] - expected[0] / (1 - expected[4])) < 2e-4
    page.locator("h1").hover()
    whose.filter(has_text="The last token").wait_for()
    strongest = SEGMENT_ENDS[0] + int(rows[1, 4, -1, slice(*SEGMENT_ENDS)].argmax())
    page.locator(f'.word[data-at="{strongest}"]').hover()
    tip = page.locator("#tip").inner_text()
    assert "document" in tip
    share = rows[1, 4, -1, strongest] / (1 - rows[1, 4, -1, 0])
    assert float(tip.split("·")[-1].split()[0]) == pytest.approx(share, rel=6e-3)
    page.select_option("#answer-layer", "-1")
    until(lambda: page.locator("#answer-head").is_disabled())
    note.filter(has_text="The last token, mean over layers and heads").wait_for()
    check(rows[:, :, -1].mean((0, 1)), WRITERS[-1], without=True)


def test_it_says_what_is_partial_and_what_is_missing(run, open_page, tmp_path):
    dataset, weights = run[0].to_xarray(), run[1][:, :, WRITERS]
    page = open_page(report(dataset.drop_vars("row_weights"), tmp_path / "lists.html"))
    note = page.locator("#answer-note")
    page.locator(".written-token").nth(1).click()
    covered = listed(weights[:, :, 0]).sum(-1).mean()
    note.filter(has_text=f"Partial: from the 4 strongest keys of each head, which get {100 * covered:.0f}%").wait_for()
    never = np.flatnonzero(listed(weights[:, :, 0]).sum((0, 1))[:PROMPT] == 0)
    if len(never):
        page.locator(f'.word[data-at="{never[0]}"]').hover()
        page.locator("#tip", has_text="not among the 4 strongest keys of any head").wait_for()
    page = open_page(report(dataset.drop_vars(["row_weights", "topk_weight", "topk_position"]), tmp_path / "none.html"))
    assert 'AttentionStatsConfig(rows="generated")' in page.locator("#answer-note").inner_text()
    assert page.locator("#answer-text").is_hidden()
    np.testing.assert_allclose(state(page)[0]["document"], shares_of(weights).mean((0, 1, 2))[0], atol=2e-4)
    page = open_page(report(dataset.drop_vars("segment_mass"), tmp_path / "no.html"))
    assert page.locator("#answer").count() == 0


@pytest.mark.parametrize("width", [1280, 360])
def test_it_stays_in_its_column_and_cards_lead_to_the_text(width, open_page, tmp_path):
    path = report(generated(tiny_model())[0], tmp_path / "narrow.html")
    page = open_page(path, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator('.share[data-segment="question"]').click()
    page.wait_for_timeout(200)
    box, text = page.locator('.part-name[data-segment="1"]').bounding_box(), page.locator("#answer-text").bounding_box()
    assert text["y"] <= box["y"] < text["y"] + text["height"]
    assert page.locator("#answer-tokens [aria-selected=true]").count() == 1
    assert Page(path).about["answer"]["queries"] == WRITERS
