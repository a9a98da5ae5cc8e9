"""What the layers of a forward measured, laid side by side however it came."""

from __future__ import annotations

import pytest
import torch

from llama_attn.stats.records import SMALL, Raw, Records

NAMES = ("entropy", "max_logit")


def raw(seed, queries=3, names=NAMES, keys=7):
    draw = torch.Generator().manual_seed(seed)
    return Raw(
        names,
        torch.randn(len(names), 2, 4, queries, generator=draw),
        {"received": torch.randn(2, 4, keys, generator=draw)},
    )


def test_it_is_a_mapping():
    one = raw(0)
    assert dict(one).keys() == {*NAMES, "received"}
    assert len(one) == 3
    assert torch.equal(one["max_logit"], one.rows[1])
    assert "value_norm" not in one
    with pytest.raises(KeyError, match="value_norm"):
        one["value_norm"]


@pytest.mark.parametrize("queries", [3, SMALL], ids=["small", "large"])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0)], ids=str)
def test_layers_side_by_side(order, offload, queries):
    records, raws = Records(3, offload), [raw(layer, queries) for layer in range(3)]
    for layer in (1, 0, 2):
        records.put(layer, raws[layer])
        assert records.has("entropy", layer)
    for name in raws[0]:
        expected = torch.stack([raws[layer][name] for layer in order])
        found = records.stacked(name, order)
        assert torch.equal(found, expected)
        assert found.is_contiguous()


@pytest.mark.parametrize(
    "other",
    [raw(5, names=NAMES[::-1]), raw(5, names=("entropy", "max_weight", "max_logit")), dict(raw(5)), raw(5, keys=9)],
    ids=["another order", "more of them", "one by one", "other keys"],
)
def test_layers_that_came_in_other_ways(other):
    records, first = Records(2, None), raw(0)
    records.put(0, first)
    records.put(1, other)
    for name in NAMES:
        assert torch.equal(records.stacked(name, (0, 1)), torch.stack([first[name], other[name]]))
    alike = first["received"].shape == other["received"].shape
    assert (records.stacked("received", (0, 1)) is not None) == alike
    assert records.stacked("entropy", (0,)) is not None


def test_what_comes_later_counts():
    """From another engine, or once more."""
    records, first, second = Records(1, None), raw(0), raw(1)
    records.put(0, first)
    records.put(0, {"key_norm": torch.ones(2, 4)})
    assert torch.equal(records.stacked("entropy", (0,))[0], first["entropy"])
    assert records.has("key_norm", 0)
    records.put(0, second)
    for name in second:
        assert torch.equal(records.stacked(name, (0,))[0], second[name]), name


def test_a_layer_that_is_missing():
    records = Records(2, None)
    records.put(0, raw(0))
    assert not records.has("entropy", 1)
    for name in ("entropy", "received"):
        with pytest.raises(RuntimeError, match=rf"{name}: layers \[1\] did not report"):
            records.stacked(name, (0, 1))
    assert records.stacked("entropy", (0,)).shape == (1, 2, 4, 3)


def test_shapes_that_differ():
    records = Records(2, None)
    records.put(0, raw(0))
    records.put(1, raw(1, queries=5))
    assert records.stacked("entropy", (0, 1)) is None
