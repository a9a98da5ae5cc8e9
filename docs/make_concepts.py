"""Draw the figures of docs/concepts and take the numbers that its pages say: ``python docs/make_concepts.py``."""

from __future__ import annotations

import copy
import io
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray
from matplotlib.patches import Rectangle
from measured_runs import REPEATED, TEXT, load
from PIL import Image
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_attn import AttentionStats, AttentionStatsConfig, block_keys
from llama_attn.analysis import classify_heads, head_means, locality, massive_activations, sink_positions, sink_rate
from llama_attn.stats.token_text import readable
from llama_attn.viz import (
    plot_attention_map,
    plot_distance_histogram,
    plot_head_grid,
    plot_head_roles,
    plot_layer_profile,
)
from llama_attn.viz.style import BLUE, GREEN, ORANGE, PINK, empty_figure, heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
IMAGES = DOCS / "images" / "concepts"
# What the pages say, checked against them by the tests.
SAID = DOCS / "concepts" / "measured.json"
DPI = 110
# Half a page, and one that stands by itself.
WIDE, SQUARE = (9.0, 3.6), (6.5, 4.5)
# So many tokens fit as labels of a map, three of which stand beside each other.
BEGINNING = 16
# Heads of one layer that do different things: (layer, heads).
DIFFERENT = (16, (0, 2, 5))
# By how much all positions are moved.
MOVED = 1_000
# A layer that looks nearby and one that does not, and distances that are far [token].
NEAR, FAR, FAR_AWAY = 11, 20, (63, 126)
# Tokens at the start of a text that a window leaves visible, and windows [token].
SINK, WINDOWS = 4, (4, 8, 16, 32, 64, 128)

Drawn = tuple["Figure", dict[str, str]]


class Runs:
    """SmolLM2 and what was measured of it on `measured_runs.TEXT`."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load()
        self.ids = self.tokenizer(TEXT, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def measure(self, ids: torch.Tensor, **inputs: object) -> AttentionStats:
        """Every statistic; maps have one cell per pair of tokens."""
        config = AttentionStatsConfig(statistics="all", norms=True, map_size=256)
        stats: AttentionStats = self.model(ids, output_attention_stats=config, **inputs).attention_stats
        return stats.with_tokens(self.tokenizer, ids)

    @cached_property
    def stats(self) -> AttentionStats:
        """Of the text."""
        return self.measure(self.ids)

    @cached_property
    def text(self) -> xarray.Dataset:
        """The same, of the only row."""
        return self.stats.to_xarray().isel(batch=0)

    @cached_property
    def weights(self) -> np.ndarray:
        """(layer, head, query, key)."""
        return np.nan_to_num(self.text.weights_map.values)

    @torch.no_grad()
    def loss(self, visible: torch.Tensor | None = None) -> float:
        """Mean loss of the next token [nat], where each query sees (batch, query, key)."""
        if visible is None:
            return float(self.model(self.ids, labels=self.ids).loss)
        with block_keys(self.model, visible):
            return float(self.model(self.ids, labels=self.ids).loss)


def multi_head_attention(runs: Runs) -> Drawn:
    """Three heads of one layer on the same tokens."""
    layer, heads = DIFFERENT
    beginning = runs.measure(runs.ids[:, :BEGINNING])
    figure = empty_figure((11.0, 3.6))
    for head, axes in zip(heads, figure.subplots(1, len(heads)), strict=True):
        plot_attention_map(beginning, layer=layer, head=head, ax=axes)
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
    entropy = head_means(runs.text, "entropy").sel(layer=layer)
    return figure, {"entropies": f"{float(entropy.min()):.2f} to {float(entropy.max()):.2f} nat"}


def rope(runs: Runs) -> Drawn:
    """Wavelengths of the pairs of channels under each scaling, and the scores of two heads by distance."""
    figure = empty_figure(WIDE)
    left, right = figure.subplots(1, 2)
    factors = {}
    for (name, scaling), colour in zip(SCALINGS.items(), (BLUE, ORANGE, GREEN, PINK), strict=True):
        config = copy.deepcopy(runs.model.config)
        config.rope_parameters = {**config.rope_parameters, **scaling}
        frequencies, factors[name] = rope_frequencies(config)
        left.semilogy(2 * np.pi / frequencies, color=colour, label=name)
    left.axhline(runs.model.config.max_position_embeddings, color="grey", linestyle="--", linewidth=0.8)
    left.set(xlabel="pair of channels", ylabel="wavelength [token]")
    left.legend(fontsize=8, frameon=False)
    scores = runs.text.logits_map.values
    for (layer, head), colour in (((16, 0), BLUE), ((17, 3), ORANGE)):
        by_distance = [np.nanmean(scores[layer, head].diagonal(-distance)[1:]) for distance in range(64)]
        right.plot(by_distance, color=colour, label=f"layer {layer}, head {head}")
    right.set(xlabel="distance [token]", ylabel="mean score [logit]")
    right.legend(fontsize=8, frameon=False)
    moved = runs.measure(runs.ids, position_ids=torch.arange(runs.ids.shape[1])[None] + MOVED)
    change = np.abs(np.nan_to_num(moved.to_xarray().weights_map.isel(batch=0).values) - runs.weights).max()
    wavelength = 2 * np.pi / runs.model.model.rotary_emb.inv_freq
    (scaled,) = (name for name, factor in factors.items() if factor != 1)
    return figure, {
        "a factor besides": f"*{scaled.partition(',')[0]}* also multiplies cosines and sines by {factors[scaled]:.3f}",
        "its square": f"all scores by {factors[scaled] ** 2:.3f}",
        "a shift changes weights by": f"{float(change):.0e}",
        "wavelengths": f"{float(wavelength[0]):.1f} to {float(wavelength[-1]):,.0f} tokens",
    }


SCALINGS = {
    "default": {"rope_type": "default"},
    "linear, 4": {"rope_type": "linear", "factor": 4.0},
    "yarn, 4": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    "llama3, 4": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def rope_frequencies(config) -> tuple[np.ndarray, float]:
    """Angle per token of each pair of channels, as transformers has it, and the factor on cosines and sines."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        width = config.hidden_size // config.num_attention_heads
        return config.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return frequencies.numpy(), factor


