"""Numbers that stand for a place where there is none, or that are no counts."""

from __future__ import annotations

import numpy as np
import pytest
from hostile import Parts, corpus_file, format_of, run_file
from trying import refused


@pytest.mark.parametrize("value", [7, -2, 2**31 - 1])
def test_positions_of_a_run(value, tmp_path):
    parts = Parts.of(run_file())
    parts.arrays["topk_position"][0, 0, 0, 0, 0] = value
    assert "damaged (topk_position: expected" in refused(parts.written(format_of(run_file())), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_key", -1), ("roles", 2**62), ("queries", 0), ("sinks/keys", -1), ("sinks/counts", -1),
        ("massive/keys", 2**40), ("massive/counts", -5), ("strongest/file", 3), ("strongest/file", -1),
        ("strongest/line", -1), ("strongest/ids", -2), ("strongest/position", -1), ("sample/file", 3),
        ("sample/line", -1), ("sample/ids", -2), ("sample/position", 40), ("sample/position", -1),
        ("weight_mass", np.nan), ("weight_count", -1.0), ("by_text/entropy/count", -1),
        ("by_text/entropy/count", 2**63 - 1), ("by_text/entropy/m2", -1.0), ("by_text/entropy/bins", 2**40),
        ("by_text/entropy/bins", -1), ("by_text/entropy/histogram", -1), ("by_text/entropy/histogram_at", -1),
        ("by_position/entropy/histogram_at", 2**40), ("by_position/entropy/histogram", 2**53),
    ],
)  # fmt: skip
@pytest.mark.parametrize("at", [0, -1])
def test_of_a_corpus(name, value, at, tmp_path):
    parts = Parts.of(corpus_file())
    parts.arrays[name].reshape(-1)[at] = value
    said = refused(parts.written(format_of(corpus_file())), tmp_path)
    assert name.rsplit("/", 1)[0] in said, said


@pytest.mark.parametrize("name", ["by_text/entropy/mean", "by_position/entropy/m2", "sample/means", "strongest/score"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_a_model_may_have_measured_loads(name, value, tmp_path):
    """A model in half precision overflows: its activations are infinite, and so are their means."""
    parts = Parts.of(corpus_file())
    parts.arrays[name].reshape(-1)[0] = value
    assert refused(parts.written(format_of(corpus_file())), tmp_path) is None


def test_counts_that_nobody_counted(tmp_path):
    """A histogram is of as many numbers as the count says."""
    parts = Parts.of(corpus_file())
    parts.arrays["by_text/entropy/histogram"][0] += 1
    assert "as many numbers as are counted" in refused(parts.written(format_of(corpus_file())), tmp_path)
