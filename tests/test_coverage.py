"""Keys that hold a share of the attention: bounds from the histogram, against all weights sorted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from written_out import Written, close

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import coverage
from llama_attn.analysis.coverage import MASS

CONFIG = AttentionStatsConfig(statistics=("weight_count", "weight_mass"))


def needed(rows, share):
    """Keys per query of the smallest choice that holds a share of all attention, the last one counted in part."""
    weights = np.sort(np.concatenate(rows))[::-1]
    if share == 1:
        return (weights > 0).sum() / len(rows)
    wanted, taken, keys = share * weights.sum(), 0.0, 0.0
    for weight in weights:
        if taken + weight >= wanted:
            return (keys + (wanted - taken) / weight) / len(rows)
        taken, keys = taken + weight, keys + 1
    return keys / len(rows)


def histogram(rows):
    """Mean number and mass per query of the weights in (2^−(b+1), 2^−b]."""
    counts, masses = np.zeros(31), np.zeros(31)
    for row in rows:
        for weight in row:
            b = next((b for b in range(30) if weight > 2.0 ** -(b + 1)), 30)
            counts[b] += 1 / len(rows)
            masses[b] += weight / len(rows)
    return counts, masses


@pytest.fixture
def run(ids, left_padding):
    return Written(ids, left_padding, CONFIG)


def with_histogram(ds, rows):
    """The dataset with the histogram of these weights in every head."""
    counts, masses = histogram(rows)
    shape = ds.weight_count.shape
    return ds.assign(
        weight_count=(ds.weight_count.dims, np.broadcast_to(counts, shape).copy()),
        weight_mass=(ds.weight_mass.dims, np.broadcast_to(masses, shape).copy()),
    )


def test_bounds_of_a_model(run):
    shares = (*MASS, 0.2, 1.0)
    found = coverage(run.ds, shares)
    assert found.least.dims == ("layer", "head", "mass")
    tight = 0
    for layer, head in run.heads():
        rows = [run.weights[layer, b, head, i][run.visible[b, i]] for b in range(2) for i in run.queries(b)]
        each = np.array([[needed([row], share) for share in shares] for row in rows])
        for at, share in enumerate(shares):
            least, most = (float(found[name][layer, head, at]) for name in ("least", "most"))
            keys = needed(rows, share)
            assert least - 1e-9 <= keys <= most + 1e-9, "the smallest choice of all queries together"
            assert least <= each[:, at].mean() + 1e-9, "each query by itself needs no fewer"
            if share < 1:
                assert most - least <= (3 - 8**0.5) * histogram(rows)[0].max() + 1e-9
            tight += most < 1.1 * least
    assert tight > 60, "most bounds are near each other"
    visible = np.sort([run.visible[b, i].sum() for b in range(2) for i in run.queries(b)])
    uniform = [np.repeat(1 / n, n) for n in visible]
    close(found.uniform, [needed(uniform, share) for share in shares])


@given(
    st.lists(st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=9), min_size=1, max_size=5),
    st.floats(0.001, 1.0),
    st.sampled_from([1.0, 4.0, 0.001]),
)
def test_bounds_of_any_weights(rows, share, power):
    rows = [np.array(row) ** power / (np.array(row) ** power).sum() for row in rows]
    ds = with_histogram(EXAMPLE.ds, rows)
    found = coverage(ds, (share,)).isel(layer=0, head=0, mass=0)
    keys = needed(rows, share)
    assert float(found.least) - 1e-7 <= keys <= float(found.most) + 1e-7


EXAMPLE = Written(torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0)), None, CONFIG)


@pytest.mark.parametrize(
    ("rows", "share", "least", "most"),
    [
        # One bin whose weights are as large as can be: at the upper edge both bounds meet.
        ([[0.25] * 4], 0.5, 2, 2),
        # Two keys hold 0.75 + 0.2 exactly; the third bin is not begun.
        ([[0.75, 0.2, 0.05]], 0.95, 2, 2),
        # Two queries: one needs one key, the other two; together three of the four largest hold 75 % and more.
        ([[1.0], [0.5, 0.5]], 1.0, 1.5, 1.5),
        # 0.6 of a bin that holds 0.4 and 0.3 (and 0.3): between 0.6 · 2 keys, and 3 · 0.6.
        ([[0.4, 0.3, 0.3]], 0.6, 1.4, 1.8),
    ],
)  # fmt: skip
def test_bounds_by_hand(rows, share, least, most):
    found = coverage(with_histogram(EXAMPLE.ds, [np.array(row) for row in rows]), (share,)).isel(layer=0, head=0)
    close(found.least, [least])
    close(found.most, [most])


def test_rows_count_by_their_queries_and_layers_without_data_are_nan(run):
    ds = run.ds.copy(deep=True)
    ds.weight_count[1], ds.weight_mass[1] = np.nan, np.nan
    found = coverage(ds)
    assert np.isnan([found.least[1], found.most[1]]).all()
    close(found.least[0], coverage(run.ds).least[0])
    both = coverage(run.ds).most.values
    alone = [coverage(run.ds.isel(batch=[b])).most.values for b in range(2)]
    assert not np.allclose(both, np.mean(alone, 0), rtol=1e-4), "28 and 37 queries do not count alike"


@pytest.mark.parametrize("mass", [0, 1.5, (0.5, 0), True, (), (0.5, 0.5), "0.5", (0.9, np.nan)])
def test_bad_shares(mass, run):
    with pytest.raises(ValueError, match="mass: expected"):
        coverage(run.ds, mass)


def test_what_was_not_measured_is_named(run):
    with pytest.raises(ValueError, match=r"\['weight_mass'\] not measured.*statistics=\(…, \"weight_mass\"\)"):
        coverage(run.ds.drop_vars("weight_mass"))
