"""The models and texts of the benchmarks, and how their results are kept."""

from __future__ import annotations

import os

from check import CHECK

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from functools import partial
from pathlib import Path

import pytest
import torch
from models import smollm2, text as text_of
from results import RESULTS, Row, environment, merge


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the models run: cpu or cuda"
    )
    parser.addoption("--results", default=RESULTS, type=Path, help="the JSON file that results are merged into")


def pytest_configure(config):
    environment(config.option.device)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Merge the rows of a test that passed into the results; one that left none is a row by itself."""
    report = yield
    benchmark = item.funcargs.get("benchmark")
    if not CHECK and call.when == "call" and report.passed and benchmark is not None and benchmark.stats is not None:
        rows = [Row(**row) for row in benchmark.extra_info.get("rows", [])]
        rows = rows or [Row(item.name, "", benchmark.stats.stats.median, "s")]
        merge(
            item.nodeid, benchmark.group or item.name, rows, item.config.getoption("results"), item.config.option.device
        )
    return report


@pytest.fixture(scope="session")
def device(request):
    return request.config.option.device


@pytest.fixture(scope="session")
def model(device):
    """SmolLM2-135M in float32."""
    return smollm2().to(device)


@pytest.fixture(scope="session")
def text(device):
    """Token ids of a text that is as long as a benchmark asks for: (length) -> (1, length)."""
    return partial(text_of, device=device)
