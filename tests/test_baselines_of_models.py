"""Uniform attention of real models: the counts give what the mask that their weights show gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_config

from llama_attn import AttentionStats, AttentionStatsConfig, record
from llama_attn.analysis import classify_heads, locality, massive_activations, sink_positions
from llama_attn.analysis.dataset import without_attention
from llama_attn.analysis.uniform import uniform_attention
from llama_attn.viz import plot_head_grid, report

CONFIG = AttentionStatsConfig(statistics="all", norms=True, window=5)
TINY = {
    name: getattr(tiny_config(), name)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
} | {"num_hidden_layers": 4}  # fmt: skip
ENCODER = {name: TINY[name] for name in TINY if name not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
SLIDING, FULL = "sliding_attention", "full_attention"


def model_of(name, **changes):
    torch.manual_seed(0)
    architecture = getattr(transformers, name)
    return architecture._from_config(architecture.config_class(**changes), attn_implementation="eager").eval()


MODELS = {
    "mistral": ("MistralForCausalLM", TINY | {"sliding_window": 6}),
    "gemma3": (
        "Gemma3ForCausalLM", TINY | {"head_dim": 8, "sliding_window": 5, "layer_types": [SLIDING, FULL] * 2}
    ),
    "bert": ("BertModel", ENCODER),
    "modernbert": (
        "ModernBertModel",
        ENCODER | {"local_attention": 8, "global_attn_every_n_layers": 2, "layer_types": [FULL, SLIDING] * 2,
                   "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        TINY | {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "norm_topk_prob": True,
                "layer_types": ["linear_attention", FULL, "linear_attention", FULL]},
    ),
}  # fmt: skip


def masks_of(ds):
    """Who sees whom, (layer, batch, query, key), from the weights themselves: none of a real pair is 0."""
    pairs = np.nan_to_num(ds.weights_map.values).max(2) > 0
    return pairs[:, :, ds["query"].values][..., ds["key"].values]


@pytest.fixture(params=MODELS)
def run(request, ids, left_padding):
    """The name of a model and the statistics of one forward."""
    architecture, changes = MODELS[request.param]
    model = model_of(architecture, **changes)
    with torch.no_grad(), record(model, CONFIG) as recording:
        model(input_ids=ids, attention_mask=left_padding)
    return request.param, recording.stats


def test_the_counts_tell_who_sees_whom(run):
    name, stats = run
    ds = stats.to_xarray()
    masks = masks_of(ds)
    distance = np.abs(ds["query"].values[:, None] - ds["key"].values)
    found = uniform_attention(ds)
    assert ("layer" in found.dims) == (name in ("gemma3", "modernbert"))
    for layer in range(masks.shape[0]):
        of_layer = found.isel(layer=layer) if "layer" in found.dims else found
        for b in range(2):
            mask = masks[layer, b]
            weights, real = mask / np.maximum(mask.sum(1, keepdims=True), 1), mask.any(1)
            first = np.flatnonzero(real)[0]
            expected = {
                "mean_distance": (weights * distance).sum(1), "local_mass": (weights * (distance < 5)).sum(1),
                "sink_mass": weights[:, first], "entropy": np.log(np.maximum(mask.sum(1), 1)),
            }  # fmt: skip
            for statistic, values in expected.items():
                np.testing.assert_allclose(of_layer[statistic][b], np.where(real, values, np.nan), rtol=1e-10)
    assert ds.attrs["direction"] == ("bidirectional" if "bert" in name else "causal")


def test_every_answer_and_the_report(run, tmp_path):
    name, stats = run
    assert np.isfinite(locality(stats).relative_distance).all()
    assert np.isfinite(sink_positions(stats).boost.where(stats.to_xarray().visible_queries > 0, 0)).all()
    assert classify_heads(stats).role.notna().all()
    assert not massive_activations(stats).massive.any()
    report(stats, tmp_path / "report.html")
    absent = (0, 2) if name == "qwen3_next" else ()
    assert stats.without_attention == absent
    assert stats.layers == tuple(layer for layer in range(4) if layer not in absent)
    stats.save(tmp_path / "run.safetensors")
    for source in (stats, AttentionStats.load(tmp_path / "run.safetensors"), stats.select(layers=[3]), replace(stats)):
        assert without_attention(source.to_xarray()) == absent
    note = plot_head_grid(stats).axes[0].get_xlabel()
    assert note == ("head\nlayers 0, 2 without attention weights" if absent else "head")


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_generated_text_and_its_last_step(name, ids, left_padding, tmp_path):
    """The cache of a sliding layer holds its window only."""
    architecture, changes = MODELS[name]
    model = model_of(architecture, **changes)
    with torch.no_grad(), record(model, CONFIG) as recording:
        model.generate(ids, attention_mask=left_padding, max_new_tokens=9, do_sample=False, eos_token_id=None)
    last = recording.forwards[-1]
    assert "hidden_layer_median" not in recording.stats
    assert last["hidden_layer_median"].isfinite().all()
    assert last.to_xarray()["key"].values[0] == (39 if name == "mistral" else 0)
    for stats in (recording.stats, last):
        ds = stats.to_xarray()
        found = uniform_attention(ds)
        np.testing.assert_array_equal(found.entropy, np.log(ds.visible_keys.where(ds.visible_keys > 0)))
        real = ds.visible_keys > 0
        assert found.mean_distance.notnull().equals(real)
        report(stats, tmp_path / "report.html")


def test_some_queries_see_what_they_saw(run):
    """Windows, both sides, layers that see different keys."""
    _, stats = run
    seen, some = masks_of(stats.to_xarray())[:, :, [2, 12, 29, 36]], [2, 12, 29, 36]
    part = stats.select(queries=some)
    for counts, axis in ((part.visible_keys, -1), (part.visible_queries, -2)):
        expected = seen.sum(axis)
        np.testing.assert_array_equal(counts, expected if counts.ndim == 3 else expected[0])
