"""Every figure with any options of any run: what would be drawn, read from its artists; pixels for nothing.

Each option has classes of values. A test is of one class of one option of one figure, everything else is by chance, and
it fails unless something is drawn.
"""

from __future__ import annotations

import contextlib
import copy
import re
import zlib
from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from asked import squeezed
from figure_calls import CALLED, any_call, classes_of, never_right
from figure_state import check_artists, check_same, state_of
from hypothesis import Phase, given, reject, seed, settings, strategies as st
from matplotlib.figure import Figure

# What cannot be drawn of a run by chance, though its options are right.
REFUSED = {
    "plot_head_comparison": r"b: row \d has no token in common with that of a",
    "plot_head_roles": "query_slice: ",
    "plot_image_rows": "row: None was not measured",
    "plot_rows": "row: all that were measured are padding",
    "plot_sources": "source: nothing says which tokens|batch: no token of row|behind the mask of row|the sink's tokens lie in"
    "|expected the queries",
}
# Of each class; the first one is the simplest there is.
EXAMPLES = max(2, settings.default.max_examples // 12)


@contextlib.contextmanager
def made_figures(monkeypatch) -> Iterator[list[Figure]]:
    """All figures that are made meanwhile; nothing else of matplotlib changes."""
    made = []
    plain = Figure.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        plain(self, *args, **kwargs)

    before = settings_now()
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "__init__", counted)
        yield made
    assert settings_now() == before


def settings_now() -> tuple[dict, list[int], dict]:
    """What is the same for all of matplotlib and numpy."""
    # Not rcParams' own copy, which looks at every name for what is deprecated.
    return dict.copy(matplotlib.rcParams), plt.get_fignums(), np.geterr()


def same(found, expected) -> bool:
    return (
        found.identical(expected)
        if hasattr(found, "identical")
        else found.equals(expected) and found.attrs == expected.attrs
    )


@pytest.mark.parametrize(
    ("name", "option", "value"), [(name, option, value) for name in CALLED for option, value in classes_of(name)]
)
def test_what_would_be_drawn(name, option, value, monkeypatch):
    drawn = []
    first = next(each for of, each in classes_of(name) if of == option)
    # Which class is right plays no part in what is wrong.
    refused = never_right(name, option) if value == first else []

    @settings(max_examples=EXAMPLES, phases=[Phase.generate])
    @given(st.data())
    def check(data):
        call = any_call(data.draw, name, (option, value))
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
            reject()
        assert made == [figure]
        assert all(map(same, call.inputs, before))
        call.read(figure)
        check_artists(figure)
        check_names(figure, call.options)
        if call.place is None:
            assert repr(state_of(call.draw())) == repr(state_of(figure))
        else:
            check_place(call, figure, monkeypatch)
        for wrong in refused:
            with (
                made_figures(monkeypatch) as made,
                pytest.raises((ValueError, TypeError), match=r"expected|not measured|no "),
            ):
                call.draw(**{option: wrong})
            assert not made, f"{option}={wrong!r}"
        drawn.append(figure)

    if settings.default.derandomize:
        # Otherwise every class would be tried on the same runs.
        check = seed(zlib.crc32(f"{name} {option} {value}".encode()))(check)
    check()
    assert drawn, "hypothesis finds none that is not refused"


def check_place(call, figure, monkeypatch):
    """Axes of the caller's show what a figure of our own shows, and nothing beside them changes."""
    axes = call.place()
    whole = axes.figure.figure
    others = [each for each in whole.axes if each is not axes]
    before = repr([*map(state_of, others)])
    with made_figures(monkeypatch) as made:
        assert call.draw(ax=axes) is whole
    assert not made
    assert repr([*map(state_of, others)]) == before
    assert not whole.get_suptitle()
    assert not [*whole.legends, *(each for part in whole.subfigs for each in part.legends)]
    check_same(axes, figure, call.name)


def check_names(figure, options):
    """Layer and head that were asked for stand in the title."""
    title = squeezed("".join([figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]))
    for option in ("layer", "head"):
        if options.get(option) is not None:
            assert f"{option}{options[option]}" in title or "afterthelastlayer" in title
