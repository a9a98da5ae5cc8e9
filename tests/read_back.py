"""One function per figure that reads it back from its artists, by the labels on its axes, and compares it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from matplotlib.collections import PatchCollection, PolyCollection
from matplotlib.colors import to_hex
from own_text import own_text

from llama_attn import AttentionStats, viz
from llama_attn.analysis import classify_heads, coverage as coverage_of
from llama_attn.viz.figures.activations import CHANNEL_COLOURS
from llama_attn.viz.style import drawable

# Those of a table of losses, or of a picture, have tests of their own.
OF_MORE = {"plot_ablation", "plot_budget", "plot_image_rows"}
NAMES = [name for name in viz.__all__ if name.startswith("plot_") and name not in OF_MORE]


@dataclass(frozen=True)
class Asked:
    """What a figure was asked for; `None` for a head is the mean."""

    a: AttentionStats
    b: AttentionStats
    layer: int = 0
    head: int | None = 4
    batch: int = 1
    kind: str = "weights"
    statistic: str = "sink_mass"
    query_slice: slice = field(default_factory=lambda: slice(6, 15))

    @property
    def positions(self) -> list[int]:
        return list(range(self.a.num_keys))

    def at(self, name: str, stats: AttentionStats | None = None) -> np.ndarray:
        """The statistic at the layer and row; the axis of query heads, if there is one, is picked or averaged."""
        stats = self.a if stats is None else stats
        dims = stats.labels[name].dims
        layers = stats.hidden_layers if dims[0] == "hidden_layer" else stats.layers
        values = stats[name].double().numpy()[layers.index(self.layer), self.batch]
        if "head" in dims:
            return values.mean(0) if self.head is None else values[stats.heads.index(self.head)]
        return values

    def map(self, stats: AttentionStats | None = None) -> np.ndarray:
        """The map, NaN for pairs of tokens that may not see each other."""
        real = self.a.visible_queries[self.batch].numpy() > 0
        seen = np.tril(real[:, None] & real)
        return np.where(seen, self.at(f"{self.kind}_map", stats), np.nan)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-7)


def average(values: torch.Tensor | np.ndarray, axis=-1) -> np.ndarray:
    """The mean of what there is, NaN where there is nothing."""
    values = np.asarray(values, dtype=np.float64)
    count = np.isfinite(values).sum(axis)
    return np.where(count, np.nansum(values, axis), np.nan) / np.maximum(count, 1)


def heat(axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of an image, and where the centres of its columns and rows lie."""
    (image,) = axes.images
    assert image.origin == "upper"
    cells = image.get_array().filled(np.nan)
    left, right, bottom, top = image.get_extent()
    assert axes.get_xlim() == (left, right), "all of it is shown"
    assert axes.get_ylim() == (bottom, top)
    low, high = image.norm.vmin, image.norm.vmax
    finite = cells[np.isfinite(cells)]
    assert not finite.size or low <= finite.min() <= finite.max() <= high, "no colour stands for two values"
    x, y = ((np.arange(n) + 0.5) / n for n in cells.shape[::-1])
    return cells, left + (right - left) * x, top + (bottom - top) * y


def labels(axis) -> dict[float, str]:
    """What is written where."""
    pairs = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return {float(place): label.get_text() for place, label in pairs}


def bar_of(figure) -> str:
    (label,) = {axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes if axes.get_label() == "<colorbar>"}
    return label


def read_title(text: str, expected: str, asked: Asked):
    """What is shown, then the text: its row, length and first token."""
    text = text.replace("\n", " ")
    assert text.startswith(f"{expected} ")
    rest = text.removeprefix(f"{expected} ")
    real = np.flatnonzero(asked.a.visible_queries[asked.batch] > 0)
    begins = drawable(asked.a.tokens[asked.batch][real[0]]).replace("␣", "") if len(real) else ""
    rows = f"row {asked.batch}, " if asked.a.batch > 1 else ""
    assert rest.removeprefix("a: ").startswith(f"{rows}{len(real)} token{'' if len(real) == 1 else 's'}")
    assert begins in rest


