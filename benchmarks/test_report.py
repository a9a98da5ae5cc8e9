"""The HTML report: how long it takes to write, how large it is, and when a browser lets its reader work with it."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest
import torch

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.stats.container import VISIBILITY_LABELS, Label
from llama_attn.stats.table import default_statistics, statistics_table
from llama_attn.viz import report

LAYERS, HEADS, KV_HEADS = 30, 9, 3
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def made_up(length: int) -> AttentionStats:
    """Statistics of SmolLM2's shape with random numbers, which no compression makes smaller."""
    config = AttentionStatsConfig(
        statistics=(*default_statistics(), "weights_map", "topk_weight", "topk_position"), norms=True
    )
    table = statistics_table()
    names = [*config.statistics, *(name for name, statistic in table.items() if statistic.is_norm)]
    bins = -(-length // config.bin_width(length))
    sizes = {
        "layer": LAYERS, "hidden_layer": LAYERS + 1, "batch": 1, "head": HEADS, "kv_head": KV_HEADS, "query": length,
        "key": length, "query_bin": bins, "key_bin": bins, "rank": config.top_k,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    values, labels = {}, {}
    for name in names:
        shape = [sizes[dim] for dim in table[name].dims]
        labels[name] = Label.of(table[name])
        numbers = torch.randn(shape, generator=generator).exp_()
        if name == "topk_position":
            reach = torch.arange(length)[:, None] + 1
            values[name] = (torch.rand(shape, generator=generator) * reach).int()
        elif name == "hidden_max_channel":
            values[name] = torch.randint(576, shape, generator=generator, dtype=torch.int32)
        elif labels[name].unit == "probability":
            values[name] = numbers / (1 + numbers) / (1 if "bin" in str(labels[name].dims) else 10)
        else:
            values[name] = numbers
    values["weights_map"] = values["weights_map"].tril()
    values["visible_keys"] = torch.arange(1, length + 1, dtype=torch.int32)[None]
    values["visible_queries"] = values["visible_keys"].flip(1)
    words = [f"Ġword{i % 997}" for i in range(length)]
    return AttentionStats(
        values, labels | VISIBILITY_LABELS, config, tuple(range(LAYERS)), tuple(range(HEADS)), LAYERS, 0, [words]
    )  # fmt: skip


@pytest.mark.parametrize("length", [4096, 32768])
def test_writing(benchmark, tmp_path, length):
    benchmark.group = f"report, writing, T = {length}"
    dataset = made_up(length).to_xarray()
    path = tmp_path / "report.html"
    benchmark.pedantic(lambda: report(dataset, path), rounds=3 if length < 10_000 else 1)
    benchmark.extra_info["megabytes"] = round(path.stat().st_size / 1e6, 2)
    assert path.stat().st_size <= 12e6


@pytest.mark.parametrize("length", [4096, 32768])
def test_opening(benchmark, tmp_path, length):
    """From the navigation until tokens are shaded and answer to clicks, in a fresh page each time."""
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("chromium and playwright are needed")
    from playwright.sync_api import sync_playwright

    benchmark.group = f"report, until interactive, T = {length}"
    path = report(made_up(length).to_xarray(), tmp_path / "report.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        marks = []

        def open_page():
            page = browser.new_page()
            page.goto(path.as_uri())
            page.locator("html[data-ready=all]").wait_for(state="attached", timeout=60_000)
            marks.append(page.evaluate("performance.getEntriesByName('interactive')[0].startTime"))
            page.locator(".token").nth(5).click()
            page.locator("#token h3").wait_for()
            page.close()

        benchmark.pedantic(open_page, rounds=5)
        browser.close()
    benchmark.extra_info["interactive_after_seconds"] = round(float(np.median(marks)) / 1000, 3)
