"""Write the table of model types, from the models that the tests run and the code's own list: ``python docs/make_models.py``."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from llama_attn.backends._streaming import NOT_SERVED

ROOT = Path(__file__).parent.parent
INTRODUCTION = """# Models

`llama_attn.record` serves every model of transformers whose attention goes through its attention interface. Below is
what is run in the tests: tiny random models of {types} types. Every statistic is compared with its definition in float64, on
the queries, keys, masks, soft-caps, biases and learned sinks that the model really used; outputs with `record` are
bit-identical to those without. All of it is run by `make long`, every type on every backend in some of its situations by
every run of the tests. This page is written by `docs/make_models.py` from `tests/zoo.py` and the list of refused
models in `llama_attn/backends/_streaming.py`.

Stacks are named as in `recording.stacks`, with # for numbers; the first is what `record` takes by default, except where
none is. The backends are those of transformers on which the type runs without a GPU, and `streaming`.

Situations: *plain*, *left* and *right* padding, *packed* documents, *cached* (8 tokens, then 1, 1, 3 and 1 more, past full
windows; *one*: one at a time), *static* cache, *chunked* prefill, *generated* (greedy, left padding).
"""
FAMILIES = {
    "decoder": "Decoders", "hybrid": "Decoders with layers that have no attention", "encoder": "Encoders",
    "vision": "Images", "audio": "Sound", "pair": "Encoder and decoder", "joint": "Images and text",
}  # fmt: skip
NO_DEFAULT = ("siglip",)
UNSERVED = {
    "own": "its attention does not go through the interface, so there is nothing to observe",
    "pieces": "called once per image or window, with no attention of a layer: refused",
}


def zoo() -> Any:
    """The models of the tests."""
    if (folder := str(ROOT / "tests")) not in sys.path:
        sys.path.insert(0, folder)
    import zoo as models

    return models


def _situation(name: str) -> str:
    return {"cached_left": "cached with left", "cached_one": "cached one"}.get(name, name)


def _row(entry: Any) -> str:
    stacks = [
        f"`{stack.path}` ({stack.direction})" + (f", {UNSERVED['pieces']}" if stack.axis == "pieces" else "")
        for stack in entry.stacks
    ]
    if entry.name in NO_DEFAULT:
        stacks.insert(0, "no default")
    backends = [*entry.stock, *(() if entry.name in NOT_SERVED else ("streaming",))]
    situations = ", ".join(_situation(name) for name in entry.situations)
    return f"| {entry.name} | {'<br>'.join(stacks)} | {', '.join(backends)} | {situations} |"


def models_page() -> str:
    """The page that lists every type that is tested, and what is refused and why."""
    models = zoo()
    lines = [INTRODUCTION.format(types=len(models.ENTRIES))]
    for family, title in FAMILIES.items():
        lines += [f"## {title}", "", "| type | stacks | backends | situations |", "|---|---|---|---|"]
        lines += [_row(entry) for entry in models.ENTRIES.values() if entry.family == family]
        lines.append("")
    lines += [
        "## Refused by `record`", "",
        f"A ValueError when the block begins or ends: {UNSERVED['own']}. Among them are",
        ", ".join(sorted(models.NOT_SERVED)) + ".", "",
        "Also refused, in these words: continuous batching (`generate_batch`), whose keys are in a paged cache; layers that say",
        "who sees whom in ways that are not known; a layer that is called several times in one forward, such as the vision",
        "towers of the Qwen models, once per image; layers of different numbers of rows, as the stages of a Swin have (choose",
        "those of one stage with `layers=`).", "",
        "## Refused by `streaming`", "",
        "When the model is loaded or its backend is set, with the reason; `record` serves them on eager and sdpa.", "",
        "| type | why |", "|---|---|",
    ]  # fmt: skip
    for reason, names in groupby(sorted(NOT_SERVED, key=lambda name: (NOT_SERVED[name], name)), key=NOT_SERVED.get):
        lines.append(f"| {', '.join(names)} | {reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "models.md").write_text(models_page())
