"""Measure the error of every statistic against float64 and write the table: ``python docs/make_error_budget.py``.

The inputs are queries and keys of SmolLM2-135M-Instruct on the demo chat, captured after RoPE, cast to each dtype
and measured; the textbook forms see the same numbers in float64.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from llama_attn import AttentionStatsConfig, LlamaForCausalLM
from llama_attn.demo import SYSTEM, USER, demo_checkpoint
from llama_attn.engines import _library as library, get_engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.counts import Counts
from llama_attn.stats.labelling import mark_padding
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import wanted_statistics
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import relative_error

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
ENGINES = ("torch", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTRODUCTION = """# Error budget

Largest |a − b| / (1 + |b|) of each statistic against its textbook definition in float64, over all layers and heads of
SmolLM2-135M-Instruct on the demo chat, with queries and keys rounded to the dtype of the column. Half precision inputs
are exact in float32, in which the engines work. The tests allow 1e-5 for models in float32 and 1e-10 for float64.
What the engine `native` does not know is measured by `torch`. Written by `docs/make_error_budget.py`
(torch {torch}, CPU).

"""
LIBRARIES = """
## Each library of the native engine

The largest of these errors over all statistics that `native` knows, with each library that a wheel brings and this
processor runs, and with `native`, compiled for this very processor by `llama-attn build`, which the table above is of.
A library that it does not run keeps what was measured on another one.

"""
PAGE = ROOT / "docs" / "error_budget.md"


def captured() -> tuple[list, torch.Tensor]:
    """What every layer of the demo model attends with, and the ids."""
    from oracle import capture, stock_of

    checkpoint = demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file)
    model = LlamaForCausalLM.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file, dtype=torch.float32)
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    del model.config.quantization_config
    return capture(stock_of(model), **inputs)[0], inputs["input_ids"]


def errors(layers: list, ids: torch.Tensor, engine: str, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of every statistic that ``engine`` knows over ``layers``."""
    length = ids.shape[1]
    config = AttentionStatsConfig(
        statistics="all", segments=torch.arange(length)[None] // 8, map_size=16, rows=slice(None),
        keep=torch.arange(length)[None] % 3 != 1,
    )  # fmt: skip
    statistics = wanted_statistics(config, has_tokens=True)
    statistics = [s for s in statistics if not s.is_norm and get_engine(engine).knows(s)]
    visibility = Visibility(1, 0, length, torch.device("cpu"))
    wanted = Wanted(statistics, config, config.segments, math.ceil(length / 8), ids, keep=config.kept[0])
    worst = dict.fromkeys((s.name for s in statistics), 0.0)
    for layer in layers:
        query, key = layer.query.to(dtype), layer.key.to(dtype)
        reference = Reference(
            query=query,
            key=key,
            value=None,
            scaling=layer.scaling,
            visible=torch.ones(1, 1, length, length, dtype=torch.bool).tril(),
            real_queries=torch.ones(1, length, dtype=torch.bool),
            rank=torch.arange(length)[None],
            query_slots=torch.arange(length),
            config=config,
            segments=config.segments,
            tokens=ids,
            keep=config.kept[0],
        )
        raw = get_engine(engine).walk(query, key, None, visibility, Scoring(layer.scaling), wanted).raw
        for statistic in statistics:
            value = raw[statistic.name][None]
            if statistic.finish is not None:
                value = statistic.finish(value, Counts.of(visibility), config)
            expected = mark_padding(statistic, statistic.textbook(reference)[None], Counts.of(visibility))
            if statistic.dtype is not None:
                # Positions are equal or not; what counts is the share of positions that differ.
                error = float((value != expected).double().mean())
            else:
                error = relative_error(value, expected)
            worst[statistic.name] = max(worst[statistic.name], error)
    return worst


def with_library(isa: str) -> None:
    """From now on the native engine runs this library."""
    os.environ["LLAMA_ATTN_ISA"] = isa
    library._entry.cache_clear()


def table(lines: list[list[str]]) -> str:
    """Lines of cells as Markdown, the first as its head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def elsewhere(here: set[str]) -> list[list[str]]:
    """Lines of libraries that the page has and this processor does not run."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().split("## Each library")[1].splitlines()]
    return [line for line in lines if line[0].startswith("`") and line[0] not in here]


if __name__ == "__main__":
    with_library(library.NATIVE)
    layers, ids = captured()
    columns = {
        f"{engine}, {str(dtype).removeprefix('torch.')}": errors(layers, ids, engine, dtype)
        for engine in ENGINES
        for dtype in DTYPES
    }
    lines = [["statistic", *columns, "bound float32", "bound float64"]]
    for name in columns["torch, float32"]:
        cells = [f"{column[name]:.1e}" if name in column else "" for column in columns.values()]
        lines.append([f"`{name}`", *cells, "1e-5", "1e-10"])
    page = INTRODUCTION.format(torch=torch.__version__) + table(lines)
    lines = [["library", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)]]
    for isa in library.choices():
        with_library(isa)
        lines.append([f"`{isa}`", *(f"{max(errors(layers, ids, 'native', dtype).values()):.1e}" for dtype in DTYPES)])
    lines += elsewhere({line[0] for line in lines})
    PAGE.write_text(page + LIBRARIES + table(lines))