# Of those that the tests measure.
HEADS = {(0, 1, 2, 3, 4, 5): "heads 0–5", (0, 1, 4): "heads 0–1, 4", (4,): "head 4", (0, 5): "heads 0, 5"}
PARTS = {(0, 1, 2): "", (0, 2): ", layers 0, 2 of 3", (1,): ", layer 1 of 3"}


def part_of(asked: Asked) -> str:
    return PARTS[tuple(sorted(asked.a.layers))]


def grid_of(axes) -> dict[tuple[str, str], float]:
    """Cells by what is written beside and below them: layer, head."""
    cells, x, y = heat(axes)
    rows, columns = labels(axes.yaxis), labels(axes.xaxis)
    layers = [int(rows[place]) for place in y]
    assert layers == sorted(layers)
    return {(rows[j], columns[i]): cells[n, m] for n, j in enumerate(y) for m, i in enumerate(x)}


def tokens(stats: AttentionStats, asked: Asked) -> dict[float, str]:
    return {place: drawable(token) for place, token in enumerate(stats.tokens[asked.batch])}


def words(asked: Asked) -> str:
    heads = HEADS[tuple(sorted(asked.a.heads))]
    return f"layer {asked.layer}, " + (f"mean over {heads}" if asked.head is None else f"head {asked.head}")


BARS = {"weights": "attention weight [probability]\nsquare-root scale", "logits": "scaled score [logit]"}


def read_map(axes, expected, asked):
    cells, x, y = heat(axes)
    close(cells, expected)
    np.testing.assert_allclose(x, asked.positions)
    np.testing.assert_allclose(y, asked.positions)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key [token]", "query [token]")
    assert labels(axes.xaxis) == labels(axes.yaxis) == tokens(asked.a, asked)


def attention_map(figure, asked):
    read_map(figure.axes[0], asked.map(), asked)
    assert bar_of(figure) == BARS[asked.kind]
    read_title(figure.axes[0].get_title(), f"Attention {asked.kind}, {words(asked)}", asked)


def comparison(figure, asked):
    read_map(figure.axes[0], asked.map(asked.b) - asked.map(asked.a), asked)
    unit = {"weights": "attention weight, b − a [probability]", "logits": "scaled score, b − a [logit]"}[asked.kind]
    assert bar_of(figure) == f"difference in {unit}"
    read_title(figure.axes[0].get_title(), f"Attention {asked.kind}, b − a, {words(asked)}", asked)
    (image,) = figure.axes[0].images
    red, *_, blue = image.cmap([1.0, 0.0])[:, [0, 2]].tolist()
    assert red[0] > red[1], "more in b is red"
    assert blue[0] < blue[1], "more in a is blue"


def layer_heads(figure, asked):
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == [f"head {head}" for head in asked.a.heads]
    for head in asked.a.heads:
        cells, x, y = heat(panels[f"head {head}"])
        close(cells, replace(asked, head=head).map())
        np.testing.assert_allclose([x, y], [asked.positions] * 2)
    assert bar_of(figure) == BARS[asked.kind]
    read_title(figure.get_suptitle(), f"Attention {asked.kind} of layer {asked.layer}", asked)


def model_view(figure, asked):
    axes = figure.axes[0]
    cells, x, y = heat(axes)
    rows, columns = labels(axes.yaxis), labels(axes.xaxis)
    assert list(columns.values()) == [str(head) for head in asked.a.heads]
    assert list(rows.values()) == [str(layer) for layer in sorted(asked.a.layers)]
    for row, layer in rows.items():
        for column, head in columns.items():
            inside = np.ix_(np.abs(y - row) < 0.5, np.abs(x - column) < 0.5)
            close(cells[inside], replace(asked, layer=int(layer), head=int(head), kind="weights").map())
    assert bar_of(figure) == BARS["weights"]
    size = f"{asked.a.num_keys} × {asked.a.num_keys} cells of 1 token"
    read_title(axes.get_title(), f"Attention of every head ({size}){part_of(asked)}", asked)