@torch.no_grad()
def kv_caching(runs: Runs) -> Drawn:
    """What lies in the cache: the length of each token's values, layer by layer."""
    half = runs.ids.shape[1] // 2
    whole = runs.model(runs.ids, use_cache=False).logits
    outputs = runs.model(runs.ids[:, :half], use_cache=True)
    cached = [outputs.logits]
    for at in range(half, runs.ids.shape[1]):
        outputs = runs.model(runs.ids[:, at : at + 1], past_key_values=outputs.past_key_values, use_cache=True)
        cached.append(outputs.logits)
    difference = float((torch.cat(cached, 1) - whole).abs().max())
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in outputs.past_key_values.layers)
    figure = empty_figure((9.0, 4.0))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name in ((left, "key"), (right, "value")):
        norms = np.log10(runs.text[f"{name}_norm"].mean("kv_head").values)
        figure.colorbar(heat_map(axes, norms), ax=axes, label=f"log10 of the {name}'s norm")
        axes.set(xlabel="token", title=f"{name}s in the cache")
    left.set_ylabel("layer")
    values = runs.text.value_norm.mean("kv_head").values
    short = np.flatnonzero((values[4:10] < values[4:10].mean(-1, keepdims=True) / 2).all(0))
    sinks = sink_positions(runs.stats).isel(batch=0, key=short)
    boost = sinks.boost.isel(layer=slice(4, 10)).mean(["layer", "head"]).values
    *first, last = map(str, short[sinks.layer_sink.any("layer").values])
    return figure, {
        "short in layers 4 to 9": ", ".join(f"`{readable(runs.stats.tokens[0][at])}` at {at}" for at in short),
        "sinks among them": f"at {', '.join(first)} and {last}, are",
        "their attention": f"{boost.min():.1f} to {boost.max():.0f} times",
        "logits with a cache": f"{difference:.0e}",
        "bytes per token": f"{held / runs.ids.shape[1] / 1024:.0f} KiB",
        "value of the first token": f"{values[:, 0].mean() / values[:, 1:].mean():.2f} times",
    }


def grouped_query_attention(runs: Runs) -> Drawn:
    """How differently two heads attend: half the sum of |A − B|, the mean over queries and layers."""
    heads = runs.weights.shape[1]
    pairs = np.abs(runs.weights[:, :, None] - runs.weights[:, None]).sum(-1).mean((0, -1)) / 2
    group = heads // runs.model.config.num_key_value_heads
    of_group = np.arange(heads) // group
    same = (of_group[:, None] == of_group) & ~np.eye(heads, dtype=bool)
    other = of_group[:, None] != of_group
    figure = empty_figure((5.4, 4.4))
    axes = figure.subplots()
    cells = np.where(np.eye(heads, dtype=bool), np.nan, pairs)
    figure.colorbar(heat_map(axes, cells, aspect="equal"), ax=axes, label="total variation distance")
    for first in range(0, heads, group):
        corner = (first - 0.5, first - 0.5)
        axes.add_patch(Rectangle(corner, group, group, fill=False, edgecolor=ORANGE, linewidth=2))
    axes.set(xlabel="query head", ylabel="query head", xticks=range(heads), yticks=range(heads))
    return figure, {
        "heads of one group": f"{pairs[same].mean():.2f}",
        "heads of different groups": f"{pairs[other].mean():.2f}",
    }


