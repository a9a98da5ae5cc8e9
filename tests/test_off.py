"""Statistics that are off cost nothing: the same operations of torch as in transformers' own class, in order."""

from __future__ import annotations

import pytest
import torch
from conftest import CACHE, tiny_model
from oracle import stock_of
from torch.profiler import ProfilerActivity, profile


def operations(call):
    """Name and input shapes of every operation of torch in ``call``, nested ones too, in the order they began."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        call()
    events = sorted(recorded.events(), key=lambda event: (event.time_range.start, -event.time_range.end))
    return [(event.name, event.input_shapes) for event in events if event.name.startswith("aten::")]


def calls(model, ids, **arguments):
    """A prefill, a token behind its cache, and a padded batch."""
    cache = model(ids, use_cache=True).past_key_values
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {
        "prefill": lambda: model(ids, use_cache=True, **arguments),
        "decode": lambda: model(ids[:, -1:], **{CACHE: cache}, **arguments),
        "padded": lambda: model(ids, attention_mask=mask, use_cache=False, **arguments),
    }


@pytest.mark.parametrize("what", ["prefill", "decode", "padded"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("arguments", [{}, {"output_attention_stats": False}], ids=["absent", "false"])
def test_same_operations_as_stock(backend, what, arguments, ids):
    model = tiny_model(backend)
    stock = operations(calls(stock_of(model), ids)[what])
    assert sum(name == "aten::linear" for name, _ in stock) == 3 * 7 + 1
    assert operations(calls(model, ids, **arguments)[what]) == stock


def test_statistics_are_seen(ids):
    """The comparison sees what measuring adds."""
    model = tiny_model("sdpa")
    stock = operations(calls(stock_of(model), ids)["prefill"])
    assert operations(calls(model, ids, output_attention_stats=True)["prefill"]) != stock
