"""Comparing two runs: differences of aligned tokens, checked on materialised float64 weights."""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np
import pytest
import torch
from conftest import tiny_model
from written_out import BOUND, Written, close

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import compare
from llama_attn.analysis.compare import align_tokens


@pytest.fixture
def padded(ids, left_padding):
    return Written(ids, left_padding)


def test_compare_with_another_model(padded, ids, left_padding):
    other = Written(ids, left_padding, model=tiny_model(dtype=torch.float64, seed=1))
    frame = compare(padded.stats, other.ds)
    assert frame.effect.is_monotonic_decreasing
    pooled = []
    for run in (padded, other):
        pooled += [
            run.weights[layer, b, head, i, max(0, i - 4) : i + 1].sum()
            for layer, head in run.heads() for b in range(2) for i in run.queries(b)
        ]  # fmt: skip
    for layer, head in padded.heads():
        near = [
            np.array([run.weights[layer, b, head, i, max(0, i - 4) : i + 1].sum() for b, i in rows_of(padded)])
            for run in (padded, other)
        ]
        line = frame.query("statistic == 'local_mass' and layer == @layer and head == @head").iloc[0]
        change = near[1] - near[0]
        close([line.mean_a, line.mean_b, line.difference], [near[0].mean(), near[1].mean(), change.mean()])
        close(line.effect, np.sqrt(np.mean(change**2)) / np.std(pooled))
        close(line.largest, change[np.abs(change).argmax()])
        batch, at = rows_of(padded)[np.abs(change).argmax()]
        assert (line.batch, line.position) == (batch, at - 9 if batch == 0 else at), "behind 9 tokens of padding"
    assert {"weights_map", "distance_histogram", "hidden_norm", "key_norm", "topk_weight"} <= set(frame.statistic)
    assert not {"topk_position", "hidden_max_channel", "visible_keys"} & set(frame.statistic)
    assert frame[frame.statistic == "hidden_norm"]["head"].isna().all()
    assert sorted(frame[frame.statistic == "key_norm"]["head"].unique()) == [0, 1]
    assert len(frame[frame.statistic == "entropy"]) == 18


def rows_of(run):
    return [(b, i) for b in range(2) for i in run.queries(b)]


def test_comparing_a_run_with_itself_finds_nothing(padded):
    frame = compare(padded.ds, padded.ds)
    assert (frame.effect == 0).all()
    assert (frame.difference == 0).all()


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [f"t{i}" for i in ids]


def test_prompts_are_aligned_by_token(ids):
    model = tiny_model(dtype=torch.float64)
    longer = torch.cat([ids[:1, :10], torch.tensor([[98 - 2, 3]]), ids[:1, 10:30]], 1)
    runs = [Written(tokens, model=model).stats.with_tokens(Tokenizer(), tokens) for tokens in (ids[:1], longer)]
    first, second = (run.to_xarray() for run in runs)
    ((at_a, at_b),) = align_tokens(first, second)
    assert at_a.tolist() == list(range(30))
    assert at_b.tolist() == [*range(10), *range(12, 32)]
    frame = compare(*runs)
    line = frame.query("statistic == 'entropy' and layer == 1 and head == 2").iloc[0]
    change = runs[1]["entropy"][1, 0, 2, at_b] - runs[0]["entropy"][1, 0, 2, at_a]
    close(line.difference, change.mean())
    close(line.largest, change[change.abs().argmax()])
    assert line.position == change.abs().argmax()
    assert line.token == f"t{ids[0, line.position]}"
    assert not {"weights_map", "distance_histogram"} & set(frame.statistic)
    assert {"weights_map: the texts differ", "topk_position: not numbers to subtract"} <= {*frame.attrs["left_out"]}
    about = {"aligned": 30, "tokens_a": 37, "tokens_b": 32, "moved": 20, "warning": "", "part_a": "", "part_b": ""}
    assert frame.attrs.items() >= about.items()
    assert frame.attrs["summary"] == "30 of 37 tokens aligned (b has 32), 20 of them at another position"
    entropies = [run["entropy"][:, 0].numpy() for run in runs]
    matched, effect = matched_by_hand([run[1, 2] for run in entropies], at_a, at_b)
    close(line.matched, matched)
    pooled = np.concatenate([run[..., at] for run, at in zip(entropies, (at_a, at_b), strict=True)])
    close(line.effect, effect / np.std(pooled))
    assert abs(line.matched - line.difference) > 1e-3
    with pytest.raises(ValueError, match=r"expected 37 tokens as in a, got 32; .* use AttentionStats\.with_tokens"):
        compare(first.drop_vars(["key_token", "query_token"]), second)
    with pytest.raises(ValueError, match="row 0 has no token in common"):
        compare(first, second.assign_coords(key_token=second.key_token + "x"))


def matched_by_hand(runs, at_a, at_b):
    """Mean and root mean square of b − a, less what is usual at their positions in both runs."""

    def usual(position):
        return np.mean([
            number for run in runs for at, number in enumerate(run)
            if (position + 1) / 2**0.5 <= at + 1 <= (position + 1) * 2**0.5
        ])  # fmt: skip

    changes = [
        (runs[1][b] - usual(b)) - (runs[0][a] - usual(a)) if a != b else runs[1][b] - runs[0][a]
        for a, b in zip(at_a, at_b, strict=True)
    ]
    return np.mean(changes), np.sqrt(np.mean(np.square(changes)))


