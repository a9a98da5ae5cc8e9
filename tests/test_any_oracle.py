"""The oracle for any model is checked itself: against what attention returned, and against what masks were asked for."""

from __future__ import annotations

import warnings

import pytest
import torch
from any_expected import expected, gather
from any_oracle import capture, materialise, output_of, places
from zoo import ENTRIES, NOT_SERVED
from zoo_situations import prepare

from llama_attn import AttentionStatsConfig
from llama_attn.testing import relative_error

CASES = [
    (entry.name, backend, situation)
    for entry in ENTRIES.values() for backend in entry.stock for situation in entry.situations
]  # fmt: skip


def played(name, backend, situation, dtype=torch.float32):
    entry = ENTRIES[name]
    model = entry.build(backend, dtype)
    run = prepare(entry, model, situation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capture(model, entry.stacks) as captured:
            run.play()
    return entry, model, run, captured


@pytest.mark.parametrize(("name", "backend", "situation"), CASES)
def test_what_was_captured_gives_what_attention_returned(name, backend, situation):
    entry, _, run, captured = played(name, backend, situation)
    assert {call.name for call in captured.calls} == {stack.path for stack in entry.stacks}
    remembered: dict[str, dict[int, torch.Tensor]] = {}
    for stack in entry.stacks:
        forwards = captured.of(stack)
        for calls, spots in zip(forwards, places(forwards, stack, run.axes), strict=True):
            for call, place in zip(calls, spots, strict=True):
                made = materialise(call)
                seen = made.visible.any(-1).expand(-1, call.query.shape[1], -1).transpose(1, 2)
                assert relative_error(output_of(call, made)[seen], call.output[seen]) < 5e-6
                if call.weights is not None and name != "granite_swa":
                    weights = call.weights.double()
                    rows = seen.transpose(1, 2)
                    assert relative_error(made.weights[rows], weights[rows]) < 5e-6
                if stack.direction == "cross" or stack.axis in ("own", "pieces"):
                    continue
                if call.request is not None and name != "minimax":
                    asked = call.request
                    assert asked["kv_offset"] == place.offset
                    assert asked["q_offset"] == place.start
                known = remembered.setdefault(call.path, {}) if not stack.shared else {}
                for slot in range(place.filled):
                    position = place.offset + slot
                    key = known.setdefault(position, call.key[:, :, slot])
                    assert torch.equal(key, call.key[:, :, slot]), f"slot {slot} does not hold the key of {position}"


@pytest.mark.parametrize("name", NOT_SERVED)
def test_those_that_are_refused_make_no_call(name):
    entry = NOT_SERVED[name]
    model = entry.build(entry.stock[0])
    with capture(model) as captured:
        prepare(entry, model, "plain").play()
    assert captured.calls == []
