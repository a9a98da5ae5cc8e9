"""Sinks, massive channels, roles and coverage of SmolLM2-135M over a corpus; writes docs/experiments/sinks_over_texts.md.

``python docs/experiments/sinks_over_texts.py FOLDER``: runs that are finished in FOLDER are not measured again. The texts
are the documentation of Python's standard library as ``pydoc`` prints it, cut into pieces; the page names the version
of Python and the hash of the texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import platform
import pydoc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
from matplotlib.figure import Figure

from llama_attn.corpus import CorpusSummary
from llama_attn.demo import HUB_ID, demo_checkpoint
from llama_attn.stats.files import complete_file
from llama_attn.viz.corpus.numbers import keys_held
from llama_attn.viz.style import BLUE, GREEN, ORANGE

DOCS = Path(__file__).parent
PAGE, PICTURE = DOCS / "sinks_over_texts.md", DOCS / "sinks_over_texts.png"
# Gu et al. take 100 texts of 64 tokens.
SHORT, TEXTS, LONG, LONG_TEXTS = 64, 1200, 2048, 24
BOS = "<|im_start|>"
STATISTICS = (
    "previous_token,duplicate_token,induction,weight_count,weight_mass,hidden_max,hidden_max_channel,"
    "hidden_layer_median"
)
# Modules whose import does something, or that only some systems have.
LEFT_OUT = {"antigravity", "this", "idlelib", "turtledemo", "msilib", "winreg", "winsound"}


def documentation() -> list[str]:
    """What ``pydoc`` prints of each module of the standard library."""
    found = []
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        if name.startswith("_"):
            continue
        with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module(name)
            # Where the module lies says something of the machine, and not of the text.
            found.append(pydoc.plaintext.document(module, name).partition("\nFILE\n")[0])
    return found


def write(path: Path, pieces: list[str], first: str = "") -> str:
    """JSON lines of texts, and their hash."""
    lines = "".join(json.dumps({"text": first + piece}) + "\n" for piece in pieces)
    path.write_text(lines, encoding="utf-8")
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def measure(data: Path, out: Path, tokens: int) -> CorpusSummary:
    """What ``llama-attn corpus`` says of the texts."""
    checkpoint = demo_checkpoint()
    command = [
        sys.executable, "-m", "llama_attn.corpus", checkpoint.name, data, "--gguf-file", checkpoint.gguf_file,
        "--dtype", "float32", "--max-tokens", tokens, "--statistics", STATISTICS, "--out", out,
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)  # noqa: S603
    return CorpusSummary.load(out / "summary.safetensors")


def interval(rate: float, texts: int) -> float:
    """Half of the 95 % interval of a share of texts, by the normal distribution."""
    return 1.96 * float(np.sqrt(rate * (1 - rate) / texts))


def draw(plain: CorpusSummary, begun: CorpusSummary, long: CorpusSummary) -> None:
    """Sink rate by layer for both beginnings, and keys needed for 95 % by layer."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for summary, name, colour in ((plain, "text as it is", BLUE), (begun, f"{BOS} first", ORANGE)):
        left.plot(
            summary.about.layers, summary.to_xarray().sink_rate.mean("head"), "o-", ms=3, color=colour, label=name
        )
    left.set(
        xlabel="layer",
        ylabel="sink rate of the first token",
        ylim=(0, 1),
        title=f"{plain.texts:,} texts, T = {SHORT}, ε = 0.3",
    )
    left.legend(frameon=False)
    for summary, name, colour in ((plain, f"T = {SHORT}", BLUE), (long, f"T = {LONG:,}", GREEN)):
        low, high = np.nanmean(keys_held(summary), -1)
        right.fill_between(summary.about.layers, low, high, color=colour, alpha=0.4)
        right.plot(summary.about.layers, (low + high) / 2, "o-", ms=3, color=colour, label=name)
    right.set(
        xlabel="layer",
        ylabel="keys per query",
        yscale="log",
        title="keys that hold 95 % of the attention, mean over heads",
    )
    right.legend(frameon=False)
    with complete_file(PICTURE) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


