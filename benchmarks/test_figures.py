"""Time of the 30 original figures, and of what a notebook shows."""

from __future__ import annotations

import pytest
import torch
from check import none, once, shrunk
from fresh_process import VOCABULARY
from models import ours, smollm2
from results import Row
from timing import keep, median
from transformers import AutoTokenizer

from llama_attn import AttentionStatsConfig
from llama_attn.demo import SYSTEM, USER, demo_checkpoint
from llama_attn.viz import save_seed_figures


@pytest.fixture(scope="module")
def tokenizer():
    checkpoint = demo_checkpoint()
    return AutoTokenizer.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file)


@pytest.fixture(scope="module", params=["demo chat", 4096], ids=str)
def stats(request, device, text, tokenizer):
    """What `llama-attn demo` measures, of its chat and of a long text."""
    if request.param == "demo chat":
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    else:
        ids = text(shrunk(request.param))
    # The model of check mode knows fewer words.
    ids = ids % VOCABULARY
    model = ours(smollm2().to(device), "streaming")
    config = AttentionStatsConfig(statistics=("sink_mass", "received", "weights_map"), norms=True)
    with torch.no_grad():
        measured = model(ids, use_cache=False, logits_to_keep=1, output_attention_stats=config).attention_stats
    return measured.with_tokens(tokenizer, ids)


def shape(stats):
    """For the table."""
    return f"SmolLM2, T {stats.num_keys:,}"


def test_seed_figures(stats, benchmark, tmp_path):
    benchmark.group = "figures"
    layers = range(10)[: len(stats.layers)]
    written = benchmark.pedantic(
        save_seed_figures, args=(stats, tmp_path, layers), rounds=once(3), warmup_rounds=none(1)
    )
    assert len(written) == 3 * len(layers)
    row = Row.over("30 pictures of ten layers", shape(stats), median(benchmark), "s", "the limit", 15.0, 1.0)
    keep(benchmark, [row])


def test_html(stats, benchmark):
    benchmark.group = "figures"
    assert benchmark(stats._repr_html_)
    keep(benchmark, [Row("what Jupyter shows of the statistics", shape(stats), median(benchmark), "s")])
