"""What is written in figures: model, text and part in titles; names and tokens as they are, never as formulas."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from asked import Asked, labels
from conftest import tiny_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from read_back import NAMES, drawn, takes

from llama_attn import AttentionStatsConfig, viz
from llama_attn.stats.container import Label
from llama_attn.viz.figures.grids import ROLE_COLOURS
from llama_attn.viz.style import LONGEST_TEXT, NO_DATA

FORMULA = "$\\frac{x$ $_^{$ \x1b[2J"
MODEL = "$x$ $y$\x1b[2J"
SEGMENTS = ["system", FORMULA, "generated"]


class Words:
    def convert_ids_to_tokens(self, ids):
        return [f"Ġword{i}" for i in ids]


def measure(length=12, layers=None, segments=True, **changes):
    ids = torch.arange(3, 3 + length)[None]
    numbers = torch.arange(length)[None] % 3
    config = AttentionStatsConfig(
        statistics="all", norms=True, layers=layers, segments=(numbers, SEGMENTS) if segments else None,
        rows=slice(-3, None),
    )  # fmt: skip
    with torch.no_grad():
        stats = tiny_model()(ids, output_attention_stats=config).attention_stats
    return replace(stats.with_tokens(Words(), ids), **changes)


def all_titles(figure) -> str:
    """All of them, without the line breaks that their width asks for."""
    return " ".join([figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]).replace("\n", " ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("/home/me/models/a-model/", "a-model"),
        ("C:\\models\\a-model", "a-model"),
        # Its end says which of two models it is.
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_titles_name_model_and_text(name, model, shown):
    stats = measure(model=model)
    assert f" {shown}, 12 tokens: word3 word4 word5" in all_titles(drawn(name, Asked(stats, stats, batch=0)))


@pytest.mark.parametrize("name", NAMES)
def test_titles_name_the_part(name):
    stats = measure(layers=(0, 2))
    title = all_titles(drawn(name, Asked(stats, stats, batch=0, layer=2)))
    assert ("layers 0, 2 of 3" in title) == (not takes(name, "layer"))
    assert ("layer 2" in title) == takes(name, "layer")
    whole = all_titles(drawn(name, Asked(*[measure()] * 2, batch=0)))
    assert "of 3" not in whole


@pytest.mark.parametrize(
    ("stride", "batch", "shown"),
    [
        (1, 0, "row 0, 12 tokens: "), (1, 1, "row 1, 9 tokens: "), (1, 2, "row 2, 10 tokens: "),
        # The last query that was measured is 10 and sees all but the last key.
        (5, 0, "row 0, at least 11 tokens: "), (5, 1, "row 1, at least 8 tokens: "),
        # Its query 10 is padding, 5 is text, and what lies between may be either.
        (5, 2, "row 2, at least 6 tokens: "),
        (11, 0, "row 0, 12 tokens: "),
    ],
)  # fmt: skip
def test_titles_count_the_tokens_that_are_known(stride, batch, shown):
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :3] = mask[2, 10:] = 0
    ids = torch.arange(3, 15).expand(3, -1)
    config = AttentionStatsConfig(query_stride=stride)
    stats = tiny_model()(ids, attention_mask=mask, output_attention_stats=config).attention_stats
    text = " ".join(f"word{each}" for each in range(6 if batch == 1 else 3, 15))[: LONGEST_TEXT - 8]
    assert f"{shown}{text}" in all_titles(viz.plot_head_grid(stats.with_tokens(Words(), ids), batch=batch))


def test_the_part_is_known_where_only_states_were_measured():
    stats = measure(layers=(0, 2)).to_xarray()[["hidden_norm", "visible_keys", "visible_queries"]]
    assert "layers 0, 2 of 3" in viz.plot_layer_profile(stats, "hidden_norm").axes[0].get_title()


def test_titles_name_the_queries_that_count():
    stats = measure()
    assert "queries 4:9, " not in viz.plot_head_roles(stats).axes[0].get_title()
    assert "queries 4:9" in viz.plot_head_roles(stats, query_slice=slice(4, 9)).axes[0].get_title()


@pytest.mark.parametrize("name", NAMES)
def test_formulas_from_files_are_text(name, ids):
    """Model, unit, segment and statistic are data: no dollar sign is read, no control character written."""
    stats = measure(model=MODEL, tokens=[["$x$", "\\frac{", "$_^{$"] * 4])
    stats = replace(stats, labels={key: Label(each.dims, FORMULA, "", "") for key, each in stats.labels.items()})
    ds = stats.to_xarray()
    ds["$x$ $y$\x07"] = ds["entropy"]
    asked = {"statistic": "$x$ $y$\x07"} if takes(name, "statistic") else {}
    figures = [drawn(name, Asked(ds, ds, batch=0, **asked))]
    if takes(name, "segment") and takes(name, "statistic"):
        figures.append(getattr(viz, name)(ds, "segment_mass", segment=FORMULA))
    elif takes(name, "segment"):
        figures.append(getattr(viz, name)(ds, statistics=["segment_mass", "received"], segment=FORMULA))
    for figure in figures:
        # It would raise if one were read: TeX that cannot be parsed.
        figure.savefig(io.BytesIO(), format="png", dpi=40)
        seen = [text for text in figure.findobj(Text) if text.get_visible()]
        written = [text for text in seen if "x$" in text.get_text() or "{" in text.get_text()]
        ticks = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()}
        powers = {text for text in written if text in ticks and "mathdefault" in text.get_text()}
        assert written
        assert not any(text.get_parse_math() for text in written if text not in powers)
        assert not [text for text in figure.findobj(Text) if "\x1b" in text.get_text() or "\x07" in text.get_text()]
        assert "$x$ $y$·[2J, 12 tokens: $x$\\frac{$_^{$" in all_titles(figure)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_beyond_the_edge(name):
    """Also of long names, with few layers and heads, in the smallest figures."""
    stats = measure(layers=(1,), model="a-long-name" * 9, tokens=[["word" * 3] * 12]).select(heads=[4, 0])
    figure = drawn(name, Asked(stats, stats, batch=0, layer=1))
    FigureCanvasAgg(figure).draw()
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and "a-long-name" in text.get_text():
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width
            assert box.y1 <= figure.bbox.height


ONE_AXES = [name for name in NAMES if name not in ("plot_layer_heads", "plot_massive_activations", "plot_token_strip")]


@pytest.mark.parametrize("name", ONE_AXES)
def test_axes_may_be_given(name):
    """What is drawn in them is what would be drawn alone, beside what the caller has there."""
    stats = measure()
    arguments = (stats, stats) if "comparison" in name else (stats,)
    mine = Figure(figsize=(20, 8), layout="constrained")
    part = mine.subfigures(1, 2)[1]
    other, ax = part.subplots(1, 2)
    other.set_title("$mine$")
    assert getattr(viz, name)(*arguments, ax=ax) is mine
    alone = getattr(viz, name)(*arguments).axes[0]
    assert ax.get_title().replace("\n", " ") == alone.get_title().replace("\n", " ")
    assert (ax.get_xlabel(), ax.get_ylabel()) == (alone.get_xlabel(), alone.get_ylabel())
    if name != "plot_layer_profile":
        assert labels(ax.xaxis) == labels(alone.xaxis)
    for one, two in zip(ax.images, alone.images, strict=True):
        np.testing.assert_array_equal(one.get_array(), two.get_array())
    for one, two in zip(ax.lines, alone.lines, strict=True):
        np.testing.assert_array_equal(one.get_xydata(), two.get_xydata())
    assert [bar.get_height() for bar in ax.patches] == [bar.get_height() for bar in alone.patches]
    assert other.get_title() == "$mine$"
    assert other.title.get_parse_math()
    assert not mine.legends
    mine.savefig(io.BytesIO(), format="png", dpi=40)
    with pytest.raises(TypeError, match="ax: expected one matplotlib Axes, got ndarray; of several, give one"):
        getattr(viz, name)(*arguments, ax=np.array([other, ax]))


@pytest.mark.parametrize("segment", SEGMENTS)
def test_statistics_of_segments(segment):
    stats = measure()
    mass = stats["segment_mass"][..., SEGMENTS.index(segment)].double().numpy()
    shown = segment.replace("\x1b", "·")
    figure = viz.plot_head_grid(stats, "segment_mass", segment=segment)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), mass[:, 0].mean(-1), rtol=3e-6)
    assert figure.axes[0].get_title().replace("\n", " ").startswith(f"Segment mass of {shown}, mean over tokens")
    figure = viz.plot_layer_profile(stats, "segment_mass", segment=segment)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), mass[:, 0].mean((1, 2)), rtol=3e-6)
    assert figure.axes[0].get_ylabel() == f"segment mass of {shown} [probability]"
    figure = viz.plot_token_strip(stats, layer=1, head=3, statistics=["segment_mass", "entropy"], segment=segment)
    np.testing.assert_allclose(figure.axes[0].patches[0].get_data().values, mass[1, 0, 3], rtol=3e-6)
    assert [axes.get_ylabel() for axes in figure.axes] == [f"segment mass\nof {shown}\n[probability]", "entropy\n[nat]"]


CALLS = {
    "grid": lambda stats, name, segment: viz.plot_head_grid(stats, name, segment=segment),
    "profile": lambda stats, name, segment: viz.plot_layer_profile(stats, name, segment=segment),
    "strip": lambda stats, name, segment: viz.plot_token_strip(stats, statistics=[name], segment=segment),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_segments_that_there_are_not(call):
    stats = measure()
    with pytest.raises(ValueError, match=r"segment: expected one of \['system', .*, 'generated'\], got 'assistant'"):
        call(stats, "segment_mass", "assistant")
    with pytest.raises(ValueError, match=r"segment: 'segment_mass' has a number for each segment; name one of \['sys"):
        call(stats, "segment_mass", None)
    with pytest.raises(ValueError, match="segment: expected none, as 'entropy' is not one of segments"):
        call(stats, "entropy", "user")
    with pytest.raises(ValueError, match='"segment_mass"'):
        call(measure(segments=False), "segment_mass", "user")


def test_no_role_has_the_colour_of_no_data():
    assert NO_DATA not in ROLE_COLOURS.values()
    for colour in ROLE_COLOURS.values():
        _, saturation, _ = rgb_to_hsv(to_rgb(colour))
        assert saturation > 0.25, "no role is grey"
    assert len(set(ROLE_COLOURS.values())) == len(ROLE_COLOURS)
