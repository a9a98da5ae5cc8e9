"""The HTML report: how long it takes to write, how large it is, and when a browser lets its reader work with it."""

from __future__ import annotations

import importlib.util
import shutil
import statistics

import pytest
from check import none, once, shrunk
from made_up import HEADS, LAYERS, made_up
from results import Row
from timing import keep, median

from llama_attn.viz import report

pytestmark = pytest.mark.benchmark(group="report")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module", params=[4096, 32768], ids=str)
def dataset(request):
    return made_up(shrunk(request.param)).to_xarray()


def shape(dataset) -> str:
    return f"{LAYERS} layers, {HEADS} heads, T {dataset.sizes['key']:,}"


def test_writing(benchmark, dataset, tmp_path):
    path = tmp_path / "report.html"
    long = dataset.sizes["key"] > shrunk(4096)
    benchmark.pedantic(report, args=(dataset, path), rounds=1 if long else once(3))
    seconds, megabytes = median(benchmark), path.stat().st_size / 1e6
    written = Row("written", shape(dataset), seconds, "s")
    if not long:
        written = Row.over("written", shape(dataset), seconds, "s", "the limit", 20.0, 1.0)
    keep(benchmark, [written, Row.over("size", shape(dataset), megabytes, "MB", "the limit", 12.0, 1.0)])
    assert megabytes <= 12


def test_opening(benchmark, dataset, tmp_path):
    """A fresh page each time; interactive is when tokens are shaded and answer to clicks."""
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("chromium and playwright are needed")
    from playwright.sync_api import sync_playwright

    path = report(dataset, tmp_path / "report.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        marks = []

        def open_page():
            page = browser.new_page()
            page.goto(path.as_uri())
            page.locator("html[data-ready=all]").wait_for(state="attached", timeout=60_000)
            marks.append(page.evaluate("performance.getEntriesByName('interactive')[0].startTime") / 1000)
            page.locator(".token").nth(5).click()
            page.locator("#token h3").wait_for()
            page.close()

        benchmark.pedantic(open_page, rounds=once(5), warmup_rounds=none(1))
        browser.close()
    rows = [
        Row.over("interactive", shape(dataset), statistics.median(marks), "s", "the limit", 3.0, 1.0),
        Row("all maps drawn, links of a token shown", shape(dataset), median(benchmark), "s"),
    ]
    keep(benchmark, rows)
