"""What Jupyter shows of statistics and figures."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from conftest import tiny_model
from test_viz import TOKENS, Tokenizer

from llama_attn import AttentionStatsConfig, viz
from llama_attn.stats.container import Label
from llama_attn.stats.display import _strongest


class Page(HTMLParser):
    """Elements, text, and tables as lists of rows of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert not attributes
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def measure(ids, **settings):
    config = AttentionStatsConfig(**({"statistics": "all", "norms": True} | settings))
    with torch.no_grad():
        return tiny_model()(ids, output_attention_stats=config).attention_stats


def test_html_says_what_repr_says(ids):
    stats = replace(measure(ids, layers=(2, 0)), model="my/llama", replayed=True)
    page = Page(stats._repr_html_())
    assert not page.open
    first, layers, origin, *lines = repr(stats).splitlines()
    assert first in page.text
    assert layers.strip() in page.text
    assert origin.strip() in page.text
    assert origin.endswith("on backend 'sdpa' of my/llama, replayed")
    assert layers == "  layers 2, 0 of 3, heads 0–5 of 6"
    _, statistics = page.tables
    assert [line.split() for line in lines] == [f"{name} ({axes}) [{unit}]".split() for name, axes, unit, _ in statistics[1:]]  # fmt: skip
    assert ["entropy", "layer: 2, batch: 2, head: 6, query: 37", "nat", stats.labels["entropy"].meaning] in statistics
    assert f"{len(stats)} statistics" in page.text


def test_html_has_the_means_of_every_layer(ids, left_padding):
    config = AttentionStatsConfig(layers=(2, 0))
    with torch.no_grad():
        stats = tiny_model()(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats
    # The first nine keys are padding; the last three take all attention of the one, two and three queries that see them.
    stats["received"][..., 34:] = 1
    (headings, *rows), _ = Page(stats._repr_html_()).tables
    assert headings == [
        "layer", "entropy [nat]", "max weight [probability]", "sink mass [probability]", "local mass [probability]",
        "mean distance [tokens]", "strongest key, share of all attention",
    ]  # fmt: skip
    for row, (layer, cells) in enumerate(zip((2, 0), rows, strict=True)):
        assert cells[0] == str(layer)
        for name, shown in zip(("entropy", "max_weight", "sink_mass", "local_mass"), cells[1:], strict=False):
            assert shown == f"{stats[name][row].double().nanmean():.3g}"
        share = stats["received"][row, 0].mean(0)[9:] * torch.arange(28, 0, -1) / 28
        assert share.argmax() < 25, "a key that few queries see is not the strongest"
        assert cells[-1] == f"{9 + share.argmax()}, {share.max():.0%}"


def test_hostile_text_is_text(ids):
    stats = measure(ids[:, :12]).with_tokens(Tokenizer(), torch.arange(24).view(2, 12))
    label = Label(stats.labels["entropy"].dims, "<nat>", "<img src=x onerror=alert(1)>", "")
    stats = replace(stats, model="<script>alert(1)</script>", labels=stats.labels | {"entropy": label})
    html = stats._repr_html_()
    page = Page(html)
    assert page.tags <= {"div", "br", "b", "code", "table", "thead", "tbody", "tr", "td", "th", "details", "summary"}
    assert "\x00" not in html
    assert "\x1b" not in html
    assert len(html) < 20_000, "long tokens are cut"
    for shown in (
        "<|im_start|>",
        "␣the",
        "⏎",
        "</script>",
        "··",
        "שלום",
        "🦜",
        "<script>alert(1)</script>",
        "<img src=x",
    ):
        assert shown in page.text
    # The key that receives most is named where it is, as hostile as it may be.
    stats["received"][:] = 0
    stats["received"][:, :, :, TOKENS.index("</script>")] = 1
    assert Page(stats._repr_html_()).tables[0][1][-1] == "4 </script>, 67%"


@pytest.mark.parametrize("statistics", ["topk_weight", "received", "entropy"])
def test_html_of_few_statistics(statistics, ids):
    tables = Page(measure(ids, statistics=statistics, norms=False)._repr_html_()).tables
    assert len(tables) == (1 if statistics == "topk_weight" else 2)
    assert tables[-1][1][0] == statistics


@pytest.mark.parametrize("length", [1, 2])
def test_html_of_very_short_texts(length, ids):
    stats = measure(ids[:, :length]).with_tokens(Tokenizer(), torch.arange(2 * length).view(2, length))
    rows = Page(stats._repr_html_()).tables[0][1:]
    assert [row[-1].split(",")[0] for row in rows] == ["0 <|im_start|>"] * 3


def test_html_of_a_layer_without_data(ids):
    stats = measure(ids)
    for tensor in stats.values.values():
        if tensor.is_floating_point():
            tensor[1] = torch.nan
    rows = Page(stats._repr_html_()).tables[0][1:]
    assert rows[1] == ["1", *["nan"] * 5, "no data"]
    assert "no data" not in rows[0]


MEASURE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import tiny_model
from llama_attn import AttentionStatsConfig, viz
with torch.no_grad():
    parts = [["prompt"] * 8 + ["generated"] * 4]
    config = AttentionStatsConfig(statistics="all", norms=True, rows=(-1,), segments=parts)
    stats = tiny_model()(torch.randint(3, 97, (1, 12)), output_attention_stats=config).attention_stats
"""


def displayed(*cells: str) -> list[dict[str, str]]:
    """What a fresh kernel shows of the last expression of each cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [
        {key: value for output in cell.outputs for key, value in output.get("data", {}).items()}
        for cell in notebook.cells
    ]


def test_a_fresh_kernel_shows_statistics_and_figures():
    calls = [
        f"viz.{name}(stats{', stats' if 'comparison' in name else ''})"
        for name in viz.__all__
        if name.startswith("plot_") and name not in ("plot_ablation", "plot_budget", "plot_image_rows")
    ]
    measured = MEASURE.format(tests=str(Path(__file__).parent))
    _, shown, *figures, pyplot, _, inline = displayed(
        measured, "stats", *calls, '"matplotlib.pyplot" in sys.modules', "%matplotlib inline", calls[0]
    )
    assert shown["text/html"].startswith("<div><b>AttentionStats</b>: 3 layers × 6 heads")
    assert shown["text/plain"].startswith("AttentionStats: 3 layers × 6 heads")
    assert len(figures) == len(calls)
    assert all("image/png" in figure for figure in figures)
    assert pyplot["text/plain"] == "False", "nobody has imported pyplot"
    assert "image/png" in inline, "nor is it in the way where it is used"


class OfLayers(dict):
    """What the table needs of statistics whose layers see different keys, from a cache that has dropped some."""

    tokens = (("a", "b", "c", "d", "e", "f"),)
    visible_queries = torch.tensor([[[6, 5, 4, 3, 2, 1]], [[0, 0, 0, 3, 3, 3]]])
    visible_keys = torch.tensor([[[1, 2, 3, 4, 5, 6]], [[0, 0, 0, 3, 3, 3]]])

    def coordinates(self):
        return {"key": range(10, 16)}


def test_the_strongest_key_of_layers_that_see_different_keys():
    received = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.9, 0.9], [torch.nan, torch.nan, torch.nan, 0.1, 0.2, 0.3]])
    assert _strongest(OfLayers(received=received[:, None, None])) == ["13 d, 45%", "15 f, 30%"]
