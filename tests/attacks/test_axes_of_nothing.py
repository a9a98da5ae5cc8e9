"""Axes that are long, and of which nothing has to be stored since another one is empty."""

from __future__ import annotations

import numpy as np
import pytest
from hostile import Parts, corpus_file, format_of, outer_of, run_file, with_outer
from trying import refused


def shape(name, *sizes):
    """A tensor that says it is of another shape, of which nothing has to be stored if one axis is empty."""

    def change(data):
        header, rest = outer_of(data)
        begin = header[name]["data_offsets"][0]
        header[name] |= {"shape": list(sizes), "data_offsets": [begin, begin]}
        return with_outer(header, rest)

    return change


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("visible_queries", (0, 10**12)),
        ("visible_keys", (0, 2**62)),
        ("visible_keys", ()),
        ("entropy", (2, 2, 6, 0)),
        ("received", (0,)),
    ],
)
def test_of_a_run(name, sizes, tmp_path):
    assert refused(shape(name, *sizes)(run_file()), tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"sample/ids": (0, 10**9)},
        {"by_position/key_norm/count": (2, 10**9, 0)},
        {"by_text/key_norm/count": (0, 10**9)},
        {"weight_mass": (0, 10**9, 31)},
        {"roles": (10**9, 0, 2)},
        {"sinks/counts": (0, 2**40)},
        {"strongest/score": (6, 2, 0, 10**9)},
    ],
)
def test_of_a_corpus(sizes, tmp_path):
    parts = Parts.of(corpus_file())
    for name, shape in sizes.items():
        parts.arrays[name] = np.empty(shape, parts.arrays[name].dtype)
    assert refused(parts.written(format_of(corpus_file())), tmp_path)


def test_an_empty_axis_of_all_arrays(tmp_path):
    """They agree with each other: no heads at all, and a million positions of each."""
    parts = Parts.of(corpus_file())
    for name, array in parts.arrays.items():
        if name.startswith("by_") and "key_norm" in name and array.ndim > 1:
            shape = (2, 0, 10**9) if name.startswith("by_position") else (2, 0)
            parts.arrays[name] = np.empty(shape, array.dtype)
        elif "key_norm" in name and "histogram" in name:
            parts.arrays[name] = array[:0]
    assert "position_bin" in refused(parts.written(format_of(corpus_file())), tmp_path)
