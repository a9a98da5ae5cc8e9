"""Small corpora, a model that reads them, and whether two summaries are of the same texts."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_model

from llama_attn import AttentionStatsConfig
from llama_attn.corpus.batches import Reader
from llama_attn.corpus.records import find_files, survey
from llama_attn.corpus.run import Run
from llama_attn.corpus.weights import fingerprint
from llama_attn.stats.table import default_statistics

MORE = ("previous_token", "duplicate_token", "induction", "weight_count", "weight_mass", "effective_keys")
NORMS = ("key_norm", "hidden_norm", "hidden_max", "hidden_max_channel", "hidden_layer_median")
CONFIG = AttentionStatsConfig(statistics=(*default_statistics(), *MORE, *NORMS), offload="cpu", window=5)
LENGTH = 40


class Letters:
    """A token for each letter behind one that begins the text."""

    def __call__(self, text, truncation=False, max_length=None, verbose=True):
        if "§" in text:
            raise RuntimeError("a letter that I do not know")
        ids = [1, *(3 + ord(letter) % 94 for letter in text)]
        return {"input_ids": ids[:max_length] if truncation else ids}

    def convert_ids_to_tokens(self, ids):
        return [f"<{number}>" for number in ids]


def texts(count=70, seed=0) -> list[str]:
    """Random letters, of 1 to 50, some of which come twice."""
    draw = np.random.default_rng(seed)
    made = ["".join(map(chr, draw.integers(97, 123, size=draw.integers(1, 51)))) for _ in range(count)]
    return [*made, *made[:3]]


def write(folder: Path, parts=3, count=70) -> list[str]:
    """A folder of files of JSON lines; what was written, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    made = texts(count)
    for part in range(parts):
        lines = [json.dumps({"text": text}) for text in made[part::parts]]
        (folder / f"part{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def model(dtype=torch.float64):
    # Its activations are scaled so that some of them are massive.
    made = tiny_model("streaming", dtype)
    with torch.no_grad():
        made.model.embed_tokens.weight[5:30, 7] = 3000.0
    return made


def reader(module=None, config=CONFIG, batch_tokens=200, examples=3) -> Reader:
    module = model() if module is None else module
    return Reader(module, Letters(), config, fingerprint(module), LENGTH, batch_tokens, examples)


def run(data, out, every=10, limit=None, **settings) -> Run:
    sources = [survey(name, path, every) for name, path in find_files(data if isinstance(data, list) else [str(data)])]
    return Run(out, reader(**settings), sources, "text", every, limit, {"model": "tiny"})


def measured(data, out, **settings):
    started = run(data, out, **settings)
    started.begin()
    return started.measure(lambda texts, tokens: None)


def assert_same(one, two) -> None:
    """The same texts: counts and examples are equal, means and spreads to 1e-6."""
    assert one.about == two.about
    for name in ("texts", "tokens", "cut", "skipped", "files", "strings"):
        assert getattr(one, name) == getattr(two, name), name
    for name in ("first_key", "roles", "queries"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    for name in ("weight_count", "weight_mass"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-6, atol=1e-12, err_msg=name)
    for name in ("sinks", "massive"):
        for part in ("keys", "counts"):
            np.testing.assert_array_equal(getattr(getattr(one, name), part), getattr(getattr(two, name), part))
    for group in ("by_position", "by_text"):
        for name, moments in getattr(one, group).items():
            other = getattr(two, group)[name]
            for part in ("count", "histogram"):
                np.testing.assert_array_equal(getattr(moments, part), getattr(other, part), err_msg=f"{name} {part}")
            for part in ("mean", "low", "high", "std"):
                np.testing.assert_allclose(
                    getattr(moments, part), getattr(other, part), rtol=1e-6, atol=1e-9, err_msg=f"{name} {part}"
                )
    for kind in ("strongest", "sample"):
        here, there = getattr(one, kind), getattr(two, kind)
        for field in fields(here):
            found, expected = getattr(here, field.name), getattr(there, field.name)
            if found.dtype.kind == "f":
                np.testing.assert_allclose(found, expected, rtol=1e-3 if field.name == "values" else 1e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(found, expected, err_msg=f"{kind} {field.name}")


def highest(values, start):
    """The highest value of those that are shown, that of a text's first token aside, which sees itself alone."""
    return max(values[1:] if start == 0 and len(values) > 1 else values)
