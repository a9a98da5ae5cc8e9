"""Kept keys: every policy against its authors' rule, on attention written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model
from written_out import Written

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.analysis import keep_mask

CONFIG = AttentionStatsConfig(statistics=("received_total", "key_norm", "entropy"), rows=slice(-64, None))
POLICIES = ("streaming", "h2o", "snapkv", "tova", "knorm")
GROUPS, PER_GROUP = 2, 3


@pytest.fixture(scope="module")
def run():
    """Two rows of 90 and 77 tokens, the shorter one behind padding."""
    ids = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(ids)
    real[1, :13] = 0
    return Written(ids, real, CONFIG)


def best(scores, count):
    """The largest scores, lower keys first where they are equal."""
    order = sorted(range(len(scores)), key=lambda key: (-scores[key], key))
    return set(order[:count])


def grouped(values):
    """Mean over the query heads of each KV head."""
    return [values[group * PER_GROUP : (group + 1) * PER_GROUP].mean(0) for group in range(GROUPS)]


class Rules:
    """What each policy keeps of one row in one layer, without padding: weights (head, query, key), keys (kv_head, key)."""

    def __init__(self, weights, norms):
        self.weights, self.norms, self.length = weights, norms, weights.shape[-1]

    def last(self, count):
        return set(range(self.length - count, self.length))

    def streaming(self, budget, sink=4):
        sink = min(sink, budget)
        return [set(range(sink)) | self.last(budget - sink)] * GROUPS

    def h2o(self, budget, recent=None):
        recent = budget // 2 if recent is None else recent
        total = self.weights.sum(1)[:, : self.length - recent]
        return [best(scores, budget - recent) | self.last(recent) for scores in grouped(total)]

    def snapkv(self, budget, recent=64):
        window = torch.from_numpy(self.weights[:, -recent:, : self.length - recent])
        pooled = torch.nn.functional.avg_pool1d(window.mean(1), 5, stride=1, padding=2).numpy()
        return [best(scores, budget - recent) | self.last(recent) for scores in grouped(pooled)]

    def tova(self, budget):
        mean = self.weights[:, -1, :-1].mean(0)
        return [best(mean, budget - 1) | self.last(1)] * GROUPS

    def knorm(self, budget):
        return [best(-norms, budget) for norms in self.norms]


def check(run, mask, name, budget, **settings):
    assert mask.dims == ("layer", "batch", "kv_head", "key")
    assert mask.dtype == bool
    kinds = set()
    for layer in range(3):
        for b in range(run.batch):
            real = np.array(run.queries(b))
            weights = run.weights[layer, b][:, real][:, :, real]
            norms = run.layers[layer].key[b].norm(dim=-1).numpy()[:, real]
            rules = Rules(weights, norms)
            kept = getattr(rules, name)(budget, **settings) if budget < len(real) else [set(range(len(real)))] * GROUPS
            for group in range(GROUPS):
                found = set(np.flatnonzero(mask[layer, b, group]).tolist())
                assert found == {int(real[key]) for key in kept[group]}, (layer, b, group)
                kinds.add(frozenset(found))
    return kinds


@pytest.mark.parametrize(
    ("policy", "budget", "settings"),
    [
        ("streaming", 20, {}), ("streaming", 90, {}), ("streaming", 9, {"sink": 1}), ("streaming", 5, {"sink": 0}),
        ("streaming", 3, {}), ("h2o", 20, {"recent": 0}),
        ("h2o", 20, {}), ("h2o", 21, {"recent": 4}), ("h2o", 1, {}), ("h2o", 80, {}),
        ("snapkv", 70, {}), ("snapkv", 64, {}), ("snapkv", 20, {"recent": 8}), ("snapkv", 80, {"recent": 16}),
        ("tova", 20, {}), ("tova", 1, {}), ("knorm", 20, {}), ("knorm", 85, {}),
    ],
)  # fmt: skip
def test_policies_keep_what_their_authors_keep(policy, budget, settings, run):
    mask = keep_mask(run.ds, policy, budget, **settings)
    kinds = check(run, mask, policy, budget, **settings)
    always = {"streaming": budget, "snapkv": settings.get("recent", 64), "tova": 1}.get(policy, 0)
    assert len(kinds) > 2 or budget <= always, "layers and heads keep different keys where there is a choice"
    counts = mask.sum("key").values
    assert (counts == np.minimum([[90], [77]], budget)).all()
    assert mask.attrs.items() >= {"policy": policy, "budget": budget}.items()


def test_shorter_texts_have_the_window_there_is():
    """41 tokens: a window of 64 rows is all of them, so that only all keys fit."""
    short = Written(torch.randint(3, 97, (1, 41), generator=torch.Generator().manual_seed(2)), None, CONFIG)
    assert keep_mask(short.ds, "snapkv", 41).all()
    with pytest.raises(ValueError, match=r"budget: snapkv keeps the 41 keys of the queries that it observes.*got 20"):
        keep_mask(short.ds, "snapkv", 20)
    check(short, keep_mask(short.ds, "snapkv", 20, recent=16), "snapkv", 20, recent=16)


def test_ties_go_to_the_lower_key(run):
    ds = run.ds.copy(deep=True)
    ds.key_norm[:] = ds.key_norm * 0 + 1.0
    ds.received_total[:] = ds.received_total * 0 + 1.0
    for policy, kept in (("knorm", range(13, 23)), ("h2o", [*range(13, 18), *range(85, 90)])):
        for group in range(GROUPS):
            assert np.flatnonzero(keep_mask(ds, policy, 10)[0, 1, group]).tolist() == list(kept)


def test_right_padding_ends_each_row_where_it_ends():
    ids = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(ids)
    real[1, 77:] = 0
    padded = Written(ids, real, AttentionStatsConfig(statistics=("received_total", "key_norm"), rows=slice(None)))
    for policy in POLICIES:
        settings = {"recent": 8} if policy == "snapkv" else {}
        check(padded, keep_mask(padded.ds, policy, 20, **settings), policy, 20, **settings)
    last_rows = padded.ds.sel(row=slice(86, None))
    with pytest.raises(ValueError, match="last 1 queries up to 76, which row 1 of the batch ends with, got those of"):
        keep_mask(last_rows, "tova", 20)


def test_heads_of_a_group_must_all_be_there(run):
    bare = run.ds.drop_dims("kv_head")
    for policy in ("streaming", "h2o", "tova"):
        np.testing.assert_array_equal(keep_mask(bare, policy, 20), keep_mask(run.ds, policy, 20))
    some = run.stats.select(heads=[0, 1, 3])
    assert keep_mask(some, "streaming", 20).sizes["kv_head"] == GROUPS
    for policy, heads in (("h2o", some), ("tova", some), ("h2o", run.stats.select(heads=[1, 0, 2, 3, 4, 5]))):
        with pytest.raises(ValueError, match=r"expected all 6 query heads of 2 KV heads, in order, got \[[01],"):
            keep_mask(heads, policy, 20)
    old = bare.assign_attrs(num_heads=0, num_kv_heads=0)
    with pytest.raises(ValueError, match="an older file does not say how many KV heads"):
        keep_mask(old, "h2o", 20)


@pytest.mark.parametrize(
    ("policy", "missing", "asked"),
    [
        ("h2o", "received_total", r'statistics=\(…, "received_total"\)'),
        ("snapkv", "row_weights", r"AttentionStatsConfig\(rows=slice\(-64, None\)\)"),
        ("tova", "row_weights", r"AttentionStatsConfig\(rows=\(-1,\)\)"),
        ("knorm", "key_norm", r'statistics=\(…, "key_norm"\)'),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_named(policy, missing, asked, run):
    with pytest.raises(ValueError, match=asked):
        keep_mask(run.ds.drop_vars(missing), policy, 70)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "lru"}, r"policy: expected one of \['streaming', 'h2o'.*got 'lru'"),
        ({"budget": 0}, "budget: expected 1 to 90, the keys of the text, got 0"),
        ({"budget": -3}, "budget: expected 1 to 90"),
        ({"budget": 91}, "budget: expected 1 to 90, the keys of the text, got 91"),
        ({"budget": True}, "budget: expected 1 to 90"),
        ({"budget": 3.0}, "budget: expected 1 to 90"),
        ({"sink": -1}, "sink: expected 0 to 90"),
        ({"recent": 3}, "recent: only h2o and snapkv have a choice"),
        ({"policy": "h2o", "recent": 21}, "recent: expected no more than the budget of 20, got 21"),
        ({"policy": "snapkv", "recent": 0}, "recent: expected 1 to 90"),
        ({"policy": "snapkv", "budget": 90, "recent": 70}, "row_weights: expected those of the last 70 queries up to 89"),
    ],
)  # fmt: skip
def test_bad_calls(settings, message, run):
    with pytest.raises(ValueError, match=message):
        keep_mask(run.ds, **({"policy": "streaming", "budget": 20} | settings))


def test_what_has_no_cache_to_cut(run):
    with pytest.raises(ValueError, match="expected causal attention"):
        keep_mask(run.ds.assign_attrs(direction="bidirectional"), "streaming", 20)
    with pytest.raises(ValueError, match="expected the last token, 89, among the measured queries"):
        keep_mask(run.stats.select(queries=slice(0, 80)), "streaming", 20)


def test_the_mask_measures_what_it_keeps(run):
    """From one pass to the next: the mass that the last query has on the kept keys, of the weights written out."""
    mask = keep_mask(run.ds, "h2o", 20)
    ids = torch.tensor(run.ids)
    real = torch.ones_like(ids)
    real[1, :13] = 0
    config = AttentionStatsConfig(statistics="kept_mass", keep=mask)
    with torch.no_grad():
        stats = tiny_model(dtype=torch.float64)(ids, attention_mask=real, output_attention_stats=config).attention_stats
    assert isinstance(stats, AttentionStats)
    kept = np.repeat(mask.values, PER_GROUP, axis=2)
    expected = (run.weights * kept[:, :, :, None]).sum(-1)
    found = stats["kept_mass"].numpy()
    for b in range(2):
        np.testing.assert_allclose(found[:, b][..., run.queries(b)], expected[:, b][..., run.queries(b)], atol=1e-12)
