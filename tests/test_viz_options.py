"""Every figure with any options of any run: what would be drawn, read from its artists; pixels for nothing."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from asked import squeezed
from figure_calls import any_call
from figure_state import check_artists, state_of
from hypothesis import Phase, given, settings, strategies as st
from matplotlib.figure import Figure
from read_back import NAMES

# What cannot be drawn of a run by chance, though its options are right.
REFUSED = {
    "plot_head_comparison": r"b: row \d has no token in common with that of a",
    "plot_head_roles": "query_slice: ",
    "plot_rows": "row: all that were measured are padding",
    "plot_sources": "source: nothing says which tokens|batch: no token of row|behind the mask of row|the sink's tokens lie in"
    "|expected the queries",
}
EXAMPLES = settings.default.max_examples // 2


@contextlib.contextmanager
def made_figures(monkeypatch) -> Iterator[list[Figure]]:
    """All figures that are made meanwhile; nothing else of matplotlib changes."""
    made = []
    plain = Figure.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        plain(self, *args, **kwargs)

    before = matplotlib.rcParams.copy(), plt.get_fignums(), np.geterr()
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "__init__", counted)
        yield made
    assert (matplotlib.rcParams.copy(), plt.get_fignums(), np.geterr()) == before


def same(found, expected) -> bool:
    return (
        found.identical(expected)
        if hasattr(found, "identical")
        else found.equals(expected) and found.attrs == expected.attrs
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_would_be_drawn(name, monkeypatch):
    drawn = []

    @settings(max_examples=EXAMPLES, phases=[Phase.generate])
    @given(st.data())
    def check(data):
        call = any_call(data.draw, name)
        before = copy.deepcopy(call.inputs)
        with made_figures(monkeypatch) as made:
            try:
                figure = call.draw()
            except ValueError as error:
                refusal = str(error)
                figure = None
        if figure is None:
            assert re.search(REFUSED.get(name, "never"), refusal), refusal
            assert not made
            return
        assert made == [figure]
        assert all(map(same, call.inputs, before))
        call.read(figure)
        check_artists(figure)
        check_names(figure, call.options)
        assert repr(state_of(call.draw())) == repr(state_of(figure))
        for option, values in call.wrong.items():
            for value in values:
                with made_figures(monkeypatch) as made, pytest.raises(ValueError, match=r"expected|not measured|no "):
                    call.draw(**{option: value})
                assert not made, f"{option}={value!r}"
        drawn.append(figure)

    check()
    assert drawn, "some are drawn"


def check_names(figure, options):
    """Layer and head that were asked for stand in the title."""
    title = squeezed("".join([figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]))
    for option in ("layer", "head"):
        if options.get(option) is not None:
            assert f"{option}{options[option]}" in title or "afterthelastlayer" in title
