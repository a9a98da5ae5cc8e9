"""Every exported figure of odd input: the right picture, read back from it, or a clear error."""

from __future__ import annotations

import inspect
import io
from functools import cache

import pytest
import torch
from asked import Asked
from conftest import tiny_model
from matplotlib.text import Text
from read_back import NAMES, READ_BACK, drawn, takes
from test_viz import TOKENS, Tokenizer

from llama_attn import AttentionStatsConfig, viz


def measure(length=16, rows=2, padding=0, seed=0, tokens=True, answer=True, **settings):
    """Statistics of texts whose tokens are hostile, the last of which were generated."""
    new = min(3, length // 2)
    asked = {"statistics": "all", "norms": True}
    if answer:
        asked |= {"rows": slice(-3, None), "segments": [["prompt"] * (length - new) + ["generated"] * new] * rows}
    config = AttentionStatsConfig(**(asked | settings))
    ids = torch.arange(3, 3 + rows * length).view(rows, length)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with torch.no_grad():
        stats = tiny_model(seed=seed)(ids, attention_mask=mask, output_attention_stats=config).attention_stats
    return stats.with_tokens(Tokenizer(), ids - 3) if tokens else stats


# Of what no test changes.
measured = cache(measure)


def without_data(layer, **settings):
    """Nothing was finite in one layer."""
    stats = measure(**settings)
    for tensor in stats.values.values():
        if tensor.is_floating_point():
            tensor[layer] = torch.nan
    return stats


def constant(value, **settings):
    """All numbers are the same."""
    stats = measure(**settings)
    for name, tensor in stats.values.items():
        if tensor.is_floating_point() and not name.endswith("_map"):
            tensor.masked_fill_(tensor.isfinite(), value)
    return stats


# What is measured, with a seed, and which layer, row and head are drawn.
CASES = {
    "hostile tokens": (lambda seed: measure(seed=seed), {"layer": 2, "batch": 0}),
    "more hostile tokens": (lambda seed: measure(seed=seed), {"layer": 2, "batch": 1}),
    "half of the row is padding": (lambda seed: measure(padding=8, seed=seed), {"layer": 1, "batch": 0}),
    "all of the row is padding": (lambda seed: measure(padding=16, seed=seed), {"layer": 1, "batch": 0}),
    "one token": (lambda seed: measure(1, rows=1, seed=seed), {"batch": 0}),
    "two tokens": (lambda seed: measure(2, seed=seed), {"layer": 1}),
    "a layer without data": (lambda seed: without_data(1, seed=seed), {"layer": 1}),
    "beside a layer without data": (lambda seed: without_data(1, seed=seed), {"layer": 2}),
    "one layer, one head": (lambda seed: measure(layers=(1,), heads=(4,), seed=seed), {"layer": 1, "head": 4}),
    "layers and heads in any order": (lambda seed: measure(layers=(2, 0), heads=(5, 0), seed=seed), {"layer": 2, "head": 0}),
    "five rows": (lambda seed: measure(rows=5, seed=seed), {"batch": 4}),
    "all zero": (lambda seed: constant(0.0, seed=seed), {}),
    "all the same": (lambda seed: constant(0.5, seed=seed), {}),
}  # fmt: skip


REFUSED = {
    ("all of the row is padding", "plot_head_comparison"): "b: row 0 has no token in common with that of a",
    ("all of the row is padding", "plot_sources"): "batch: no token of row 0 was generated",
    ("one token", "plot_sources"): "source: nothing says which tokens were generated",
}


@cache
def runs(case):
    make, _ = CASES[case]
    return make(0), make(1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_odd_input(name, case):
    _, place = CASES[case]
    for head in {None, place.get("head", 4)} if takes(name, "head") else {None}:
        asked = Asked(*runs(case), **(place | {"head": head, "query_slice": slice(None)}))
        if (case, name) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[case, name]):
                drawn(name, asked)
            continue
        figure = drawn(name, asked)
        if head is None:
            # Warnings are errors, and a glyph that no font has is a warning.
            figure.savefig(io.BytesIO(), format="png", dpi=40)
        READ_BACK[name](figure, asked)
        if case == "all of the row is padding" and takes(name, "batch"):
            assert "no data" in texts(figure) or nothing_but_grey(figure)


def texts(figure) -> set[str]:
    """What is written in axes and legends."""
    return {text.get_text() for part in (*figure.axes, *figure.legends) for text in part.findobj(Text)}


def nothing_but_grey(figure) -> bool:
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]
    return bool(shown) and all(cells.mask.all() for cells in shown)


def test_the_tokens_are_hostile():
    assert any(len(token) > 9999 for token in TOKENS)
    assert any(ord(character) < 32 for token in TOKENS for character in token)
    assert len(TOKENS) <= 32, "two rows hold them all"


@pytest.mark.parametrize("name", NAMES)
def test_vector_graphics_of_hostile_tokens_are_wellformed(name):
    from xml.etree import ElementTree

    file = io.BytesIO()
    drawn(name, Asked(*runs("more hostile tokens"))).savefig(file, format="svg")
    root = ElementTree.fromstring(file.getvalue())  # noqa: S314 (what we wrote ourselves)
    assert not [element for element in root.iter() if element.tag.endswith("script")]


@pytest.mark.parametrize("name", NAMES)
def test_without_tokens_positions_are_written(name):
    asked = Asked(measured(tokens=False), measured(tokens=False, seed=1))
    figure = drawn(name, asked)
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if "[token]" in axis.get_label_text():
                assert [label.get_text() for label in axis.get_ticklabels() if label.get_text()][:2] != TOKENS[:2]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_measured_is_refused(name):
    stats = measured(layers=(2, 0), heads=(4,))
    asked = Asked(stats, stats, layer=2, batch=1)
    for parameter, wanted in (("layer", 1), ("layer", -1), ("batch", 2), ("batch", -1), ("head", 3)):
        if takes(name, parameter):
            with pytest.raises(ValueError, match=f"{parameter}: {wanted} was not measured; there are"):
                drawn(name, Asked(stats, stats, **({"layer": 2} | {parameter: wanted})))
    nothing = measured(statistics="topk_weight", norms=False, answer=False)
    function = getattr(viz, name)
    sources = (nothing, nothing) if "a" in inspect.signature(function).parameters else (nothing,)
    wanted = {"plot_rows": r"rows=\(-1,\)", "plot_sources": "segments=…"}.get(name, r"statistics=\(…, ")
    with pytest.raises(ValueError, match=rf"AttentionStatsConfig\({wanted}"):
        function(*sources)
    assert drawn(name, asked), "the rest is"
