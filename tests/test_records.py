"""What the layers of a forward measured, laid side by side however it came."""

from __future__ import annotations

import pytest
import torch

from llama_attn.stats.records import SMALL, Layout, Raw, Records, Tables

NAMES = ("entropy", "max_logit")


def table(seed, rows=1, queries=3, names=NAMES, keys=7):
    """What some layers measured, one row each of the same tensors."""
    draw = torch.Generator().manual_seed(seed)
    layout = Layout(names, (2, 4, queries), {"received": (0, (2, 4, keys))})
    tables = Tables(
        torch.randn(rows, len(names) * 8 * queries, generator=draw),
        torch.randn(rows, 8 * keys, generator=draw),
    )
    return [Raw(tables, row, layout) for row in range(rows)]


def raw(seed, **sizes):
    """What a layer measured, in tensors of its own."""
    return table(seed, **sizes)[0]


def stacked(records, name, layers):
    return records.stacked([name], layers)[name]


def test_it_is_a_mapping():
    one = raw(0)
    assert dict(one).keys() == {*NAMES, "received"}
    assert len(one) == 3
    assert torch.equal(one["max_logit"], one.tables.both[0][0, 24:].view(2, 4, 3))
    assert torch.equal(one["received"], one.tables.both[1].view(2, 4, 7))
    assert "value_norm" not in one
    with pytest.raises(KeyError, match="value_norm"):
        one["value_norm"]


@pytest.mark.parametrize("queries", [3, SMALL], ids=["small", "large"])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1, 2)], ids=str)
def test_layers_side_by_side(order, together, offload, queries):
    records = Records(3, offload)
    raws = table(0, 3, queries) if together else [raw(layer, queries=queries) for layer in range(3)]
    for layer in (1, 0, 2):
        records.put(layer, raws[layer])
        assert records.has("entropy", layer)
    for name in raws[0]:
        expected = torch.stack([raws[layer][name] for layer in order])
        found = stacked(records, name, order)
        assert torch.equal(found, expected)


def test_layers_of_one_tensor_are_not_copied():
    records, raws = Records(3, None), table(0, 3)
    for layer, one in enumerate(raws):
        records.put(layer, one)
    for name, which in (("entropy", 0), ("received", 1)):
        found = stacked(records, name, (0, 1, 2))
        assert found.untyped_storage().data_ptr() == raws[0].tables.both[which].untyped_storage().data_ptr()


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
        assert torch.equal(stacked(records, name, (0, 1)), torch.stack([first[name], other[name]]))
    if first["received"].shape == other["received"].shape:
        assert torch.equal(stacked(records, "received", (0, 1)), torch.stack([first["received"], other["received"]]))
    else:
        with pytest.raises(RuntimeError, match=r"received: layers \[0, 1\] report in different shapes"):
            stacked(records, "received", (0, 1))
    assert torch.equal(stacked(records, "entropy", (0,))[0], first["entropy"])


def test_what_comes_later_counts():
    """From another engine, or once more."""
    records, first, second = Records(1, None), raw(0), raw(1)
    records.put(0, first)
    records.put(0, {"key_norm": torch.ones(2, 4)})
    assert torch.equal(stacked(records, "entropy", (0,))[0], first["entropy"])
    assert records.has("key_norm", 0)
    records.put(0, second)
    for name in second:
        assert torch.equal(stacked(records, name, (0,))[0], second[name]), name


def test_a_layer_that_is_missing():
    records = Records(2, None)
    records.put(0, raw(0))
    assert not records.has("entropy", 1)
    for name in ("entropy", "received"):
        with pytest.raises(RuntimeError, match=rf"{name}: layers \[1\] did not report"):
            stacked(records, name, (0, 1))
    assert stacked(records, "entropy", (0,)).shape == (1, 2, 4, 3)


def test_shapes_that_differ():
    records = Records(2, None)
    records.put(0, raw(0))
    records.put(1, raw(1, queries=5))
    with pytest.raises(RuntimeError, match=r"entropy: layers \[0, 1\] report in different shapes"):
        stacked(records, "entropy", (0, 1))
