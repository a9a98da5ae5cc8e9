"""Analysis: every answer equals the same question asked of materialised float64 weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray
from written_out import Written, by_chance, close

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import (
    classify_heads,
    head_means,
    layer_evolution,
    locality,
    massive_activations,
    sink_positions,
    sink_rate,
)
from llama_attn.analysis.roles import THRESHOLDS
from llama_attn.analysis.uniform import uniform_attention


@pytest.fixture
def padded(ids, left_padding):
    return Written(ids, left_padding)


@pytest.mark.parametrize(("epsilon", "key"), [(0.3, 0), (0.05, 0), (0.02, 5), (0.1, 30)])
def test_sink_rate(epsilon, key, padded):
    first = [9, 0]
    alpha = np.full((3, 2, 6), np.nan)
    for layer, head in padded.heads():
        for b in range(2):
            if first[b] + key < 37:
                alpha[layer, b, head] = padded.received(layer, b, head, first[b] + key)
    hits = np.where(np.isnan(alpha), np.nan, alpha > epsilon)
    rate = sink_rate(padded.ds, epsilon, key)
    assert rate.dims == ()
    close(rate, np.nanmean(hits))
    close(sink_rate(padded.stats, epsilon=epsilon, key=key, by="layer"), np.nanmean(hits, axis=(1, 2)))
    close(sink_rate(padded.ds, epsilon, key, by="head"), np.nanmean(hits, axis=(0, 1)))
    queries = 37 - key
    assert rate.attrs.items() >= {"epsilon": epsilon, "key": key, "T": 37, "T_shortest": 28, "queries": queries}.items()
    assert rate.attrs["units"] == "fraction"


@pytest.mark.parametrize(("epsilon", "fewest"), [(0.15, 4), (0.3, None), (0.15, 1)])
def test_sink_positions(epsilon, fewest, padded):
    found = sink_positions(padded.ds, epsilon, fewest_queries=fewest)
    sinks = np.zeros((3, 2, 6, 37), dtype=bool)
    for b in range(2):
        real = padded.queries(b)
        enough = fewest or min(len(real), int(np.ceil(by_chance(1, len(real)) / epsilon)))
        assert found.attrs["fewest_queries"][b] == enough
        for layer, head in padded.heads():
            best = (-1, 0)
            for key in range(37):
                seeing = np.flatnonzero(padded.visible[b, :, key])
                alpha = padded.received(layer, b, head, key)
                uniform = np.mean([1 / padded.visible[b, i].sum() for i in seeing]) if len(seeing) else np.nan
                close(found.boost[layer, b, head, key], alpha / uniform)
                share = padded.weights[layer, b, head, :, key].sum() / len(real) if len(seeing) else np.nan
                close(found.share[layer, b, head, key], share)
                assert found.queries[b, key] == len(seeing)
                sinks[layer, b, head, key] = alpha > epsilon and len(seeing) >= enough
                if sinks[layer, b, head, key] and share > best[1]:
                    best = key, share
            assert found.position[layer, b, head] == best[0]
    assert 1 < sinks.sum() < sinks.size / 2
    np.testing.assert_array_equal(found.sink, sinks)
    close(found["heads"].where(padded.ds.visible_queries > 0, 0), sinks.mean((0, 2)))
    assert found.position.dtype.kind == "i"


def with_weights(run, weights):
    """The statistics that sinks follow from, of other weights (layer, batch, head, query, key)."""
    with np.errstate(invalid="ignore"):
        received = weights.sum(3) / run.visible.sum(1)[:, None]
    first = run.visible.argmax(-1)
    mass = np.take_along_axis(weights, first[None, :, None, :, None], -1)[..., 0]
    return run.ds.assign(
        received=(run.ds.received.dims, received),
        sink_mass=(run.ds.sink_mass.dims, np.where(run.visible.any(-1)[:, None], mass, np.nan)),
    )


def two_sinks(run, head):
    """Weights of one layer and head: uniform, but for head 0 less than ε on each of the tokens 3 and 6."""
    weights = run.visible / np.maximum(run.visible.sum(-1, keepdims=True), 1)
    for b in range(run.batch):
        start = run.visible[b].any(-1).argmax()
        for at in (3, 6):
            sees = run.visible[b, :, start + at]
            weights[b, sees] *= 1 - 0.24 * (head > 0)
            weights[b, sees, start + at] += 0.24 * (head > 0)
    return weights


def test_sinks_that_heads_share():
    """Several sinks of which none exceeds ε: sinks of the layer, by what they take of all attention; and their role."""
    ids = torch.randint(3, 97, (2, 130), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[0, 110:] = padding[1, :5] = 0
    run = Written(ids, padding)
    weights = np.stack([np.stack([two_sinks(run, head if layer else 0) for head in range(6)], 1) for layer in range(3)])
    ds = with_weights(run, weights)
    found = sink_positions(ds)
    named = np.zeros((3, 2, 130), bool)
    for b in range(2):
        real = run.queries(b)
        for layer in range(3):
            for key in real:
                seeing = np.flatnonzero(run.visible[b, :, key])
                uniform = sum(1 / run.visible[b, i].sum() for i in seeing)
                total = weights[layer, b, :, :, key].sum(-1).mean()
                enough = len(seeing) >= by_chance(1, len(real)) / 0.3
                named[layer, b, key] = enough and total > by_chance(max(1, uniform), len(real))
    np.testing.assert_array_equal(found.layer_sink, named)
    starts = [run.queries(b)[0] for b in range(2)]
    assert [np.flatnonzero(named[:, b].any(0)).tolist() for b in range(2)] == [[at + 3, at + 6] for at in starts]
    assert not named[0].any()
    assert not found.sink.any(), "no head gives any of them more than ε"
    frame = classify_heads(ds).set_index(["layer", "head"])
    for layer, head in run.heads():
        mass = [
            weights[layer, b, head, i, [starts[b] + 3, starts[b] + 6]].sum()
            for b in range(2) for i in run.queries(b, more_than=1)
        ]  # fmt: skip
        close(frame.sink_score[layer, head], np.mean(mass))
        assert ("sink" in frame.roles[layer, head]) == (np.mean(mass) > 0.3)
    assert {frame.role[2, 4], frame.role[2, 5]} == {"sink"}
    assert sink_positions(ds, fewest_queries=130).layer_sink.sum() == 0
    assert classify_heads(ds, slice(40, None)).sink_score.isna().all(), "known of all queries together only"


@pytest.mark.parametrize(("first", "other", "role"), [(0.5, 0.2, "first_token_sink"), (0.2, 0.5, "sink")])
def test_the_first_token_and_other_sinks_are_told_apart(first, other, role):
    run = Written(torch.randint(3, 97, (1, 120), generator=torch.Generator().manual_seed(1)))
    weights = np.zeros((3, 1, 6, 120, 120))
    weights[..., range(120), range(120)] = 1
    weights[..., 6:, :] *= 1 - first - other
    weights[..., 6:, 5] += other
    weights[..., 6:, 0] += first
    ds = with_weights(run, weights)
    frame = classify_heads(ds)
    close(frame.first_token_sink_score, 114 / 119 * first)
    assert sink_positions(ds).layer_sink[0, 0].values.nonzero()[0].tolist() == [0, 5]
    # The token 5 sees itself, and the first query has no choice.
    close(frame.sink_score, np.mean([weights[0, 0, 0, i, [0, 5]].sum() for i in range(1, 120)]))
    assert set(frame.role) == {role}


def test_locality(padded):
    found = locality(padded.ds)
    for layer, head in padded.heads():
        for b in range(2):
            near, far, entropies, uniform_near, uniform_far = ([] for _ in range(5))
            for i in padded.queries(b):
                weights, keys = padded.weights[layer, b, head, i], np.flatnonzero(padded.visible[b, i])
                distance = i - np.arange(37)
                near.append(weights[(distance >= 0) & (distance < 5)].sum())
                far.append((weights * distance).sum())
                uniform_near.append(np.mean(i - keys < 5))
                uniform_far.append(np.mean(i - keys))
                if len(keys) > 1:
                    seen = weights[keys]
                    entropies.append(-(seen * np.log(seen)).sum() / np.log(len(keys)))
            close(found.local_mass[layer, b, head], np.mean(near))
            close(found.mean_distance[layer, b, head], np.mean(far))
            close(found.normalized_entropy[layer, b, head], np.mean(entropies))
            relative = np.mean(far) / np.mean(uniform_far)
            close(found.relative_distance[layer, b, head], relative)
            assert found.reach[layer, b, head] == ("local" if relative < 0.5 else "global")
            close(found.uniform_local_mass[b], np.mean(uniform_near))
            close(found.uniform_distance[b], np.mean(uniform_far))


def test_local_heads(padded):
    uniform = uniform_attention(padded.ds).mean_distance
    factor = xarray.DataArray([0.0, 0.49, 0.51, 1.0, 1.9, np.nan], dims="head")
    ds = padded.ds.assign(
        mean_distance=(uniform * factor).expand_dims(layer=3).transpose("layer", "batch", "head", "query")
    )
    labels = ["local", "local", "global", "global", "global", "no data"]
    assert locality(ds).reach.values.tolist() == [[labels, labels]] * 3


def test_layer_evolution(padded):
    found = layer_evolution(padded.ds)
    real = padded.visible.any(-1)
    for layer in range(3):
        masses = [
            np.mean(
                [
                    padded.weights[layer, b, head, i, max(0, i - 4) : i + 1].sum()
                    for b in (0, 1)
                    for i in padded.queries(b)
                ]
            )
            for head in range(6)
        ]
        close(found.local_mass.sel(layer=layer), [np.mean(masses), np.std(masses), np.min(masses), np.max(masses)])
        norms = padded.layers[layer].key.norm(dim=-1).permute(0, 2, 1)[torch.from_numpy(real)].mean(0).numpy()
        close(found.key_norm.sel(layer=layer), [norms.mean(), norms.std(), norms.min(), norms.max()])
    for layer, hidden in enumerate([*(layer.hidden for layer in padded.layers), padded.last]):
        norms = hidden.norm(dim=-1).numpy()[real]
        close(found.hidden_norm.sel(hidden_layer=layer), [norms.mean(), norms.std(), norms.min(), norms.max()])
    assert found["summary"].values.tolist() == ["mean", "std", "min", "max"]
    assert found.entropy.attrs["units"] == "nat"
    assert found.topk_weight.dims == ("layer", "rank", "summary")
    assert "weights_map" not in found
    assert "hidden_max_channel" not in found


def test_means_of_heads_are_those_of_real_tokens(padded):
    found = head_means(padded.stats, "entropy")
    assert found.dims == ("layer", "head")
    np.testing.assert_allclose(found.values, np.nanmean(padded.stats["entropy"].numpy(), axis=(1, 3)), rtol=1e-6)


@pytest.mark.parametrize("query_slice", [None, slice(20, None), slice(-5, None, 2), slice(12, 30)])
def test_classify_heads(query_slice, left_padding):
    # Two halves of the same random tokens, so that there is something to copy.
    half = torch.randint(3, 97, (2, 18), generator=torch.Generator().manual_seed(4))
    run = Written(torch.cat([half, half[:, :1] + 1, half], 1), left_padding)
    frame = classify_heads(run.ds, query_slice)
    assert frame.columns.tolist()[:5] == ["layer", "head", "role", "roles", "score"]
    assert frame.columns.tolist()[5:] == [f"{role}_score" for role in THRESHOLDS]
    counted = range(37)[query_slice or slice(None)]
    for line in frame.itertuples():
        scores = {role: [] for role in THRESHOLDS}
        uniform = []
        for b in range(2):
            ids = run.ids[b]
            for i in run.queries(b, more_than=1):
                if i not in counted:
                    continue
                weights, keys = run.weights[line.layer, b, line.head, i], np.flatnonzero(run.visible[b, i])
                scores["first_token_sink"].append(weights[keys[0]])
                scores["previous_token"].append(weights[i - 1])
                scores["duplicate_token"].append(sum(weights[j] for j in keys if j < i and ids[j] == ids[i]))
                scores["induction"].append(sum(weights[j] for j in keys[1:] if ids[j - 1] == ids[i]))
                scores["uniform"].append(-(weights[keys] * np.log(weights[keys])).sum() / np.log(len(keys)))
                scores["local"].append((weights[keys] * (i - keys)).sum())
                if far := [j for j in keys[1:] if i - j >= run.config.window]:
                    scores["streaming"].append(1 - weights[far].sum())
                uniform.append(np.mean(i - keys))
        expected = {role: np.mean(values) for role, values in scores.items() if values}
        # No token takes so much that it could not be chance; and it is known of all queries together only.
        expected["sink"] = 0.0 if query_slice is None else np.nan
        expected["retrieval"] = np.nan
        expected["local"] = 1 - np.sum(scores["local"]) / np.sum(uniform)
        for role in THRESHOLDS:
            close(getattr(line, f"{role}_score"), expected[role])
        passed = [role for role in THRESHOLDS if expected[role] > THRESHOLDS[role]]
        assert line.roles == sorted(passed, key=lambda role: -expected[role] / THRESHOLDS[role])
        assert line.role == (line.roles[0] if passed else "mixed")
        assert np.isnan(line.score) if not passed else line.score == getattr(line, f"{line.role}_score")


def test_axes_in_another_order(padded):
    turned = padded.ds.transpose(*reversed(list(padded.ds.dims)))
    xarray.testing.assert_identical(uniform_attention(turned), uniform_attention(padded.ds))


def test_each_role(padded):
    """Heads whose statistics are what the role says, one role each, and one that has none."""
    ds = padded.ds.copy(deep=True)
    uniform = uniform_attention(ds)
    ds["entropy"] = ds.entropy * 0
    ds["mean_distance"] = (ds.entropy + 1) * uniform.mean_distance
    for name in ("sink_mass", "previous_token", "duplicate_token", "induction"):
        ds[name] = ds[name] * 0 + 0.29
    for head, name in enumerate(("sink_mass", "previous_token", "duplicate_token", "induction")):
        ds[name][:, :, head] += 0.02 + 0.1 * head
    ds["mean_distance"][:, :, 4] *= 0.4
    ds["entropy"][:, :, 5] += 0.95 * np.log(ds.visible_keys.where(ds.visible_keys > 0))
    frame = classify_heads(ds)
    roles = ["first_token_sink", "previous_token", "duplicate_token", "induction", "local", "uniform"]
    assert frame.role.tolist() == 3 * roles
    assert frame.roles.tolist() == 3 * [[role] for role in roles]
    close(frame.score, 3 * [0.31, 0.41, 0.51, 0.61, 0.6, 0.95])
    ds["induction"][:, :, 1] = 0.9
    frame = classify_heads(ds.isel(head=[1]))
    assert frame.role.tolist() == 3 * ["induction"]
    assert frame.roles.tolist() == 3 * [["induction", "previous_token"]]
    ds["entropy"] *= 0
    assert classify_heads(ds.isel(head=[5])).role.tolist() == 3 * ["mixed"]


NEW = ["hidden_top", "hidden_top_channel", "hidden_layer_median"]


def states_of(run):
    """What enters each layer and leaves the last, as magnitudes."""
    return [state.abs().numpy() for state in (*(layer.hidden for layer in run.layers), run.last)]


@pytest.mark.parametrize("top_k", [8, 3])
def test_massive_activations(top_k, ids, left_padding):
    padded = Written(ids, left_padding, AttentionStatsConfig(statistics="all", norms=True, window=5, top_k=top_k))
    found = massive_activations(padded.ds, magnitude=5.0, ratio=5.0)
    arrays = {name: found[name].values for name in found.data_vars}
    hits = np.zeros((4, 2, 37), dtype=bool)
    most = 0
    for at, state in enumerate(states_of(padded)):
        for b in range(2):
            rows = padded.queries(b)
            median = np.median(state[b, rows])
            close(found["median"][at, b], median)
            for i in rows:
                order = np.argsort(-state[b, i], kind="stable")
                massive = [c for c in order if state[b, i, c] > 5 and state[b, i, c] >= 5 * median]
                most = max(most, len(massive))
                hits[at, b, i] = len(massive) > 0
                listed = massive[:top_k]
                assert arrays["channels"][at, b, i].tolist() == listed + [-1] * (top_k - len(listed))
                close(arrays["magnitudes"][at, b, i, : len(listed)], state[b, i, listed])
                assert np.isnan(arrays["magnitudes"][at, b, i, len(listed) :]).all()
                # Unknown, too, where as many as were measured are massive and there is no more.
                assert arrays["complete"][at, b, i] == (len(massive) < top_k)
                close(arrays["magnitude"][at, b, i], state[b, i, order[0]])
                close(arrays["ratio"][at, b, i], state[b, i, order[0]] / median)
                assert arrays["channel"][at, b, i] == order[0]
    np.testing.assert_array_equal(found.massive, hits)
    assert 0 < hits.sum() < hits.size / 2
    assert most > 3, "several channels of one token"
    assert (found.complete.all() == (most < top_k)).item()
    for b in range(2):
        for i in range(37):
            layers = np.flatnonzero(hits[:, b, i])
            assert found.appears[b, i] == (layers[0] if len(layers) else -1)
            after = layers[-1] + 1 if len(layers) and layers[-1] < 3 else -1
            assert found.disappears[b, i] == after
    alpha = [padded.received(1, 1, head, 2) for head in range(6)]
    close(found.sink_heads[1, 1, 2], np.mean(np.array(alpha) > 0.3))
    assert np.isnan(found.sink_heads[0, 0, 3])


def test_massive_activations_of_which_the_largest_is_known(padded):
    found = massive_activations(padded.ds.drop_vars(NEW), magnitude=8.0, ratio=8.0)
    for at, state in enumerate(states_of(padded)):
        for b in range(2):
            rows = padded.queries(b)
            median = np.median([np.median(state[b, i]) for i in rows])
            close(found["median"][at, b], median)
            for i in rows:
                largest, channel = state[b, i].max(), state[b, i].argmax()
                massive = largest > 8 and largest >= 8 * median
                assert found.massive[at, b, i] == massive
                assert found.channels[at, b, i].values.tolist() == [channel if massive else -1]
                assert found.complete[at, b, i] == (not massive), "of a massive token the other channels are unknown"
    assert found.massive.any()


def test_what_is_there_is_used(padded):
    """With the top channels alone, or the median of the layer alone."""
    whole = massive_activations(padded.ds, magnitude=8.0, ratio=8.0)
    ds = padded.ds.drop_vars(["hidden_max", "hidden_max_channel", "hidden_median"])
    xarray.testing.assert_identical(massive_activations(ds, magnitude=8.0, ratio=8.0), whole)
    ds = padded.ds.drop_vars(NEW[:2])
    np.testing.assert_array_equal(massive_activations(ds)["median"], whole["median"])
    ds = padded.ds.drop_vars(NEW[2:])
    assert massive_activations(ds).sizes["rank"] == 8


def test_a_ratio_that_is_just_reached():
    ds = xarray.Dataset(
        {
            "hidden_top": (("hidden_layer", "batch", "query", "rank"), [[[[2000.0, 1999.0]], [[100.0, 100.0]]]]),
            "hidden_top_channel": (("hidden_layer", "batch", "query", "rank"), np.array([[[[4, 1]], [[0, 1]]]])),
            "hidden_layer_median": (("hidden_layer", "batch"), [[2.0, 0.1]]),
        },
        {"hidden_layer": [0], "batch": [0, 1], "query": [0]},
    )
    found = massive_activations(ds)
    assert found.channels.values.tolist() == [[[[4, -1]], [[-1, -1]]]], "≥ 1,000 × the median, but > 100"
    assert found.complete.all()


def test_the_median_of_medians_is_near_the_median(padded):
    exact = massive_activations(padded.ds)["median"]
    found = massive_activations(padded.ds.drop_vars(NEW))["median"]
    assert np.abs(found / exact - 1).max() < 0.1
    assert (found != exact).all()


def test_massive_activations_that_come_and_go():
    queries, layers = 5, [4, 0, 2, 7]
    largest = np.ones((4, 1, queries))
    largest[0, 0, 1] = 2000  # layer 4
    largest[2, 0, 1] = 3000  # layer 2
    largest[3, 0, 2] = 1500  # the output
    largest[1, 0, 3] = 900
    ds = xarray.Dataset(
        {
            "hidden_max": (("hidden_layer", "batch", "query"), largest),
            "hidden_median": (("hidden_layer", "batch", "query"), np.ones_like(largest)),
            "hidden_max_channel": (("hidden_layer", "batch", "query"), np.ones_like(largest, dtype=np.int32)),
        },
        {"hidden_layer": layers, "batch": [0], "query": range(queries)},
    )
    found = massive_activations(ds)
    assert found.appears.values.tolist() == [[-1, 2, 7, -1, -1]]
    assert found.disappears.values.tolist() == [[-1, 7, -1, -1, -1]]
    assert "sink_heads" not in found
    assert not massive_activations(ds * np.nan).massive.any()


@pytest.mark.smollm2
def test_heads_of_smollm2_on_a_repeated_random_sequence(smollm2):
    model, tokenizer = smollm2
    model.set_attn_implementation("streaming")
    half = torch.randint(100, 48_000, (1, 48), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), half, half], 1)
    config = AttentionStatsConfig(
        statistics=("sink_mass", "mean_distance", "entropy", "previous_token", "duplicate_token", "induction"),
        layers=(8, 16, 17, 18),
    )
    with torch.no_grad():
        stats = model(ids, use_cache=False, output_attention_stats=config).attention_stats
    roles = classify_heads(stats, slice(49, None)).set_index(["layer", "head"])
    assert roles.role[16, 0] == "previous_token"
    assert roles.role[18, 6] == "induction"
    assert roles.role[17, 3] == "induction"
    assert roles.role[8, 0] == "duplicate_token"
    assert (roles.role == "first_token_sink").any()
    first_half = classify_heads(stats, slice(1, 49)).set_index(["layer", "head"])
    assert first_half.role[18, 6] == "first_token_sink", "without a copy to find, an induction head rests on the sink"
