"""The report of a corpus in a browser, as a reader uses it, on a wide page and on a narrow one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsing import HACKS, drawn, numbers, until
from conftest import tiny_model
from corpora import Letters, highest, measured, write

from llama_attn import AttentionStatsConfig
from llama_attn.corpus.bins import value_bins
from llama_attn.stats.token_text import readable
from llama_attn.viz import corpus_report
from llama_attn.viz.corpus.numbers import deciles_of, keys_held, strongest_of
from llama_attn.viz.report import findings

WIDTHS = pytest.mark.parametrize("width", [1280, 400])
POINTS = "all => all[0].data.map(({x, y, customdata, name}) => ({x, y, customdata, name}))"


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write(folder)
    return measured(folder, tmp_path_factory.mktemp("run")).with_strings(Letters())


@pytest.fixture(scope="module")
def page_of(summary, tmp_path_factory):
    return corpus_report(summary, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def opened(page_of, open_page):
    return lambda width: open_page(page_of, viewport={"width": width, "height": 800})


def choose(page, layer, head):
    page.select_option("#layer", label=str(layer))
    page.select_option("#head", label=str(head))
    page.locator("#one-title", has_text=f"Layer {layer}, head {head}").wait_for()
    page.locator(f'#numbers[data-head="{layer} {head}"]').wait_for()
    page.locator(f'#texts[data-shown$=" {layer} {head}"]').wait_for()


def redrawn(page, name, title):
    page.locator(f"#{name}").scroll_into_view_if_needed()
    page.locator(f"#{name} .chart-title", has_text=title).wait_for()
    return drawn(page, name, POINTS)


@WIDTHS
def test_all_heads_by_two_scores(width, summary, opened):
    page, frame = opened(width), summary.to_pandas().set_index(["layer", "head"])
    assert page.locator("h1").inner_text() == (summary.about.model or "A model")
    facts = page.locator("#facts").inner_text()
    assert facts == f"73 texts · 1,852 tokens · {summary.cut} cut to 40 tokens · 3 layers · 6 heads"
    for across, upwards in (("sink_mass", "entropy"), ("sink_rate", "induction")):
        page.select_option("#across", across)
        page.select_option("#upwards", upwards)
        words = [name.replace("_", " ") for name in (upwards, across)]
        traces = redrawn(page, "scatter", f"{words[0].capitalize()} against {words[1]}, means over 73 texts")
        expected = frame[across].to_numpy(np.float32).tolist()
        until(lambda known=expected: drawn(page, "scatter", POINTS)[0]["x"][0] in known)
        *roles, ring = drawn(page, "scatter", POINTS)
        found = {}
        for trace in roles:
            role, count = trace["name"].split(": ")
            assert int(count) == len(trace["x"])
            for x, y, (layer, head, _) in zip(trace["x"], trace["y"], trace["customdata"], strict=True):
                found[layer, head] = (x, y, role)
        assert len(found) == len(frame) == 18
        for place, line in frame.iterrows():
            assert found[place][:2] == pytest.approx((line[across], line[upwards]), rel=1e-6)
            assert found[place][2] == line.role.replace("_", " ")
        here = frame.loc[(1, 0)]
        assert [ring["x"][0], ring["y"][0]] == pytest.approx([here[across], here[upwards]], rel=1e-6)
        assert len(traces) == len(roles) + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@WIDTHS
def test_a_grid_of_any_score(width, summary, opened):
    page, dataset = opened(width), summary.to_xarray()
    expected = {
        "sink_rate": dataset.sink_rate,
        "entropy": dataset.entropy_text_mean,
        "mixed_share": dataset.role_share.sel(role="mixed"),
        "keys_for_95_percent": keys_held(summary)[1],
    }
    for name, values in expected.items():
        page.select_option("#grid-score", name)
        page.locator("#grid").scroll_into_view_if_needed()
        page.locator("#grid .chart-title", has_text=name.replace("_", " ").capitalize()).wait_for()
        until(lambda values=values: np.allclose(numbers(drawn(page, "grid")[0]["z"]), values, rtol=1e-6))
    page.select_option("#grid-score", "roles")
    page.locator("#grid .chart-title", has_text="Role that each head has in most of 73 texts").wait_for()
    text = "all => all[0].data[0].text"
    roles = summary.to_pandas().role.str.replace("_", " ").tolist()
    until(lambda: drawn(page, "grid", text) is not None)
    assert [role for layer in drawn(page, "grid", text) for role in layer] == roles


def test_a_click_chooses_a_head(summary, opened):
    page = opened(1280)
    drawn(page, "grid")
    box = page.locator("#grid .nsewdrag").bounding_box()
    # The cell of layer 2 and head 4, of 3 × 6.
    page.mouse.click(box["x"] + box["width"] * 4.5 / 6, box["y"] + box["height"] * 2.5 / 3)
    page.locator("#one-title", has_text="Layer 2, head 4").wait_for()
    assert page.locator("#layer").input_value() == "2"
    assert page.locator("#head").input_value() == "4"
    drawn(page, "scatter")
    page.locator("#scatter .point").last.scroll_into_view_if_needed()
    *roles, _ = drawn(page, "scatter", POINTS)
    layer, head, _ = roles[0]["customdata"][0]
    page.locator("#scatter .trace").first.locator(".point").first.click(force=True)
    page.locator("#one-title", has_text=f"Layer {layer}, head {head}").wait_for()


@WIDTHS
def test_the_numbers_of_a_head(width, summary, opened):
    page, dataset = opened(width), summary.to_xarray()
    for layer, head in ((0, 5), (2, 1)):
        choose(page, layer, head)
        here = dataset.sel(layer=layer, head=head)
        rows = page.locator("#numbers tbody tr").evaluate_all("all => all.map(each => ({...each.dataset}))")
        found = {row.pop("score"): {name: float(value) for name, value in row.items()} for row in rows}
        assert set(summary.about.scores) < set(found)
        for name in summary.about.scores:
            values = dataset[f"{name}_text_mean"].values
            assert found[name]["value"] == pytest.approx(float(here[f"{name}_text_mean"]), rel=1e-6)
            for key, told in (("std", "std"), ("low", "min"), ("high", "max"), ("count", "count")):
                assert found[name][key] == pytest.approx(float(here[f"{name}_text_{told}"]), rel=1e-6, abs=1e-12), name
            assert found[name]["rank"] == 1 + (np.float32(values) > np.float32(here[f"{name}_text_mean"])).sum()
        assert found["sink_rate"]["value"] == pytest.approx(float(here.sink_rate), rel=1e-6)
        role = summary.to_pandas().set_index(["layer", "head"]).role[layer, head]
        share = float(here.role_share.sel(role=role))
        assert page.locator("#chosen").inner_text() == f"{role.replace('_', ' ')} in {share:.0%} of the texts"
        for at, name in enumerate(name for name in summary.about.labels if name in summary.by_position):
            if name not in ("entropy", "key_norm", "hidden_norm"):
                continue
            page.select_option("#statistic", str(at))
            # Heads 0 to 2 read the first KV head, the others the second one.
            place = {"layer": layer, "head": head, "kv_head": head // 3, "hidden_layer": layer}
            moments = dataset.sel({dim: place[dim] for dim in dataset[f"{name}_text_mean"].dims})
            redrawn(page, "by-position", name.replace("_", " ").capitalize())
            means = moments[f"{name}_mean"].values
            until(lambda means=means: np.allclose(drawn(page, "by-position")[-1]["y"], means, rtol=1e-6))
            *_, line = drawn(page, "by-position", "all => all[0].data.map(({x, customdata}) => ({x, customdata}))")
            assert line["x"] == ["0", "1–2", "3–6", "7–14", "15–30", "31–39"]
            spread = np.stack([moments[f"{name}_{told}"] for told in ("std", "min", "max")], 1)
            np.testing.assert_allclose(line["customdata"], spread, rtol=1e-6, atol=1e-12)
            (bars,) = drawn(page, "over-texts")
            counts = summary.by_text[name].histogram[tuple(place[dim] for dim in dataset[f"{name}_text_mean"].dims)]
            assert sum(bars["y"]) == counts.sum() == 73
            edges = value_bins(summary.about.labels[name].unit).edges
            for words, count in zip(bars["x"], bars["y"], strict=True):
                start = re.match(r"[\d.,]+", words)
                at_edge = 0 if start is None else 1 + np.abs(edges - float(start[0].replace(",", ""))).argmin()
                assert counts[at_edge] == count


@WIDTHS
def test_texts_are_shaded_by_the_statistic(width, summary, opened):
    page, about = opened(width), summary.about
    for at, layer, head in ((0, 1, 2), (about.examples_of.index("induction"), 2, 3)):
        choose(page, layer, head)
        page.select_option("#examples", str(at))
        page.locator(f'#texts[data-shown="{about.examples_of[at]} {layer} {head}"]').wait_for()
        expected = {"strongest": strongest_of(summary, at), "deciles": deciles_of(summary, at)}
        largest = max(np.nanmax(found.values[layer, head].astype(np.float32)) for found in expected.values())
        for kind, found in expected.items():
            cards = page.locator(f"#{kind} .example")
            assert cards.count() == found.score.shape[-1]
            for place, card in enumerate(cards.all()):
                here = (layer, head, place)
                assert float(card.get_attribute("data-mean")) == pytest.approx(found.score[here], rel=1e-6)
                assert card.locator("h4 bdi").inner_text() == f"{summary.files[found.file[here]]}:{found.line[here]}"
                ids = [token for token in found.ids[here] if token >= 0]
                assert card.locator(".word").all_inner_texts() == [f"<{token}>" for token in ids]
                values = found.values[here][: len(ids)].astype(np.float32)
                shares = card.locator(".word").evaluate_all(
                    "all => all.map(each => Number(each.style.getPropertyValue('--share')))"
                )
                np.testing.assert_allclose(shares, 100 * np.sqrt(np.nan_to_num(values) / largest), atol=0.51)
                (peak,) = card.locator(".word.peak").evaluate_all("all => all.map(each => Number(each.dataset.value))")
                assert peak == pytest.approx(highest(values.tolist(), found.start[here]), abs=1e-3)
                assert card.locator(".word.nothing").count() == np.isnan(values).sum()
        tenths = page.locator("#deciles h4").all_inner_texts()
        assert [words.startswith("Lowest tenth") for words in tenths[:3]] == [True, True, False]
        assert tenths[-1].startswith("Highest tenth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@WIDTHS
def test_tables_and_keys(width, summary, opened):
    page = opened(width)
    rows = [line.locator("td").all_inner_texts() for line in page.locator("#sinks tbody tr").all()]
    table = {f"<{token}>": counts for (token,), counts in zip(summary.sinks.keys, summary.sinks.counts, strict=True)}
    assert len(rows) == sum(counts[:2].any() for counts in table.values())
    for token, times_first, rate_first, times_behind, rate_behind, total in rows:
        first, behind, *times = table[token].tolist()
        assert [int(each.replace(",", "")) for each in (times_first, times_behind, total)] == [*times, first + behind]
        for words, sinks, of in ((rate_first, first, times[0]), (rate_behind, behind, times[1])):
            if not of:
                assert words == "–"
            elif words[0] not in "<>":
                assert float(words.rstrip("%")) == pytest.approx(100 * sinks / (of * 18), abs=0.5)
    page.get_by_role("button", name="times behind").click()
    shown = [int(each.replace(",", "")) for each in page.locator("#sinks td:nth-child(4)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    assert shown != sorted(shown)
    massive = [line.locator("td").all_inner_texts() for line in page.locator("#massive tbody tr").all()]
    cells = ([layer.replace("output", "3"), channel, tokens, texts] for layer, channel, tokens, _, texts, _ in massive)
    found = {tuple(int(cell.replace(",", "")) for cell in row) for row in cells}
    assert found == {tuple(row) for row in np.hstack([summary.massive.keys, summary.massive.counts]).tolist()}
    traces = drawn(page, "keys")
    least, most = keys_held(summary)
    for trace, values in zip(traces, (least.min(1), most.max(1), most.mean(1), least.mean(1)), strict=True):
        np.testing.assert_allclose(trace["y"], values, rtol=1e-6)


def test_shares_are_written_as_in_the_findings_of_a_run(opened):
    shares = [0, 4e-4, 0.0123, 0.0949, 0.0951, 0.5, 0.994, 0.998, 1 - 1e-8, 1]
    written = ["0%", "<0.1%", "1.2%", "9.5%", "10%", "50%", "99%", ">99%", "100%", "100%"]
    words = (Path(findings.__file__).parent / "page" / "words.js").read_text("utf-8")
    assert opened(1280).evaluate(f"shares => {{ {words}\nreturn shares.map(percent); }}", shares) == written
    assert [findings._percent(share) for share in shares] == written


def test_dark_colours(opened):
    page = opened(1280)
    before = page.locator("#strongest .word").first.evaluate("each => getComputedStyle(each).backgroundColor")
    page.locator("#theme").click()
    assert page.locator("#theme").inner_text() == "Light"
    until(
        lambda: (
            page.locator("#strongest .word").first.evaluate("each => getComputedStyle(each).backgroundColor") != before
        )
    )


def test_hostile_strings_are_text(summary, open_page, tmp_path):
    hostile = replace(
        summary,
        about=replace(summary.about, model=HACKS[0]),
        files=tuple(HACKS[at % len(HACKS)] + str(at) for at in range(len(summary.files))),
        strings={token: HACKS[token % len(HACKS)] for token in summary.strings},
    )
    page = open_page(corpus_report(hostile, tmp_path / "report.html"), viewport={"width": 400, "height": 800})
    assert page.locator("h1").inner_text() == HACKS[0]
    shown = page.locator("#strongest .word").all_inner_texts() + page.locator("#sinks .chip").all_inner_texts()
    assert {*shown} <= {readable(hack, 80) or "(empty)" for hack in HACKS}
    assert "\u202e" not in page.locator("body").inner_text()
    page.locator("#strongest .word").first.hover()
    page.locator("#tip").wait_for()
    for name in page.locator(".chart").evaluate_all("all => all.map(each => each.id)"):
        drawn(page, name)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, b, script[src]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("case", ["little", "no heads", "part", "one text", "small", "no data"])
def test_unusual_corpora_open(case, summary, open_page, tmp_path):
    settings = {}
    write(tmp_path / "texts", parts=1, count=5)
    if case == "little":
        config = AttentionStatsConfig(statistics=("max_logit",), offload="cpu")
        found = measured(tmp_path / "texts", tmp_path / "run", config=config, module=tiny_model())
    elif case == "no heads":
        about = replace(summary.about, heads=(), scores=(), examples_of=())
        only = {"hidden_norm": summary.by_position["hidden_norm"]}, {"hidden_norm": summary.by_text["hidden_norm"]}
        none = {"roles": summary.roles[..., :0], "first_key": summary.first_key[:, :0]}
        weights = {"weight_count": summary.weight_count[:0], "weight_mass": summary.weight_mass[:0]}
        found = replace(summary, about=about, by_position=only[0], by_text=only[1], **none, **weights)
    elif case == "part":
        config = AttentionStatsConfig(
            statistics=("entropy", "received", "sink_mass"), layers=(1, 2), heads=(0, 4), offload="cpu"
        )
        found = measured(tmp_path / "texts", tmp_path / "run", config=config, module=tiny_model())
    elif case == "one text":
        found = measured(tmp_path / "texts", tmp_path / "run", limit=1)
    elif case == "small":
        found = summary
        settings = {"max_megabytes": 2.1}
    else:
        nothing = {name: replace(moments, count=moments.count * 0) for name, moments in summary.by_text.items()}
        found = replace(summary, by_text=nothing, roles=summary.roles * 0, first_key=summary.first_key * 0)
    page = open_page(corpus_report(found, tmp_path / "report.html", **settings))
    assert page.locator("#trouble").is_hidden()
    for name in page.locator(".chart").evaluate_all("all => all.map(each => each.id)"):
        drawn(page, name)
    said = page.locator("main").inner_text()
    if case == "no heads":
        assert "No score of heads was measured" in said
    if case == "little":
        assert "No statistic was measured that a text can be shaded by" in said
        assert page.locator("#grid-score option").all_inner_texts() == ["max logit"]
        assert "received was not measured" in said
        assert "weight_count and weight_mass were not measured" in said
    if case == "part":
        part = found.to_xarray().attrs["part"]
        assert part == "layers 1–2 of 3, heads 0, 4 of 6"
        assert part in page.locator("#facts").inner_text()
        assert part in page.locator("#grid .chart-title").inner_text()
        assert page.locator("#layer option").all_inner_texts() == ["1", "2"]
    if case == "small":
        assert "Texts were left out to keep the file small. Kept are of" in page.locator("#pooling").inner_text()
    else:
        assert "Nothing was left out" in page.locator("#pooling").inner_text()
    if case == "no data":
        assert page.locator("#chosen").inner_text() == "role: no data"
        assert drawn(page, "grid")[0]["z"] == [[None] * 6] * 3