def attention_sinks(runs: Runs) -> Drawn:
    """Where heads rest, and what happens if they cannot."""
    rate = sink_rate(runs.stats)
    share = sink_positions(runs.stats).share.isel(batch=0, key=0).mean()
    causal = torch.ones(runs.ids.shape[1], runs.ids.shape[1], dtype=torch.bool).tril()
    causal[1:, 0] = False
    with block_keys(runs.model, causal[None]):
        then = sink_positions(runs.measure(runs.ids)).share.isel(batch=0).mean(["layer", "head"])
    heir = int(then.values.argmax())
    massive = massive_activations(runs.stats).isel(batch=0)
    (token,) = np.flatnonzero(massive.massive.any("hidden_layer"))
    of_it = massive.isel(query=token)
    before = of_it.ratio[3:10].values
    return plot_head_grid(runs.stats, statistic="sink_mass"), {
        "sink rate": f"{float(rate):.2f}",
        "share of the first token": f"{float(share):.0%}",
        "its heir": f"`{readable(runs.stats.tokens[0][heir])}`, takes {float(then[heir]):.0%}",
        "massive": f"layer {int(of_it.appears)} to {int(of_it.disappears) - 1} the state of token {token}",
        "most": f"{float(of_it.ratio.max()):,.0f} times",
        "in layers 3 to 9": f"{before.min():.0f} to {before.max():.0f} times",
        "loss": f"{runs.loss():.2f} nat",
        "loss without the first token": f"{runs.loss(causal[None]):.2f} nat",
    }


def local_and_global(runs: Runs) -> Drawn:
    """One layer that looks nearby, and one that does not."""
    reach = locality(runs.stats).isel(batch=0)
    figure = empty_figure(WIDE)
    for layer, axes in zip((NEAR, FAR), figure.subplots(1, 2, sharey=True), strict=True):
        plot_distance_histogram(runs.stats, layer=layer, ax=axes)
        axes.set_title(f"layer {layer}", fontsize=9)
    local = (reach.reach == "local").sum("head")
    queries = torch.arange(runs.ids.shape[1])
    distance = queries[:, None] - queries
    far = ((distance >= FAR_AWAY[0]) & (distance <= FAR_AWAY[1])).numpy()
    uniform, layer = far / (queries[:, None].numpy() + 1), (far * runs.weights[FAR]).mean(0)
    return figure, {
        "far away": f"{layer.sum(-1).mean():.3f} of its attention, where uniform attention has "
        f"{uniform.sum(-1).mean():.3f}",
        "on the first token": f"{layer[:, 0].mean():.3f} of that is on the first token",
        "without it": f"{layer[:, 1:].sum(-1).mean():.3f} is left, against {uniform[:, 1:].sum(-1).mean():.3f}",
        "local heads": f"{int(local.sum())} of {reach.reach.size}",
        "layers that have any": f"{int((local > 0).sum())} of {local.size}",
    }


def layer_wise_evolution(runs: Runs) -> Drawn:
    """Entropy and sink mass from the first layer to the last."""
    figure = empty_figure(WIDE)
    said = {}
    left, right = figure.subplots(1, 2)
    for name, axes in (("entropy", left), ("sink_mass", right)):
        plot_layer_profile(runs.stats, statistic=name, ax=axes)
        axes.set_title(name, fontsize=9)
        mean = head_means(runs.text, name).mean("head")
        for word, at in (("least", int(mean.values.argmin())), ("most", int(mean.values.argmax()))):
            said[f"{word} {name}"] = f"{float(mean[at]):.2f} in layer {at}"
    # It is the same as that on the left, and would hide the bands.
    right.get_legend().remove()
    return figure, said


