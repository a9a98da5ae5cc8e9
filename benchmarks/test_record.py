"""What `record` costs around transformers' own classes, and what a window saves."""

from __future__ import annotations

import pytest
from check import shrunk
from timing import alternate
from workloads import around_stock, windowed

pytestmark = pytest.mark.benchmark(group="record")


def test_around_stock(benchmark, model, text):
    length = shrunk(2048)
    baseline, case = around_stock(model, text(length), at_most=1.03)
    alternate(benchmark, baseline, [case], shape=f"SmolLM2, float32, T {length:,}")


def test_window(benchmark, device):
    """A window of 1,024."""
    length, window = shrunk(8192), shrunk(1024)
    baseline, case = windowed(length, window, at_most=1.0, device=device)
    shape = f"Mistral's proportions, 4 layers, window {window:,}, float32, T {length:,}"
    alternate(benchmark, baseline, [case], shape=shape, rounds=3)
