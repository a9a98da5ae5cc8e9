"""A query of padding has no data in any layer, whatever its window, its chunk or an image would show it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from any_expected import expected, gather
from test_any_model import BOUND, CONFIG, check, compare, oracle, run
from zoo import ENTRIES
from zoo_base import MIXED, TEXT, config, of_class
from zoo_situations import prepare

from llama_attn import AttentionStatsConfig, record

TYPES = ("mistral", "qwen2", "gemma2", "gemma3_text", "gemma3", "gpt_oss", "llama4_text", "cohere2", "modernbert")
# A decoder that looks both ways: windows reach behind the text too.
BOTH_WAYS = dataclasses.replace(
    ENTRIES["gemma3_text"],
    name="gemma3_both_ways",
    make=of_class(
        "Gemma3ForCausalLM",
        lambda: config("gemma3_text", **TEXT, **MIXED, query_pre_attn_scalar=8, use_bidirectional_attention=True),
    ),
)
ENTRIES_HERE = {name: ENTRIES[name] for name in TYPES} | {BOTH_WAYS.name: BOTH_WAYS}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name, entry in ENTRIES_HERE.items() for backend in entry.stock]
)
def test_padding_has_no_data(name, backend, side):
    entry = ENTRIES_HERE[name]
    model, stack = entry.build(backend), entry.stacks[0]
    known, captured = oracle(entry, model, side)
    recording = run(entry, model, side)
    compare(recording, entry, stack, model, known, captured, BOUND[torch.float32])
    stats, real = recording.stats, known.axes["ids"].real
    assert not real[0].all()
    of_queries, of_rows = ~stats["entropy"].isnan(), ~stats["row_weights"].isnan().all(-1)
    assert torch.equal(of_queries, real[:, None].expand_as(of_queries))
    assert torch.equal(of_rows, real[:, None, ::3].expand_as(of_rows))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_has_no_data_of_every_third_query(backend):
    """Also where every third query is measured."""
    entry = ENTRIES["gemma3"]
    model = entry.build(backend)
    settings = dataclasses.replace(CONFIG, query_stride=3)
    known, captured = oracle(entry, model, "right")
    with record(model, settings) as recording:
        prepare(entry, model, "right").play()
    found = gather(model, captured, entry.stacks[0], known.axes, CONFIG)
    every = expected(found, ["entropy"], CONFIG, entry.stacks[0])["entropy"]
    check(recording.stats, {"entropy": every[..., ::3]}, BOUND[torch.float32], "every third query")


def test_a_mask_of_ones_own_is_honoured():
    """Nobody says what is padding there, so a query that sees a key counts."""
    model = ENTRIES["gemma3_text"].build("sdpa")
    ids = torch.arange(3, 11)[None]
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[:, 6:] = False
    with record(model, AttentionStatsConfig(statistics=("entropy",))) as recording, torch.no_grad():
        model(ids, attention_mask=dict.fromkeys(("full_attention", "sliding_attention"), mask[None, None]))
    assert torch.equal(recording.stats["visible_keys"].expand(1, 8), mask.sum(-1)[None].int())
