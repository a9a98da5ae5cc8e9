"""What the C++ library refuses by itself: extents, layouts and numbers that do not fit one another."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from llama_attn import AttentionStatsConfig
from llama_attn.engines import _library as library, native
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import make_inputs

pytestmark = pytest.mark.usefixtures("built_native")

KNOWN = tuple(statistic for statistic in statistics_table().values() if native.knows(statistic))
OPTIONAL = {
    "value", "mask", "position_bias", "real_keys", "real_queries", "rank", "sinks", "received", "distance_histogram",
    "weight_count", "weight_mass", "row_weights", "grad_position_bias",
}  # fmt: skip
STRIDED = {
    "query", "key", "value", "output", "mask", "position_bias", "grad_output", "grad_query", "grad_key", "grad_value",
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """A forward and a backward that describe every tensor there is: the calls that would be run, and what they hold."""
    made, held = {}, []
    monkeypatch.setattr(library, "run", lambda function, call: made.__setitem__(function, call))
    put = library.Call.put
    monkeypatch.setattr(library.Call, "put", lambda self, name, tensor: (held.append(tensor), put(self, name, tensor)))
    inputs = make_inputs(queries=6, cached=3, padding="left")
    generator = torch.Generator().manual_seed(0)
    visibility = Visibility(
        2, 3, 9, torch.device("cpu"), causal=False, real=inputs.real_keys, mask=torch.ones(2, 4, 6, 9, dtype=torch.bool),
        first_key=torch.zeros(1, 6, dtype=torch.int32), stop_key=torch.full((1, 6), 9, dtype=torch.int32),
    )  # fmt: skip
    scoring = Scoring(0.25, 30.0, torch.randn(1, 4, 6, 9, generator=generator), torch.zeros(4))
    tensors, keep = (inputs.query, inputs.key, inputs.value), torch.ones(2, 1, 9, dtype=torch.bool)
    held.append(native.walk(*tensors, visibility, scoring, Wanted(KNOWN, AttentionStatsConfig(), keep=keep)))
    native.backward(
        torch.zeros(2, 6, 4, 16), *tensors, torch.zeros(2, 6, 4, 16), torch.zeros(2, 4, 6), visibility, scoring
    )
    monkeypatch.undo()
    return made, held


def copied(call):
    return library.Call.from_buffer_copy(call)


def tensors_of(call):
    return [
        name for name, kind in library.Call._fields_ if kind is library.Tensor and getattr(call, name).data is not None
    ]


def refused(function, call, name=None):
    with pytest.raises(ValueError, match=name):
        library.run(function, call)


def test_the_calls_are_valid_and_complete(calls):
    made, _ = calls
    described = {name for call in made.values() for name in tensors_of(call)}
    assert described == {name for name, kind in library.Call._fields_ if kind is library.Tensor}
    for function, call in made.items():
        library.run(function, copied(call))


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_extents_that_a_tensor_does_not_have(function, calls):
    """One more or one less along any axis of any tensor; layouts, types and missing memory."""
    call = calls[0][function]
    for name in tensors_of(call):
        for axis in range(4):
            for change in (-1, 1):
                if name == "distance_histogram" and axis == 2:
                    continue  # the only extent that a tensor itself decides
                wrong = copied(call)
                getattr(wrong, name).size[axis] += change
                refused(function, wrong, name)
        wrong = copied(call)
        getattr(wrong, name).type = library.TYPES[torch.bool if name in ("rank", "row_places") else torch.int64]
        refused(function, wrong, name)
        if name not in OPTIONAL and (function, name) != ("forward", "row_logsumexp"):
            wrong = copied(call)
            getattr(wrong, name).data = None
            refused(function, wrong, "value_channels|value|" + name)
        if name not in STRIDED:
            wrong = copied(call)
            getattr(wrong, name).stride[0] += 1
            refused(function, wrong, name)


@pytest.mark.parametrize("function", ["forward", "backward"])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("batch", [-1, 1, 3, 2**62]),
        ("heads", [-1, 0, 3, 5, 8, 2**62]),
        ("kv_heads", [-1, 0, 1, 3, 4, 2**62]),
        ("num_queries", [-1, 5, 7, 2**62]),
        ("num_keys", [-1, 8, 10, 2**62]),
        ("channels", [-1, 0, 15, 17, 2**62]),
        ("value_channels", [-1, 15, 17, 2**62]),
        ("first_query", [-1, 2**62]),
        ("query_step", [-1, 0, 2**47, 2**62]),
        ("threads", [-1, 0, 2**62]),
        ("tile_rows", [-1, 0, 2**62]),
        ("block_keys", [-64, 0, 1, 63, 2**62]),
        ("sink_tokens", [-1, 2**62]),
        ("window", [-1, 2**62]),
    ],
)
def test_numbers_out_of_range(field, values, function, calls):
    for value in values:
        wrong = copied(calls[0][function])
        setattr(wrong, field, value)
        refused(function, wrong)


def test_a_place_that_does_not_exist(calls):
    for value in (-1, 11, 2**40):
        wrong = copied(calls[0]["forward"])
        wrong.entropy = value
        refused("forward", wrong, "place of a statistic")


@pytest.mark.parametrize("place", [-2, 6, 2**40])
def test_a_row_that_nobody_chose(place, calls):
    call = calls[0]["forward"]
    ctypes.c_int64.from_address(call.row_places.data + 8 * 3).value = place
    refused("forward", call, "place in row_weights")


@pytest.mark.parametrize(("first", "stop"), [(-1, 3), (0, 10), (5, 4), (2**31 - 1, 2**31 - 1)])
def test_spans_beyond_the_keys(first, stop, calls):
    call = calls[0]["forward"]
    for name, value in (("first_key", first), ("stop_key", stop)):
        ctypes.c_int32.from_address(getattr(call, name).data + 4 * 7).value = value
    for function in calls[0]:
        refused(function, calls[0][function] if function == "forward" else call, "first_key, stop_key")


def test_half_a_span(calls):
    wrong = copied(calls[0]["forward"])
    wrong.stop_key.data = None
    refused("forward", wrong, "first_key: not without stop_key")


def test_sizes_that_overflow():
    """Views of one number whose extents, multiplied, are more than there are numbers."""
    one = torch.zeros(1, 1, 1, 1)
    call = library.Call(
        batch=1, heads=2**40, kv_heads=2**40, num_keys=2**40, channels=2**40, first_query=0, query_step=1, threads=1,
        tile_rows=1, block_keys=64,
    )  # fmt: skip
    call.put("query", one)
    refused("forward", call, "too large to count")


def test_vectors_that_lie_elsewhere():
    """Refused, and not taken for ones that are not there."""
    inputs = make_inputs()
    call = (inputs.query, inputs.key, inputs.value)
    real = torch.ones(2, 7, dtype=torch.bool, device="meta")
    visibility = replace(inputs.visibility, real=real, sees=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"real_keys: the native engine takes .* on meta"):
        native.walk(*call, visibility, inputs.scoring)
    with pytest.raises(ValueError, match=r"sinks: the native engine takes .* on meta"):
        native.walk(*call, inputs.visibility, replace(inputs.scoring, sinks=torch.zeros(4, device="meta")))


def test_what_the_library_does_not_know():
    for tensor in (
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.int16),
        torch.zeros(1, 1, 1, 1, 1),
        torch.zeros(2, device="meta"),
        torch._efficientzerotensor(2),
    ):
        with pytest.raises(ValueError, match="key: the native engine takes up to four axes of"):
            library.Call().put("key", tensor)
