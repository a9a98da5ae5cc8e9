"""Anything at any place of a file: of its headers, of its bytes."""

from __future__ import annotations

import copy

import pytest
from hostile import changed, corpus_file, outer_of, places, put, run_file, with_outer
from hypothesis import given, strategies as st
from trying import refused

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**70, 10**30, 0.0, 1.5, float("nan"), float("inf")])
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["layer", "query", "all", "\x1b[31m", "\ud800", "cross", "entropy", "visible_keys"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("whole", [run_file, corpus_file])
@given(data=st.data())
def test_in_our_header(whole, data, folder):
    def change(header):
        new = header
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.sampled_from(list(places(new))[1:]))
            put(new, at, data.draw(JUNK))

    refused(changed(whole(), change), folder)


@pytest.mark.parametrize("whole", [run_file, corpus_file])
@given(data=st.data())
def test_in_the_list_of_tensors(whole, data, folder):
    header, rest = outer_of(whole())
    header = copy.deepcopy(header)
    tensors = {name: part for name, part in header.items() if name != "__metadata__"}
    at = data.draw(st.sampled_from(list(places(tensors))[1:]))
    new = data.draw(JUNK | st.sampled_from(["BF16", "F8_E4M3", "BOOL", "I64", "F64"]) | st.lists(st.integers(0, 9)))
    refused(with_outer(put(header, at, new), rest), folder)


@pytest.mark.parametrize("whole", [run_file, corpus_file])
@given(data=st.data())
def test_bytes_that_are_missing_or_others(whole, data, folder):
    whole = whole()
    at, flip = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    assert refused(whole[:at], folder)
    refused(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :], folder)
