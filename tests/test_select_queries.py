"""Some queries of a run: their numbers are those they had, what is of all queries is gone, counts are of them alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_container import Tokenizer, same, stats  # noqa: F401 (a fixture)
from written_out import Written

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.analysis import compare, locality
from llama_attn.analysis.uniform import uniform_attention

OF_KEYS = {"key_norm", "value_norm", "key_mean_norm", "value_mean_norm", "value_output_norm"}
OF_ALL = {
    "received", "received_total", "weights_map", "logits_map", "distance_histogram", "hidden_layer_median", "weight_count",
    "weight_mass",
}  # fmt: skip


def test_what_is_left(stats, tmp_path):  # noqa: F811
    part = stats.with_tokens(Tokenizer(), torch.arange(74).view(2, 37)).select(layers=0, queries=[30, 4, 30])
    assert list(part.queries) == [4, 30]
    assert (stats.rows, part.rows) == ((4, 36), (4,))
    assert set(stats.names) - set(part.names) == OF_ALL
    for name in part.names:
        dims = stats.labels[name].dims
        layers = [1, 2] if dims[0] == "hidden_layer" else [1]
        wanted = stats[name][layers]
        if "query" in dims:
            wanted = wanted.index_select(dims.index("query"), torch.tensor([2, 15]))
        elif name == "row_weights":
            # Of the rows 4 and 36.
            wanted = wanted[..., :1, :]
        else:
            assert name in OF_KEYS
        torch.testing.assert_close(part[name], wanted, rtol=0, atol=0, equal_nan=True)
    assert part.visible_keys.tolist() == stats.visible_keys[:, [2, 15]].tolist() == [[0, 22], [5, 31]]
    ends = (slice(9, 31), slice(0, 31))
    assert part.visible_queries.tolist()[0] == [int(k in range(37)[ends[0]]) for k in range(37)]
    assert part.visible_queries.tolist()[1] == [(k < 5) + (k < 31) for k in range(37)]
    dataset = part.to_xarray()
    assert dataset["query"].values.tolist() == [4, 30]
    assert dataset.query_token.values[1].tolist() == ["t41", "t67"]
    assert "2 queries, 37 keys" in repr(part)
    with pytest.raises(KeyError, match=r"no statistic 'received'; .*select\(queries=…\) left out"):
        part["received"]
    part.save(path := tmp_path / "part.safetensors")
    assert same(AttentionStats.load(path), part)
    assert same(
        part.select(queries=30), stats.with_tokens(Tokenizer(), torch.arange(74).view(2, 37)).select(0, queries=30)
    )


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (slice(30, None), [30, 32, 34, 36]), (slice(31, 36), [32, 34]), (slice(None, 5), [0, 2, 4]),
        (slice(0, 37, 9), [0, 18, 36]), (slice(36, 10**30), [36]), (np.array([2, 0]), [0, 2]), (range(4), None),
        (torch.tensor(8), [8]),
    ],
)  # fmt: skip
def test_positions_and_slices_of_positions(queries, expected, stats):  # noqa: F811
    if expected is None:
        with pytest.raises(ValueError, match=r"queries: expected some of \[0, 2, 4"):
            stats.select(queries=queries)
    else:
        assert list(stats.select(queries=queries).queries) == expected


@pytest.mark.parametrize("queries", [slice(None), range(0, 37, 2), None])
def test_all_queries_are_the_run(queries, stats):  # noqa: F811
    assert same(stats.select(queries=queries), stats)


@pytest.mark.parametrize("queries", [-1, 1, 37, [], [0, 38], True, "a", 1.0, [None]])
def test_what_was_not_measured(queries, stats):  # noqa: F811
    with pytest.raises(ValueError, match=r"queries: expected some of \[0, 2, 4"):
        stats.select(queries=queries)


@pytest.mark.parametrize("queries", [slice(-3, None), slice(None, -1), slice(0, 9, -1), slice(0, 9, 0), slice("a")])
def test_slices_of_no_positions(queries, stats):  # noqa: F811
    with pytest.raises(ValueError, match="queries: expected a slice of positions from 0 up"):
        stats.select(queries=queries)
    with pytest.raises(ValueError, match=r"queries: none of .* lies in"):
        stats.select(queries=slice(37, None))


def test_a_run_without_numbers_of_single_queries(ids):
    with torch.no_grad():
        run = tiny_model()(ids, output_attention_stats=AttentionStatsConfig(statistics="received")).attention_stats
    with pytest.raises(ValueError, match=r"queries: \['received'\] are of all queries together"):
        run.select(queries=3)


def test_packed_documents_and_answers_about_some_queries(ids, left_padding):
    positions = torch.tensor([[*range(20), *range(17)], [*range(9), *range(28)]])
    sequences = (positions == 0).cumsum(-1)
    packed = {"position_ids": positions, "use_cache": False}
    run = Written(ids, visibility={"sequences": sequences}, **packed)
    some = [3, 19, 20, 33]
    part = run.stats.select(queries=some)
    np.testing.assert_array_equal(part.visible_queries, run.visible[:, some].sum(1))
    for found in (part, run.stats.select(queries=slice(10, 30))):
        uniform, whole = uniform_attention(found.to_xarray()), uniform_attention(run.ds)
        for name in ("entropy", "mean_distance", "local_mass"):
            np.testing.assert_array_equal(uniform[name], whole[name].sel(query=list(found.queries)))
    padded = Written(ids, left_padding)
    last = padded.stats.select(queries=slice(30, None))
    expected = np.mean([
        sum(padded.weights[2, b, 1, i, j] * (i - j) for j in range(37)) for b in range(2) for i in range(30, 37)
    ])  # fmt: skip
    assert float(locality(last).mean_distance.sel(layer=2, head=1).mean()) == pytest.approx(expected, rel=1e-9)
    frame = compare(last, padded.stats.select(queries=[30, 36]))
    assert (frame.difference.dropna() != 0).sum() == 0


def test_generated_tokens(ids):
    prompt = ids[:, :9]
    outputs = tiny_model().generate(
        prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_attention_stats=AttentionStatsConfig(statistics="all"),
    )  # fmt: skip
    run = outputs.attention_stats
    part = run.select(queries=slice(9, None))
    assert list(part.queries) == list(range(9, 14))
    torch.testing.assert_close(part["entropy"], run["entropy"][..., 9:], rtol=0, atol=0)
    assert part.visible_queries.tolist() == [[5] * 10 + [4, 3, 2, 1]] * 2


def test_a_mask_of_the_users_own(ids):
    mask = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(0)) < 0.4
    mask |= torch.eye(37, dtype=torch.bool)
    with torch.no_grad():
        run = tiny_model()(ids, attention_mask=mask, output_attention_stats=True).attention_stats
    with pytest.raises(ValueError, match="queries: behind a mask of your own"):
        run.select(queries=3)
    assert run.select(heads=0).heads == (0,)