def table(frame: pandas.DataFrame) -> str:
    """A table in Markdown."""
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(plain: CorpusSummary, begun: CorpusSummary, long: CorpusSummary, hashes: dict[str, str]) -> str:
    """Everything in words and tables."""
    runs = {f"{SHORT} tokens": plain, f"{SHORT} tokens behind `{BOS}`": begun, f"{LONG:,} tokens": long}
    lines = []
    for name, summary in runs.items():
        ds = summary.to_xarray()
        rate, by_layer = float(ds.sink_rate.mean()), ds.sink_rate.mean("head")
        lines.append(
            {
                "texts": f"{summary.texts:,} of {name}",
                "sink rate": f"{100 * rate:.1f} %",
                "strongest layer": f"{int(by_layer.idxmax())}: {100 * float(by_layer.max()):.1f} %",
                "heads above 90 %": int((ds.sink_rate > 0.9).sum()),
                "heads below 10 %": int((ds.sink_rate < 0.1).sum()),
                "mass on the first token": f"{float(ds.sink_mass_text_mean.mean()):.3f}",
            }
        )
    roles = {name: summary.to_pandas().role.value_counts().rename(name) for name, summary in runs.items()}
    counted = (
        pandas.concat(roles.values(), axis=1).fillna(0).astype(int).sort_values(next(iter(roles)), ascending=False)
    )
    counted.index = counted.index.str.replace("_", " ")
    massive = []
    for name, summary in runs.items():
        channels: dict[int, tuple[list[int], int, int]] = {}
        for (layer, channel), (tokens, holding) in zip(summary.massive.keys, summary.massive.counts, strict=True):
            layers, most, texts = channels.get(int(channel), ([], 0, 0))
            channels[int(channel)] = ([*layers, int(layer)], max(most, int(tokens)), max(texts, int(holding)))
        for channel, (layers, tokens, texts) in sorted(channels.items(), key=lambda item: -item[1][2])[:4]:
            massive.append(
                {
                    "texts": name,
                    "channel": channel,
                    "enters layers": f"{min(layers)}–{max(layers)}",
                    "texts that have it": f"{texts:,} of {summary.texts:,}",
                    "tokens": f"{tokens:,}",
                }
            )
    keys = []
    for name, summary in runs.items():
        low, high = np.nanmean(keys_held(summary), -1)
        few, many = int(np.argmin(high)), int(np.argmax(low))
        keys.append(
            {
                "texts": name,
                "mean over layers": f"{low.mean():.1f}–{high.mean():.1f}",
                "fewest": f"layer {few}: {low[few]:.1f}–{high[few]:.1f}",
                "most": f"layer {many}: {low[many]:.1f}–{high[many]:.1f}",
            }
        )
    rate = float(plain.to_xarray().sink_rate.mean())
    files = ", ".join(f"`{name}` {digest}" for name, digest in hashes.items())
    return f"""# Sinks over texts

Written by `docs/experiments/sinks_over_texts.py`, which measures {HUB_ID} in float32 with `llama-attn corpus`; every number
below comes from its summaries. The texts are the documentation of the standard library of Python {platform.python_version()} as `pydoc`
prints it (SHA-256: {files}).

## Sink rate

The share of heads and texts in which the first token receives more than ε = 0.3 of the attention of those who see it, as
Gu et al. (arXiv 2410.10781) define it for texts of T = 64. Of a single head and text it is 0 or 1; over {plain.texts:,} texts the
mean of one head is known to ± {100 * interval(0.5, plain.texts):.1f} points or better.

{table(pandas.DataFrame(lines))}

SmolLM2 reads a text without a token that begins it. With `{BOS}`, which begins every chat, in front, the rate is
{100 * float(begun.to_xarray().sink_rate.mean()):.1f} % in place of {100 * rate:.1f} %.

![sink rate and coverage by layer](sinks_over_texts.png)

## Massive channels

Activations above 100 and 1,000 × the median of the state (Sun et al., arXiv 2402.17762); of each token its largest one.

{table(pandas.DataFrame(massive)) if massive else "None."}

## Head roles

The role that each head has in most texts (see [analysis.md](../analysis.md)).

{table(counted.rename_axis("role").reset_index())}

## Keys that hold 95 % of the attention

Bounds from the histogram of weights, per query, mean over the heads of a layer.

{table(pandas.DataFrame(keys))}
"""


def main(folder: Path) -> None:
    """Measure and write the page."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = documentation()
    pieces = [text[at : at + 1000] for text in modules for at in range(0, len(text) - 999, 1000)]
    # Spread over all modules; every piece has more than 64 tokens.
    short = pieces[:: len(pieces) // TEXTS][:TEXTS]
    long = [text for text in modules if len(text) > 12 * LONG]
    long = long[:: max(1, len(long) // LONG_TEXTS)][:LONG_TEXTS]
    hashes = {
        "short": write(folder / "short.jsonl", short), "long": write(folder / "long.jsonl", long),
    }  # fmt: skip
    write(folder / "begun.jsonl", short, BOS)
    plain = measure(folder / "short.jsonl", folder / "short", SHORT)
    begun = measure(folder / "begun.jsonl", folder / "begun", SHORT + 1)
    far = measure(folder / "long.jsonl", folder / "long", LONG)
    draw(plain, begun, far)
    with complete_file(PAGE) as unfinished:
        unfinished.write_text(page(plain, begun, far, hashes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