def head_specialisation(runs: Runs) -> Drawn:
    """Roles while a random sequence is read for the second time."""
    half = torch.randint(100, 48_000, (1, REPEATED), generator=torch.Generator().manual_seed(0))
    repeated = runs.measure(torch.cat([torch.tensor([[runs.tokenizer.bos_token_id]]), half, half], 1))
    second = slice(REPEATED + 1, None)
    roles = classify_heads(repeated, second).role.value_counts()
    return plot_head_roles(repeated, query_slice=second), {
        role: f"{roles[role]} {name}"
        for role, name in (
            ("first_token_sink", "rest on the first token"),
            ("previous_token", "look at the token before"),
            ("induction", "are induction heads"),
        )
    }


def sliding_windows(runs: Runs) -> Drawn:
    """The loss if each query sees what is near, with and without the first tokens."""
    length = runs.ids.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    near = {window: (distance >= 0) & (distance < window) for window in WINDOWS}
    first = (distance >= 0) & (torch.arange(length) < SINK)
    plain = [runs.loss(seen[None]) for seen in near.values()]
    kept = [runs.loss((seen | first)[None]) for seen in near.values()]
    full = runs.loss()
    figure = empty_figure(SQUARE)
    axes = figure.subplots()
    axes.plot(WINDOWS, plain, "o-", color=ORANGE, label="window")
    axes.plot(WINDOWS, kept, "o-", color=BLUE, label=f"window and the first {SINK} tokens")
    axes.axhline(full, color="grey", linestyle="--", label="everything")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="window [token]", ylabel="loss [nat]", xticks=WINDOWS, xticklabels=WINDOWS)
    axes.legend(frameon=False)
    at, twice = WINDOWS.index(32), WINDOWS.index(64)
    return figure, {
        "everything": f"{full:.2f} nat",
        "64 tokens": f"{plain[twice]:.2f} nat",
        "32 tokens": f"{plain[at]:.2f} nat",
        "32 tokens and the first four": f"{kept[at]:.2f} nat",
    }


# Engines by the names that the page gives them, and those of the benchmarks.
ENGINES = {
    "streaming, C++ engine": "streaming (native), statistics",
    "streaming, PyTorch engine": "streaming_torch, statistics",
    "sdpa": "sdpa, statistics",
}


def timed() -> tuple[dict[str, float], dict[str, float]]:
    """Time of a forward with statistics over that of sdpa without, and memory [MiB], as the benchmarks measured them."""
    rows = [row for entry in json.loads((DOCS / "benchmarks.json").read_text()).values() for row in entry["rows"]]
    shape = "SmolLM2, float32, T 4,096"
    named = {row["case"]: row for row in rows if row["shape"] == shape and "stock sdpa" in row["baseline"]}
    ratios = {engine: named[case]["value"] / named[case]["baseline_value"] for engine, case in ENGINES.items()}
    (eager,) = (row for row in rows if row["shape"] == "30 layers, T 2,048" and "eager" in row["baseline"])
    return ratios, {"eager, all weights": eager["baseline_value"], "streaming, statistics": eager["value"]}


def said_of_backends() -> dict[str, str]:
    """What the page says of these."""
    ratios, memory = timed()
    return {engine: f"| {ratio:.2f}" for engine, ratio in ratios.items()} | {
        name: f"{mebibytes:,.0f} MiB" for name, mebibytes in memory.items()
    }


def backends(_: Runs) -> Drawn:
    """Time and memory of the same forward, from what the benchmarks measured."""
    ratios, memory = timed()
    figure = empty_figure(WIDE)
    left, right = figure.subplots(1, 2)
    left.barh(["sdpa, no statistics", *ratios], [1, *ratios.values()], color=["grey", BLUE, BLUE, BLUE])
    left.invert_yaxis()
    left.set(xlabel="time of a forward of 4,096 tokens with\nstatistics, over that of sdpa without")
    right.barh(list(memory), list(memory.values()), color=[ORANGE, BLUE])
    right.invert_yaxis()
    right.set(xlabel="peak memory of a forward\nof 2,048 tokens [MiB]")
    return figure, said_of_backends()


CONCEPTS = (
    multi_head_attention, rope, kv_caching, grouped_query_attention, attention_sinks, local_and_global,
    layer_wise_evolution, head_specialisation, sliding_windows, backends,
)  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Write a picture of 256 colours, a third as large."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    """Draw every figure and write down what was measured."""
    runs, said = Runs(), {}
    IMAGES.mkdir(parents=True, exist_ok=True)
    for draw in CONCEPTS:
        figure, said[draw.__name__] = draw(runs)
        save(figure, IMAGES / f"{draw.__name__}.png")
    SAID.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