def by_labels(values: np.ndarray, stats: AttentionStats) -> dict[tuple[str, str], float]:
    """Numbers (layer, head) by the indices as they are written on axes."""
    return {
        (str(layer), str(head)): values[i, j]
        for i, layer in enumerate(stats.layers)
        for j, head in enumerate(stats.heads)
    }


def read_grid(axes, expected: dict[tuple[str, str], float]):
    found = grid_of(axes)
    assert found.keys() == expected.keys()
    close([found[key] for key in expected], list(expected.values()))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def head_grid(figure, asked):
    means = average(asked.a[asked.statistic][:, asked.batch])
    read_grid(figure.axes[0], by_labels(means, asked.a))
    assert bar_of(figure) == "sink mass [probability]"
    read_title(figure.axes[0].get_title(), f"Sink mass, mean over tokens{part_of(asked)}", asked)


def head_comparison(figure, asked):
    first, second = (average(run[asked.statistic], (1, 3)) for run in (asked.a, asked.b))
    read_grid(figure.axes[0], by_labels(second - first, asked.a))
    assert bar_of(figure) == "difference in sink mass, b − a [probability]"
    title = figure.axes[0].get_title().replace("\n", " ")
    assert title.startswith(f"Sink mass, b − a, mean over tokens{part_of(asked)} ")


def head_roles(figure, asked):
    axes = figure.axes[0]
    frame = classify_heads(asked.a.select(batch=asked.batch), asked.query_slice).set_index(["layer", "head"])
    (image,) = axes.images
    found = grid_of(axes)
    colours = {cell: to_hex(image.cmap(image.norm(value))) for cell, value in found.items() if np.isfinite(value)}
    legend = figure.legends[0]
    roles = {
        to_hex(patch.get_facecolor()): text.get_text().partition(":")
        for patch, text in zip(legend.get_patches(), legend.get_texts(), strict=True)
    }
    assert len(roles) == len(legend.get_patches()), "no colour stands for two roles"
    assert len(found) == len(frame)
    assert any("no data" in role for role in roles.values()) == bool(frame.role.isna().any())
    written = {
        (labels(axes.yaxis)[y], labels(axes.xaxis)[x]): text.get_text()
        for text in axes.texts
        for x, y in [text.get_position()]
    }
    scored = {}
    for (layer, head), line in frame.iterrows():
        if not isinstance(line.role, str):
            assert (str(layer), str(head)) not in colours
            continue
        name, _, count = roles[colours[str(layer), str(head)]]
        assert name == line.role.replace("_", " ")
        assert int(count) == (frame.role == line.role).sum()
        if np.isfinite(line.score):
            scored[str(layer), str(head)] = f"{100 * line.score:.0f}"
    assert written == scored


def layer_profile(figure, asked):
    axes = figure.axes[0]
    means = average(asked.a[asked.statistic][:, asked.batch])[np.argsort(asked.a.layers)]
    layers = sorted(asked.a.layers)
    (line,) = axes.lines
    close(line.get_xydata(), np.stack([layers, means.mean(1)], 1))
    bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
    low, high, mean, std = means.min(1), means.max(1), means.mean(1), means.std(1)
    limits = ((low, high), (np.maximum(mean - std, low), np.minimum(mean + std, high)))
    for band, (below, above) in zip(bands, limits, strict=True):
        corners = np.concatenate([np.empty((0, 2)), *(path.vertices for path in band.get_paths())])
        for layer, *ends in zip(layers, below, above, strict=True):
            there = corners[corners[:, 0] == layer][:, 1]
            close([there.min(), there.max()] if there.size else [np.nan] * 2, ends)
    assert axes.get_ylabel() == "sink mass [probability]"
    assert axes.get_xlabel() == "layer"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    heads = HEADS[tuple(sorted(asked.a.heads))]
    assert texts == [f"smallest to largest of {heads}", "± standard deviation", f"mean over {heads}"]
    read_title(axes.get_title(), f"Sink mass through the layers{part_of(asked)}", asked)


