"""Write the gallery, every figure from SmolLM2 on a real text: ``python docs/make_gallery.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from make_analysis import analysis_page
from measured_runs import REPEATED, Runs, measure

from llama_attn import viz

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
IMAGES = DOCS / "images" / "gallery"
# The labels of tokens are readable, and no picture is larger than 200 kB.
DPI = 110
# Token of the answer whose attention is drawn.
ROW = 197
INTRODUCTION = """# Gallery

Every figure, drawn from SmolLM2-135M-Instruct on the opening of *Moby-Dick* but for one, which says so. `text`, `beginning`, `other` and
`repeated` are `AttentionStats`, datasets or saved files: `text` is the opening, `beginning` its first 40 tokens, `other`
the same with `<|im_start|>` in place of the first token, `repeated` the token `<|im_start|>` and a random sequence of
64 tokens, twice. Figures of one pair of axes take `ax=`, and draw there. Grey is "no data": pairs that may not see each
other, padding, layers that were not measured. This page is written by `docs/make_gallery.py`; the questions behind the figures are in [analysis.md](analysis.md).
"""


@dataclass(frozen=True)
class Entry:
    """One figure of the gallery.

    Args:
        name: Name of the function without ``plot_``.
        code: How a user calls it.
        draw: The same call.
        reading: Two sentences on how to read it.
    """

    name: str
    code: str
    draw: Callable[[Runs], Figure]
    reading: str


ENTRIES = (
    Entry(
        "attention_map",
        "plot_attention_map(beginning, layer=16, head=0)",
        lambda runs: viz.plot_attention_map(runs.beginning, layer=16, head=0),
        "Each row is a query and shows where its attention goes, so a row sums to 1. A bright line below the diagonal "
        "is a head that looks at the token before; a bright first column is an attention sink. Colours follow the square "
        'root of the weight, `scale=` takes `"linear"` and `"log"` too.',
    ),
    Entry(
        "layer_heads",
        "plot_layer_heads(text, layer=17)",
        lambda runs: viz.plot_layer_heads(runs.text, layer=17),
        "The maps of all heads of one layer in the same colours, which follow the square root so that weak attention "
        "stays visible. Compare shapes: columns are sinks, diagonals are positional heads, scattered cells are heads "
        "that follow the content.",
    ),
    Entry(
        "model_view",
        "plot_model_view(text)",
        lambda runs: viz.plot_model_view(runs.text),
        "One miniature map per head, layers from top to bottom, pooled exactly to at most 16 × 16 cells. Look for the "
        "layers where the bright first column, the sink, begins and for heads that differ from their neighbours.",
    ),
    Entry(
        "head_grid",
        'plot_head_grid(text, statistic="sink_mass")',
        lambda runs: viz.plot_head_grid(runs.text, statistic="sink_mass"),
        'One number per head: any statistic, averaged over the tokens; of `segment_mass`, `segment="user"`. Here bright heads spend most of their attention '
        "on the first token.",
    ),
    Entry(
        "head_roles",
        f"plot_head_roles(repeated, query_slice=slice({REPEATED + 1}, None))",
        lambda runs: viz.plot_head_roles(runs.repeated, query_slice=slice(REPEATED + 1, None)),
        "The colour is what a head does while the random sequence is read for the second time, the number its score in "
        "hundredths. Induction heads (green) need previous-token heads (dark orange) in some earlier layer.",
    ),
    Entry(
        "ablation",
        "plot_ablation(ablation)",
        lambda runs: viz.plot_ablation(runs.ablation),
        "How much worse the next token is predicted without each head: red heads are missed, blue ones were in the way of "
        "this text. `ablation` is the table that `llama-attn ablate` writes, here of six layers and the first 40 tokens; on "
        "so short a text small changes mean little.",
    ),
    Entry(
        "layer_profile",
        'plot_layer_profile(text, statistic="entropy")',
        lambda runs: viz.plot_layer_profile(runs.text, statistic="entropy"),
        "The line is the mean over heads, the dark band one standard deviation, the light one the smallest and largest "
        "head. Low entropy is attention on few tokens; a wide band is a layer whose heads do different things.",
    ),
    Entry(
        "distance_histogram",
        "plot_distance_histogram(text, layer=11)",
        lambda runs: viz.plot_distance_histogram(runs.text, layer=11),
        "Bars show how much attention goes how far, in bins that double, and sum to 1; thin lines are the single heads. "
        "Dashes are what a head would show that attends equally to all that it sees. Weight above them on the left is local "
        "attention, weight on the right global or on the sink.",
    ),
    Entry(
        "token_strip",
        "plot_token_strip(text, layer=15)",
        lambda runs: viz.plot_token_strip(runs.text, layer=15),
        "Statistics along the text, token by token: what each token receives, what it gives to the sink, and the norms "
        "of its states. Marks are sinks. The first token stands out three times: it receives most, its state is huge, its key and value are "
        "small.",
    ),
    Entry(
        "image_rows",
        "plot_image_rows(pictured.stats, pictured.image, pictured.segments, head=0)",
        lambda runs: viz.plot_image_rows(runs.pictured.stats, runs.pictured.image, runs.pictured.segments, head=0),
        "A picture of the prompt, under the attention that one token pays to each of its tokens; the title says how much all "
        "of them get. `segments` are what `image_segments` says of the prompt, and `rows=(-1,)` has the weights of its last "
        "token measured. The model here is a tiny random Gemma 3, one of which a head prefers what is bright; see "
        "[any_model.md](any_model.md#images-in-prompts).",
    ),
    Entry(
        "rows",
        f"plot_rows(answer, row={ROW}, sink=False)",
        lambda runs: viz.plot_rows(runs.answer, row=ROW, sink=False),
        "The text shaded by the attention of one token, here of the answer, on average over layers and heads and without "
        "the first token, which would take all the colour. `answer` is a run of `generate` over three documents and a "
        'question, with `segments` and `rows="generated"`; the query has a frame. Of a long text the attended places are '
        "written, and what lies between is counted.",
    ),
    Entry(
        "sources",
        "plot_sources(answer)",
        lambda runs: viz.plot_sources(runs.answer),
        "How much of the attention goes to each segment while each token of the answer is written. Compare the mean with "
        "uniform attention: long documents get much of it just by being long, and the tokens just written get far more "
        "than their number explains.",
    ),
    Entry(
        "coverage",
        "plot_coverage(text)",
        lambda runs: viz.plot_coverage(runs.text),
        "How many keys per query hold half of the attention, and nearly all of it: the band between exact bounds, which "
        "often is as thin as the line. Dashes are uniform attention over the same keys; a line far below them is a layer "
        "whose attention is sparse.",
    ),
    Entry(
        "massive_activations",
        "plot_massive_activations(text)",
        lambda runs: viz.plot_massive_activations(runs.text),
        "Left, the largest number of each token's state, layer by layer, marked where it is a massive activation; "
        "right, the largest and the median of each layer with the bound between. Massive activations appear within one "
        "layer, stay on the same token and channels, and vanish before the output.",
    ),
    Entry(
        "hidden_norms",
        "plot_hidden_norms(text, layer=15)",
        lambda runs: viz.plot_hidden_norms(runs.text, layer=15),
        "The length of the state of each token that enters the layer; the axis is logarithmic where one token towers "
        "over the others. A spike is a token with massive activations.",
    ),
    Entry(
        "kv_norms",
        "plot_kv_norms(text, layer=15)",
        lambda runs: viz.plot_kv_norms(runs.text, layer=15),
        "Solid lines are the mean over heads of the norms, dashed lines the norm of the mean over heads, which is "
        "smaller where heads point in different directions. Tokens with small keys and values are sinks or easy to "
        "drop from a cache.",
    ),
    Entry(
        "budget",
        "plot_budget(frame)",
        lambda runs: viz.plot_budget(runs.budget),
        "What `llama-attn budget` writes. Left, how much of the attention of the tokens that follow lies on the keys that a "
        "policy kept; right, the loss of the model when it sees only these; below, the left one layer by layer. Curves that "
        "meet the dashes cost nothing.",
    ),
    Entry(
        "comparison",
        "plot_comparison(beginning, other, layer=12, head=2)",
        lambda runs: viz.plot_comparison(runs.beginning, runs.other_start, layer=12, head=2),
        "The second map minus the first: red where the second run attends more, blue where the first does. White is no "
        "difference, and both ends of the scale are equally far from it.",
    ),
    Entry(
        "head_comparison",
        'plot_head_comparison(beginning, other, statistic="sink_mass")',
        lambda runs: viz.plot_head_comparison(runs.beginning, runs.other_start, statistic="sink_mass"),
        "In which heads a statistic differs between two runs, averaged over the tokens that both texts have. It works "
        "for texts of different length too, since tokens are aligned.",
    ),
)


def gallery_page() -> str:
    """The page; its figures are drawn by `main`."""
    sections = [
        f"## {entry.name.replace('_', ' ').capitalize()}\n\n"
        f"![{entry.name.replace('_', ' ')}](images/gallery/{entry.name}.png)\n\n"
        f"```python\nviz.{entry.code}\n```\n\n{entry.reading}\n"
        for entry in ENTRIES
    ]
    return "\n".join([INTRODUCTION, *sections])


def main() -> None:
    """Measure, draw every figure, write both pages."""
    runs = measure()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for entry in ENTRIES:
        entry.draw(runs).savefig(IMAGES / f"{entry.name}.png", dpi=DPI, pil_kwargs={"optimize": True})
    (DOCS / "gallery.md").write_text(gallery_page())
    (DOCS / "analysis.md").write_text(analysis_page(runs))


if __name__ == "__main__":
    main()
