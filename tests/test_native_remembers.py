"""What the native engine remembers of the calls that share a visibility, and that it never shows.

Private to it, since no other engine remembers anything: its C interface is told again only what differs.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from calls import BOUND
from test_engine_layouts import ORDERS, ordered, sliced

from llama_attn import AttentionStatsConfig
from llama_attn.engines import native
from llama_attn.stats.block import Wanted
from llama_attn.stats.table import statistics_table
from llama_attn.testing import make_inputs

pytestmark = pytest.mark.usefixtures("built_native")


def in_steps(tensor):
    """Every second row of channels in memory, so that a copy lies otherwise."""
    return sliced(tensor, 2)


def test_calls_of_one_visibility():
    """Each is read by itself, whatever is remembered of the one before: other numbers, layouts, dtypes and requests."""
    inputs = make_inputs(cached=3, padding="left", dtype=torch.float64)
    visibility, scoring = inputs.visibility, inputs.scoring
    statistics = (*(statistics_table()[name] for name in ("entropy", "max_weight", "received", "distance_histogram")),)
    requests = [Wanted(statistics, AttentionStatsConfig()), Wanted(statistics[:1], AttentionStatsConfig()), None]
    tensors = (inputs.query, inputs.key, inputs.value)
    draw = torch.Generator().manual_seed(3)
    layouts = (lambda t: t, lambda t: ordered(t, ORDERS[7]), in_steps, lambda t: torch._neg_view(in_steps(-t)))
    kinds = itertools.product(requests, BOUND, (16, 8), layouts, (True, False))
    for wanted, dtype, width, layout, for_backward in kinds:
        for _ in range(2):
            call = [layout(t + torch.randn(t.shape, generator=draw, dtype=t.dtype)).to(dtype) for t in tensors]
            call[2] = call[2][..., :width]
            # A visibility of its own, of which nothing is known yet.
            apart = native.walk(*call, replace(visibility), scoring, wanted, for_backward)
            together = native.walk(*call, visibility, scoring, wanted, for_backward)
            assert torch.equal(together.output, apart.output)
            if for_backward:
                assert torch.equal(together.logsumexp, apart.logsumexp)
            assert list(together.raw) == list(apart.raw)
            assert all(torch.equal(together.raw[name], apart.raw[name]) for name in apart.raw)


def test_nothing_is_remembered_that_may_change():
    """Sinks are read anew, also where the engine needs them in another dtype."""
    inputs = make_inputs(dtype=torch.float32)
    visibility, scoring = inputs.visibility, replace(inputs.scoring, sinks=torch.zeros(4, dtype=torch.float64))
    tensors = (inputs.query, inputs.key, inputs.value)
    before = native.walk(*tensors, visibility, scoring).logsumexp
    scoring.sinks.fill_(3.0)
    after = native.walk(*tensors, visibility, scoring).logsumexp
    expected = torch.logaddexp(before.double(), torch.tensor(3.0).double())
    # The sink of before, exp(0), is taken out again.
    expected = (expected.exp() - 1).log()
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_call_on_tensors_without_memory():
    inputs = make_inputs(dtype=torch.float32)
    visibility, scoring = inputs.visibility, inputs.scoring
    native.walk(inputs.query, inputs.key, inputs.value, visibility, scoring)
    nothing = torch._efficientzerotensor(tuple(inputs.key.shape))
    with pytest.raises(ValueError, match="key: the native engine takes up to four axes"):
        native.walk(inputs.query, nothing, inputs.value, visibility, scoring)


def test_what_is_remembered_goes_with_the_visibility():
    inputs = make_inputs(padding="left")
    visibility = inputs.visibility
    native.walk(inputs.query, inputs.key, inputs.value, visibility, inputs.scoring)
    gone = weakref.ref(visibility)
    del visibility
    assert gone() is None