def distance_histogram(figure, asked):
    axes = figure.axes[0]
    names = labels(axes.xaxis)
    bars = {names[round(bar.get_x() + bar.get_width() / 2, 6)]: bar.get_height() for bar in axes.patches}
    last = asked.a.num_keys - 1
    starts = [2**b - 1 for b in range(asked.a.num_keys.bit_length())]
    ends = [min(2 * start, last) for start in starts]
    assert list(bars) == [f"{a}–{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    close(list(bars.values()), asked.at("distance_histogram"))
    assert all(bar.get_y() == 0 for bar in axes.patches)
    assert len(axes.lines) == (0 if asked.head is not None else len(asked.a.heads))
    for line, head in zip(axes.lines, asked.a.heads, strict=False):
        close(line.get_xydata(), np.stack([list(names), replace(asked, head=head).at("distance_histogram")], 1))
    assert axes.get_ylabel() == "attention [probability]"
    assert axes.get_xlabel() == "distance from query to key [tokens]"
    read_title(axes.get_title(), f"Attention by distance, {words(asked)}", asked)
    read_baseline(axes, asked)


def read_baseline(axes, asked):
    """Uniform attention: of every query the share of its keys in each bin, then the mean over queries."""
    positions = np.flatnonzero(asked.a.visible_queries[asked.batch] > 0).tolist()
    shares = [
        np.bincount(
            [(i - j + 1).bit_length() - 1 for j in positions if j <= i], minlength=asked.a.num_keys.bit_length()
        )
        / sum(j <= i for j in positions)
        for i in positions
    ]
    dashes = [each for each in axes.collections if each.get_label() == "uniform attention"]
    assert len(dashes) == bool(shares)
    for each in dashes:
        close([segment[0, 1] for segment in each.get_segments()], np.mean(shares, 0))


def token_strip(figure, asked):
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == [
        "received\n[probability]", "sink mass\n[probability]", "hidden norm\n[activation]", "key norm\n[activation]",
        "value norm\n[activation]",
    ]  # fmt: skip
    for name, axes in zip(("received", "sink_mass"), figure.axes[:2], strict=True):
        (steps,) = axes.patches
        heights, edges, baseline = steps.get_data()
        close(heights, asked.at(name))
        np.testing.assert_allclose((edges[1:] + edges[:-1]) / 2, asked.positions)
        assert baseline == 0
    for name, axes in zip(("hidden_norm", "key_norm", "value_norm"), figure.axes[2:], strict=True):
        (line,) = axes.lines
        values = asked.at(name)
        close(line.get_ydata(), values.mean(0) if values.ndim == 2 else values)
        assert line.get_xdata().tolist() == asked.positions
    assert labels(figure.axes[-1].xaxis) == tokens(asked.a, asked)
    read_title(figure.get_suptitle(), f"Along the text, {words(asked)}", asked)


def massive_activations(figure, asked):
    left, right = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    cells, x, y = heat(left)
    top, channels, median = (
        asked.a[name][:, asked.batch].double().numpy()
        for name in ("hidden_top", "hidden_top_channel", "hidden_layer_median")
    )
    order = np.argsort(asked.a.hidden_layers)
    top, channels, median = top[order], channels[order], median[order]
    largest = top[..., 0]
    close(cells, largest)
    np.testing.assert_allclose(x, asked.positions)
    layers = [labels(left.yaxis)[place] for place in y]
    assert layers == [str(layer) for layer in sorted(asked.a.hidden_layers)]
    bound = np.maximum(100, 1000 * median)
    expected = {
        (row, token, int(channels[row, token, rank]))
        for row, token, rank in np.argwhere(top > bound[:, None, None]).tolist()
    }
    found = {
        (row, token, int(line.get_label().removeprefix("massive, channel ")))
        for line in left.lines
        for token, row in line.get_xydata().tolist()
    }
    assert found == expected
    assert len({line.get_markerfacecolor() for line in left.lines}) == len(left.lines) <= len(CHANNEL_COLOURS)
    curves = {line.get_label(): line.get_xydata() for line in right.lines}
    for name, values in (
        ("largest", np.where(np.isfinite(largest).any(1), np.nan_to_num(largest, nan=-np.inf).max(1), np.nan)),
        ("median", median),
        ("massive beyond", bound),
    ):
        close(curves[name], np.stack([values, y], 1))
    assert right.get_ylim() == left.get_ylim()
    assert bar_of(figure) == "largest magnitude [activation]"
    assert right.get_xlabel() == "magnitude [activation]"
    assert labels(left.xaxis) == tokens(asked.a, asked)


def read_lines(axes, expected, asked):
    for line, values in zip(axes.lines, expected, strict=True):
        close(line.get_ydata(), values)
        assert line.get_xdata().tolist() == asked.positions
    assert axes.get_ylabel() == "L2 norm [activation]"
    assert axes.get_xlabel() == "position [token]"
    assert labels(axes.xaxis) == tokens(asked.a, asked)
    assert axes.get_title().split("\n")[0].endswith(f"layer {asked.layer}")


def hidden_norms(figure, asked):
    read_lines(figure.axes[0], [asked.at("hidden_norm")], asked)


def kv_norms(figure, asked):
    expected = {
        f"{name}: {of}": values
        for name in ("key", "value")
        for of, values in (
            ("mean of norms", asked.at(f"{name}_norm").mean(0)),
            ("norm of mean", asked.at(f"{name}_mean_norm")),
        )
    }
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == list(expected)
    read_lines(figure.axes[0], expected.values(), asked)
    for name in ("key", "value"):
        colours = {lines[label].get_color() for label in lines if label.startswith(name)}
        assert len(colours) == 1


def rows(figure, asked):
    assert "nan" not in bar_of(figure)
    axes, real = figure.axes[0], asked.a.visible_queries[asked.batch].numpy() > 0
    tokens = [token for token, kept in zip(asked.a.tokens[asked.batch], real, strict=True) if kept]
    shades, frame = (each for each in axes.collections if isinstance(each, PatchCollection))
    close(shades.get_array().filled(np.nan), asked.at("row_weights")[-1][real])
    # Spaces are seen by the shade, and a token without letters has one too.
    letters = [drawable(token).replace("␣", " ") or " " for token in tokens]
    assert [text.get_text() for text in axes.texts] == letters
    widths = [path.get_extents().width for path in shades.get_paths()]
    assert widths == [len(text) for text in letters]
    places = [path.get_extents().x0 for path in shades.get_paths()]
    assert places == [text.get_position()[0] for text in axes.texts], "letters stand on their shade"
    assert [path.get_extents().x0 for path in frame.get_paths()] == places[-1:]
    assert f"layer {asked.layer}, " in axes.get_title()
    last = asked.a.num_keys - 1
    token = drawable(asked.a.tokens[asked.batch][last])
    read_title(axes.get_title(), f"Attention of the token “{token}” at {last}, {words(asked)}", asked)
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert legends == ([] if np.isfinite(shades.get_array().filled(np.nan)).any() else ["no data"])


def sources(figure, asked):
    axes, names = figure.axes[0], asked.a.segments
    labels_of_keys = np.array([[*names, ""][at] for at in asked.a["key_segment"][asked.batch]])
    first = int((labels_of_keys == "generated").argmax())
    writing = slice(first - 1, len(labels_of_keys))
    # The sink is the first token, in the first segment.
    assert labels_of_keys[0] == names[0]
    mass, sink, learned = (
        asked.a[name][:, asked.batch, :, writing].double().numpy()
        for name in ("segment_mass", "sink_mass", "learned_sink_mass")
    )
    mass[..., 0] = np.maximum(mass[..., 0] - sink, 0)
    rest = average(1 - sink - learned, (0, 1))
    # Of a query that sees the sink alone, as the only token before the answer does, nothing is left.
    shares = average(mass, (0, 1)) / np.where(rest > 1e-6, rest, np.nan)[:, None]
    empty = np.isnan(shares).all(1)
    heights = [[patch.get_height() for patch in container] for container in axes.containers]
    assert len(heights) == 2 * len(names) + empty.any()
    bars, beside = heights[: 2 * len(names) : 2], heights[1 : 2 * len(names) : 2]
    close(np.transpose(bars), np.nan_to_num(shares))
    grey = [patch.get_x() + patch.get_width() / 2 for each in axes.containers[2 * len(names) :] for patch in each]
    close(grey, np.flatnonzero(empty))
    uniform = [
        [(labels_of_keys[1 : i + 1] == name).sum() / i if i else np.nan for name in names]
        for i in range(first - 1, len(labels_of_keys))
    ]
    means, of_uniform = average(shares, 0), average(uniform, 0)
    close(beside, np.stack([np.nan_to_num(means), of_uniform], -1))
    ticks = labels(axes.xaxis)
    # The last token was never fed back, and so only its place is known.
    tokens = [*map(drawable, asked.a.tokens[asked.batch][first:]), f"[{len(labels_of_keys)}]"]
    assert list(ticks.values()) == [*tokens, "mean", "uniform"]
    written = {text.get_text().split(":")[0]: text.get_text() for text in figure.legends[0].get_texts()}
    for name, share, even in zip(names, means, of_uniform, strict=True):
        shown = "no data" if np.isnan(share) else percent(share)
        assert written[name] == f"{name}: {shown} (uniform {percent(even)})"
    assert ("no data" in written) == empty.any()
    heads = HEADS[tuple(sorted(asked.a.heads))]
    read_title(axes.get_title(), f"What the answer draws on, mean over {heads}{part_of(asked)}", asked)


def coverage(figure, asked):
    """The bounds themselves are checked against weights elsewhere."""
    axes, bounds = figure.axes[0], coverage_of(asked.a).sortby("layer")
    layers = bounds["layer"].values
    solid, dashed = axes.lines[::2], axes.lines[1::2]
    for at in range(4):
        least, most = (bounds[name][..., at].mean("head") for name in ("least", "most"))
        close(solid[at].get_xydata(), np.stack([layers, np.sqrt(least * most)], -1))
        close(dashed[at].get_ydata(), float(bounds.uniform[at]))
        assert np.ptp(dashed[at].get_xdata()) > 0, "it is seen, also of one layer"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["0.5", "0.9", "0.95", "0.99", "uniform attention"]
    bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
    assert [text.get_text() for text in axes.texts] == ([] if bounds.most.notnull().any() else ["no data"])
    if axes.texts:
        assert not any(len(band.get_paths()) for band in bands)
        return
    heights = [band.get_paths()[0].get_extents() for band in bands]
    assert [height.y0 for height in heights[::2]] == [float(bounds.least[..., at].min()) for at in range(4)]
    assert [height.y1 for height in heights[::2]] == [float(bounds.most[..., at].max()) for at in range(4)]


def percent(share: float) -> str:
    """Without what is behind the point; what is not nothing is not 0 %, and what is not all is not 100 %."""
    return "<1%" if 1e-6 < share < 0.005 else ">99%" if 0.995 <= share < 1 - 1e-6 else f"{share:.0%}"


def of_own_text(read):
    """A figure of one row shows its own text alone; `head_comparison` is of all rows."""

    def of_row(figure, asked):
        read(figure, replace(asked, a=own_text(asked.a, asked.batch), b=own_text(asked.b, asked.batch)))

    return read if read in (head_comparison, coverage) else of_row


READ_BACK = {
    f"plot_{read.__name__}": of_own_text(read)
    for read in (
        attention_map, comparison, distance_histogram, head_comparison, head_grid, head_roles, hidden_norms, kv_norms,
        layer_heads, layer_profile, massive_activations, model_view, token_strip, rows, sources, coverage,
    )
}  # fmt: skip


def drawn(name: str, asked: Asked):
    """The figure that the function makes of what was asked."""
    function = getattr(viz, name)
    known = inspect.signature(function).parameters
    settings = ("layer", "head", "batch", "kind", "statistic", "query_slice")
    sources = (asked.a, asked.b) if "a" in known else (asked.a,)
    return function(*sources, **{key: getattr(asked, key) for key in settings if key in known})


def takes(name: str, parameter: str) -> bool:
    return parameter in inspect.signature(getattr(viz, name)).parameters
