"""Tensors that do not fit one another are refused by name, before an engine touches them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from calls import CPU, make_call

from llama_attn.engines._walk import check_call
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, CHANNELS = 2, 4, 2, 5, 9, 16


def call():
    made = make_call(queries=QUERIES, before=KEYS - QUERIES, channels=CHANNELS, value_channels=CHANNELS)
    return {name: getattr(made, name) for name in ("query", "key", "value", "visibility", "scoring")}


def unchecked(kind, **given):
    """An instance made as where nothing checks the types of arguments, which tests do."""
    instance = object.__new__(kind)
    for field in fields(kind):
        object.__setattr__(instance, field.name, given.get(field.name, field.default))
    instance.__post_init__()
    return instance


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def visibility(**changes):
    return Visibility(**{"batch": BATCH, "first_query": KEYS - QUERIES, "num_keys": KEYS, "device": CPU} | changes)


BAD = {
    "no KV heads": ("key: .*4 query heads, got 0", {"key": zeros(2, 0, 9, 16), "value": zeros(2, 0, 9, 16)}),
    "KV heads that do not divide": ("key: .*got 3", {"key": zeros(2, 3, 9, 16), "value": zeros(2, 3, 9, 16)}),
    "more KV heads than heads": ("key: .*got 8", {"key": zeros(2, 8, 9, 16), "value": zeros(2, 8, 9, 16)}),
    "fewer value heads": ("value: expected .*got", {"value": zeros(2, 1, 9, 16)}),
    "fewer values": ("value: expected .*got", {"value": zeros(2, 2, 8, 16)}),
    "values of another batch": ("value: expected .*got", {"value": zeros(1, 2, 9, 16)}),
    "keys of another batch": ("key: expected batch 2", {"key": zeros(1, 2, 9, 16), "value": zeros(1, 2, 9, 16)}),
    "fewer key channels": ("key: expected .*16 channels", {"key": zeros(2, 2, 9, 12)}),
    "a query of three dimensions": ("query: expected floats", {"query": zeros(2, 4, 80)}),
    "integers": ("key: expected floats", {"key": torch.zeros(2, 2, 9, 16, dtype=torch.long)}),
    "another device": ("key: expected a tensor on cpu", {"key": torch.empty(2, 2, 9, 16, device="meta")}),
    "no keys": ("visibility: .*0 keys", {
        "key": zeros(2, 2, 0, 16), "value": zeros(2, 2, 0, 16),
        "visibility": visibility(first_query=0, num_keys=0, stop_query=5, aligned=False, causal=False),
    }),
    "more visible keys than keys": ("visibility: .*at most 9 keys.*10 keys", {
        "visibility": visibility(num_keys=10, first_query=5),
    }),
    "a visibility of another batch": ("visibility: expected batch 2.*batch 3", {"visibility": visibility(batch=3)}),
    "a visibility of other queries": ("visibility: .*5 queries.*4 queries", {"visibility": visibility(first_query=5)}),
    "a mask of other heads": ("mask: expected 1 or 4 heads, got 2", {
        "visibility": visibility(mask=torch.ones(1, 2, 5, 9, dtype=torch.bool), causal=False),
    }),
    "sinks of other heads": ("sinks: expected .*4.*got .*2", {"scoring": Scoring(0.25, sinks=zeros(2))}),
    "a bias of other keys": ("position_bias: expected", {"scoring": Scoring(0.25, position_bias=zeros(1, 1, 5, 8))}),
    "a bias of other queries": ("position_bias: expected", {"scoring": Scoring(0.25, position_bias=zeros(1, 1, 9, 9))}),
    "a bias of other heads": ("position_bias: expected", {"scoring": Scoring(0.25, position_bias=zeros(1, 2, 5, 9))}),
    "a bias of another batch": ("position_bias: expected", {"scoring": Scoring(0.25, position_bias=zeros(3, 1, 5, 9))}),
}  # fmt: skip


def test_what_fits_is_taken():
    check_call(**call())
    check_call(**call() | {"value": None})
    check_call(**call() | {"value": zeros(2, 2, 9, 3), "scoring": Scoring(0.25, 3.0, zeros(1, 4, 5, 9), zeros(4))})
    check_call(**call() | {"visibility": visibility(num_keys=8, first_query=3)})


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_by_name(what):
    message, changes = BAD[what]
    with pytest.raises(ValueError, match=message):
        check_call(**call() | changes)


@pytest.mark.parametrize("what", BAD)
def test_the_engine_asks_first(what, engine):
    """Called as where nothing checks the shapes of its arguments, which tests do."""
    message, changes = BAD[what]
    tensors = call() | changes
    walk, backward = (getattr(function, "__wrapped__", function) for function in (engine.walk, engine.backward))
    with pytest.raises(ValueError, match=message):
        walk(*tensors.values())
    query, key, value, who, scoring = tensors.values()
    with pytest.raises(ValueError, match=message):
        backward(zeros(2, 5, 4, 16), query, key, value, zeros(2, 5, 4, 16), zeros(2, 4, 5), who, scoring)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("real: expected shape .2, 9.*got .2, 8", {"real": torch.ones(2, 8, dtype=torch.bool)}),
        ("real: expected bool, got torch.int64", {"real": torch.ones(2, 9, dtype=torch.long)}),
        ("sequence: expected shape", {"sequence": torch.zeros(1, 9, dtype=torch.long)}),
        ("sequence: expected integers", {"sequence": torch.zeros(2, 9)}),
        ("rows: expected shape", {"rows": torch.ones(3, dtype=torch.bool)}),
        ("sees: expected shape .2, 5", {"sees": torch.ones(2, 9, dtype=torch.bool)}),
        ("first_key: expected shape .1, 5. or .2, 5", {"first_key": torch.zeros(1, 9, dtype=torch.long)}),
        ("stop_key: expected integers, got torch.float32", {"stop_key": torch.zeros(1, 5)}),
        ("dropped: expected shape", {"dropped": torch.zeros(1, dtype=torch.long)}),
        ("mask: expected", {"mask": torch.ones(1, 1, 5, 8, dtype=torch.bool)}),
        ("mask: expected bool or additive floats", {"mask": torch.ones(1, 1, 5, 9, dtype=torch.long)}),
        ("stop_query: expected no more than num_keys=9, got 10", {"stop_query": 10}),
        ("aligned: ", {"aligned": False}),
        ("offset.*expected none below 0", {"offset": -1}),
        ("stride.*from 1 up", {"stride": 0}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_visibility_that_does_not_fit_itself(message, changes):
    sizes = {"batch": BATCH, "first_query": KEYS - QUERIES, "num_keys": KEYS, "device": CPU}
    with pytest.raises(ValueError, match=message):
        unchecked(Visibility, **sizes | changes)


@pytest.mark.parametrize("shape", [(5, 9), (3, 1, 5, 9)])
def test_a_mask_alone_of_the_wrong_shape(shape):
    function = getattr(Visibility.of_mask.__func__, "__wrapped__", Visibility.of_mask.__func__)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        function(Visibility, torch.ones(shape, dtype=torch.bool), batch=2, device=CPU)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("scale: expected a finite number, got nan", {"scale": float("nan")}),
        ("softcap: .*above 0, got 0", {"scale": 1.0, "softcap": 0.0}),
        ("softcap: .*above 0, got -3", {"scale": 1.0, "softcap": -3.0}),
        ("sinks: expected floats with 1 dimension", {"scale": 1.0, "sinks": zeros(2, 4)}),
        ("position_bias: expected floats", {"scale": 1.0, "position_bias": torch.ones(1, 1, 5, 9, dtype=torch.long)}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_scoring_that_cannot_be(message, arguments):
    with pytest.raises(ValueError, match=message):
        unchecked(Scoring, **arguments)


def test_parts_of_a_scoring():
    bias, sinks = torch.arange(40.0).view(1, 4, 5, 2), torch.arange(4.0)
    scoring = Scoring(0.5, 3.0, bias, sinks)
    assert not scoring.plain
    assert Scoring(0.5).plain
    chosen = scoring.of_heads((2, 0))
    assert torch.equal(chosen.position_bias, bias[:, [2, 0]])
    assert chosen.sinks.tolist() == [2, 0]
    assert replace(scoring, position_bias=bias[:, :1]).of_heads((2, 0)).position_bias.shape == (1, 1, 5, 2)
    assert torch.equal(scoring.of_queries(slice(1, None, 2)).position_bias, bias[:, :, [1, 3]])
    assert scoring.to("meta").sinks.device.type == scoring.to("meta").position_bias.device.type == "meta"
    learned = Scoring(0.5, None, bias.requires_grad_(), sinks.requires_grad_()).detach()
    assert not learned.position_bias.requires_grad
    assert not learned.sinks.requires_grad