def test_a_later_position_is_no_difference():
    """Statistics that follow from the position alone differ between tokens that stand elsewhere, and mean nothing."""
    ids = torch.randint(3, 97, (1, 37), generator=torch.Generator().manual_seed(1))
    longer = torch.cat([torch.full((1, 120), 96), ids], 1)
    first, second = (run_of(tokens).to_xarray() for tokens in (ids, longer))
    for ds in (first, second):
        ds["entropy"] = ds.entropy * 0 + np.log1p(ds["query"])
    frame = compare(first, second).query("statistic == 'entropy'")
    assert (frame.difference > 1.5).all()
    assert frame.matched.abs().max() < 0.15


def run_of(tokens, **settings):
    config = AttentionStatsConfig(statistics=("entropy", "received"), **settings)
    with torch.no_grad():
        stats = tiny_model()(tokens, output_attention_stats=config).attention_stats
    return stats.with_tokens(Tokenizer(), tokens)


def test_texts_that_have_little_in_common(ids):
    other = ids[1:].clone()
    other[0, 5:9] = ids[0, 20:24]
    other[0, other[0] == 96] = 95
    with pytest.warns(UserWarning, match="the texts have little in common: ") as caught:
        frame = compare(run_of(ids[:1], layers=(0, 1)), run_of(other, heads=(1, 2, 4)))
    assert caught[0].filename == __file__
    about = frame.attrs
    common = SequenceMatcher(None, ids[0].tolist(), other[0].tolist(), autojunk=False).get_matching_blocks()
    assert about["aligned"] == sum(block.size for block in common) < 18
    assert about["moved"] == sum(block.size for block in common if block.a != block.b) > 0
    assert about["warning"] == str(caught[0].message)
    assert f"{about['aligned']} of 37 tokens aligned, {about['moved']} of them at another" in about["summary"]
    assert about["left_out"] == ["heads 0, 3, 5: in a only", "layer 2: in b only"]
    assert (about["part_a"], about["part_b"]) == ("layers 0–1 of 3", "heads 1–2, 4 of 6")


def test_padding_does_not_hinder_alignment(ids, left_padding):
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        alone = model(ids[:1, 9:], output_attention_stats=True).attention_stats.with_tokens(Tokenizer(), ids[:1, 9:])
        batch = model(ids, attention_mask=left_padding, output_attention_stats=True).attention_stats
    row = batch.with_tokens(Tokenizer(), ids).select(batch=0)
    frame = compare(alone, row)
    assert len(frame) == 18 * len(alone.names)
    # Not 1e-10: upstream's rotary angles are float32, and the positions differ.
    assert frame.difference.abs().max() < 1e-5
    assert frame.attrs["moved"] == 0, "counted in real tokens"
    assert frame.largest.notna().all()


def test_only_queries_that_both_measured_are_compared(ids):
    runs = [Written(ids, config=AttentionStatsConfig(query_stride=stride)).stats for stride in (2, 3)]
    frame = compare(runs[0], runs[1])
    lines = frame[frame.statistic == "mean_distance"]
    assert len(lines) == 18
    close(lines.difference, 0)
    assert set(lines.position) <= set(range(0, 37, 6))
    line = frame[(frame.statistic == "entropy") & (frame.layer == 0) & (frame["head"] == 0)].iloc[0]
    close(line.mean_a, runs[0]["entropy"][0, :, 0, ::3].mean())
    nothing = compare(runs[0], Written(ids, config=AttentionStatsConfig(query_stride=37)).stats)
    assert (nothing[nothing.statistic == "entropy"].position == 0).all()


def test_compare_what_both_have(padded, ids, left_padding):
    part = AttentionStatsConfig(statistics=("entropy", "received"), layers=(2, 0), heads=(5, 1))
    frame = compare(padded.ds, Written(ids, left_padding, part).ds)
    assert set(frame.statistic) == {"entropy", "received"}
    assert sorted(set(zip(frame.layer, frame["head"], strict=True))) == [(0, 1), (0, 5), (2, 1), (2, 5)]
    assert frame.largest.abs().max() < BOUND
    with pytest.raises(ValueError, match="b: expected 2 rows as in a, got 1"):
        compare(padded.ds, padded.stats.select(batch=1))
    with pytest.raises(ValueError, match="no statistic, layer and head in common"):
        compare(
            padded.stats.select(layers=1), Written(ids, left_padding, part).ds.drop_vars("hidden_norm", errors="ignore")
        )


def test_rounding_is_no_effect(ids):
    """The local mass of a text within the window is 1 but for rounding, which differs between runs."""
    runs = []
    for seed in (0, 1):
        with torch.no_grad():
            runs.append(tiny_model(seed=seed)(ids, output_attention_stats=True).attention_stats)
    first, second = (run["local_mass"] for run in runs)
    assert not torch.equal(first, second)
    assert (first - 1).abs().max() < 1e-6
    frame = compare(*runs)
    assert frame[frame.statistic == "local_mass"].effect.max() < 0.1
    assert frame[frame.statistic == "entropy"].effect.min() > 0.1
