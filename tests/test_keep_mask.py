"""Kept sets as the methods of the literature choose them, and how many keys hold the attention: against float64 weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_rows_and_keep import measure, weights_of

from llama_attn import AttentionStatsConfig, block_keys, record
from llama_attn.analysis import coverage, keep_mask
from llama_attn.analysis.keep_mask import POLICIES

CONFIG = AttentionStatsConfig(statistics=("received_total", "key_norm"), rows=slice(-8, None))


def kept_sets(scores, budget):
    """The largest, the lower key of equals first, (…, key)."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :budget]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def by_group(values, kv_heads=2):
    return values.unflatten(2, (kv_heads, -1)).mean(3)


def by_hand(policy, weights, keys, budget):
    """Scores from the weights (layer, batch, head, query, key) and keys (layer, batch, kv_head, key, channel)."""
    length, never = weights.shape[-1], weights.max() + 1
    if policy == "streaming":
        scores = torch.arange(length).expand(*keys.shape[:3], -1).double().clone()
        scores[..., :4] = length
    elif policy == "knorm":
        scores = -keys.double().norm(dim=-1)
    elif policy == "tova":
        scores = weights[..., -1, :].mean(2, keepdim=True).expand(-1, -1, 2, -1).clone()
        scores[..., -1] = never
    elif policy == "snapkv":
        window = weights[..., -8:, :-8].mean(-2)
        pooled = torch.nn.functional.avg_pool1d(window.flatten(0, 1), 5, stride=1, padding=2).view_as(window)
        scores = torch.nn.functional.pad(by_group(pooled), (0, 8), value=float(never))
    else:
        scores = by_group(weights.sum(-2))
        scores[..., -(budget // 2) :] = scores.max() + 1
    return kept_sets(scores, budget)


@pytest.mark.parametrize("budget", [1, 12, 20, 37])
@pytest.mark.parametrize("policy", POLICIES)
def test_kept_sets(policy, budget, ids):
    model = tiny_model("sdpa", torch.float64)
    stats = measure(model, ids, CONFIG)
    cache = model(ids, use_cache=True).past_key_values
    keys = torch.stack([layer.keys for layer in cache.layers])
    if policy == "snapkv" and budget < 8:
        with pytest.raises(ValueError, match="so expected 8 or more, or fewer queries"):
            keep_mask(stats, policy, budget)
        return
    found = keep_mask(stats, policy, budget)
    assert found.dims == ("layer", "batch", "kv_head", "key")
    assert found.attrs["policy"] == policy
    if policy == "h2o" and budget == 1:
        # Half of one key is none that is always kept.
        expected = kept_sets(by_group(weights_of(model, ids).double().sum(-2)), 1)
    else:
        expected = by_hand(policy, weights_of(model, ids).double(), keys, budget)
    assert torch.equal(torch.as_tensor(found.values), expected)
    assert (found.sum("key") == budget).all()


def test_padding_is_never_kept(ids, left_padding):
    stats = measure(tiny_model(), ids, CONFIG, attention_mask=left_padding)
    for policy in POLICIES:
        keep = keep_mask(stats, policy, 30).values
        assert not keep[:, 0, :, :9].any()
        assert keep[:, 0, :, 9:].all()
        assert (keep[:, 1].sum(-1) == 30).all()
    first = keep_mask(stats, "streaming", 6).values[0, 0, 0].nonzero()[0].tolist()
    assert first == [9, 10, 11, 12, 35, 36]


def test_what_is_kept_can_be_measured_and_blocked(ids):
    """The mask goes into `keep` and `block_keys` as it is."""
    model = tiny_model("sdpa", torch.float64)
    stats = measure(model, ids, CONFIG)
    keep = keep_mask(stats, "h2o", 10)
    again = measure(model, ids, AttentionStatsConfig(keep=keep))
    expected = (weights_of(model, ids) * torch.as_tensor(keep.values).repeat_interleave(3, 2)[:, :, :, None]).sum(-1)
    torch.testing.assert_close(again["kept_mass"].double(), expected.double(), rtol=0, atol=1e-5)
    cache = model(ids, use_cache=True).past_key_values
    with block_keys(model, keep, first_query=37), record(model) as recording, torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
    assert recording.stats["visible_keys"][0].tolist() == [11, 12, 13] or recording.stats["visible_keys"].ndim == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fifo", 4), "policy: expected one of"),
        (("h2o", 0), "budget: expected 1 to 37"),
        (("h2o", 38), "budget: expected 1 to 37"),
        (("h2o", 2.5), "budget: expected 1 to 37"),
        (("h2o", True), "budget: expected 1 to 37"),
    ],
)
def test_what_cannot_be_kept(arguments, message, ids):
    stats = measure(tiny_model(), ids, CONFIG)
    with pytest.raises(ValueError, match=message):
        keep_mask(stats, *arguments)


def test_what_was_not_measured(ids):
    stats = measure(tiny_model(), ids, AttentionStatsConfig(statistics="entropy"))
    for policy, message in {
        "h2o": "received_total",
        "knorm": "key_norm",
        "tova": r"AttentionStatsConfig\(rows=\(-1,\)\)",
        "snapkv": r"rows=slice\(-64, None\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            keep_mask(stats, policy, 5)
    part = measure(tiny_model(), ids, AttentionStatsConfig(statistics="received_total", heads=(0, 1)))
    with pytest.raises(ValueError, match="expected all 6 query heads"):
        keep_mask(part, "h2o", 5)
    assert keep_mask(part, "streaming", 5).sizes["kv_head"] == 2


def test_coverage_bounds_the_keys_that_are_needed(ids, left_padding):
    model = tiny_model("sdpa", torch.float64)
    shares = (0.3, 0.5, 0.9, 0.99, 0.999)
    config = AttentionStatsConfig(statistics=("weight_count", "weight_mass"))
    found = coverage(measure(model, ids[:1], config), shares)
    weights = weights_of(model, ids[:1])[:, 0].double()
    queries = weights.shape[-2]
    for layer in range(3):
        for head in range(6):
            largest = weights[layer, head].flatten().sort(descending=True).values.cumsum(0)
            for share in shares:
                needed = int((largest < share * queries * (1 - 1e-9)).sum()) + 1
                least, most = (float(found[name].sel(layer=layer, head=head, mass=share)) for name in ("least", "most"))
                # Of one pair more or less nothing can be said.
                assert least - 1 / queries <= needed / queries <= most + 1 / queries + 1e-9
    assert (found.least <= found.most).all()
    assert (np.diff(found.most.values, axis=-1) >= 0).all()
    assert coverage(measure(model, ids, config, attention_mask=left_padding)).sizes["mass"] == 4
    for mass in ((), (0.0,), (1.1,), 0.5):
        with pytest.raises(ValueError, match="mass: expected shares"):
            coverage(measure(model, ids, config), mass)
