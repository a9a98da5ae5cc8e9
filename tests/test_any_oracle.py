"""The oracle for any model is itself checked: against what attention returned, and what was asked of masks."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import oracle as own
import pytest
import torch
from any_expected import expected, gather
from any_oracle import capture, materialise, output_of, places, rounding
from zoo import ENTRIES, NOT_SERVED
from zoo_situations import prepare

from llama_attn import AttentionStatsConfig
from llama_attn.stats.table import statistics_table
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
def test_what_was_captured(name, backend, situation):
    entry, model, run, captured = played(name, backend, situation)
    assert {call.name for call in captured.calls} == {stack.path for stack in entry.stacks}
    for stack in entry.stacks:
        check_outputs(stack, captured, returns_weights=name != "granite_swa")
        if not stack.cross and stack.axis not in ("own", "pieces"):
            # Facts of transformers 5.23: minimax's own cache counts from 0 when it decodes.
            check_places(stack, captured, run, with_requests=name != "minimax")
        if stack.axis != "pieces":
            check_sums(stack, model, captured, run)


def check_outputs(stack, captured, returns_weights):
    """It gives what attention returned; eager's weights too, unless the sink is applied elsewhere."""
    for call in (call for calls in captured.of(stack) for call in calls):
        made = materialise(call)
        seen = made.visible.any(-1).expand(-1, call.query.shape[1], -1).transpose(1, 2)
        assert relative_error(output_of(call, made)[seen], call.output[seen]) < rounding(call)
        if call.weights is not None and returns_weights:
            rows = seen.transpose(1, 2)
            assert relative_error(made.weights[rows], call.weights[rows]) < rounding(call)


def check_places(stack, captured, run, with_requests):
    """A slot is where the mask interface was told that it is, and holds the key that stood there before."""
    remembered: dict[str, dict[int, torch.Tensor]] = {}
    forwards = captured.of(stack)
    for calls, spots in zip(forwards, places(forwards, stack, run.axes), strict=True):
        for call, place in zip(calls, spots, strict=True):
            if call.request is not None and with_requests:
                assert call.request["kv_offset"] == place.offset
                assert call.request["q_offset"] == place.start
            known = remembered.setdefault(call.path, {}) if not stack.shared else {}
            for slot in range(place.filled):
                key = known.setdefault(place.offset + slot, call.key[:, :, slot])
                assert torch.equal(key, call.key[:, :, slot]), f"slot {slot} does not hold {place.offset + slot}"


def check_sums(stack, model, captured, run):
    """Whatever the definitions, all weights of a real query and its learned sink are one."""
    config = AttentionStatsConfig(statistics="all", norms=True, map_size=4, sink_tokens=2, window=3)
    found = gather(model, captured, stack, run.axes, config)
    names = ["received_total", "distance_histogram", "sink_mass", "entropy", "logsumexp", "weights_map", "key_norm"]
    values = expected(found, names, config, stack)
    for n, layer in enumerate(found.layers):
        heads = layer.scores.shape[1]
        real = layer.real_queries[:, None].expand(-1, heads, -1)
        given = layer.weights.sum(-1) + layer.sink_weights
        assert relative_error(given[real], torch.ones_like(given[real])) < 1e-13
        counted = torch.where(real, layer.weights.sum(-1), 0).sum(-1)
        assert relative_error(values["received_total"][n][:, :heads].nansum(-1), counted) < 1e-12
        if not stack.cross:
            bins = values["distance_histogram"][n][:, :heads].sum(-1) * real.sum(-1)
            assert relative_error(bins, counted) < 1e-12
    assert found.index == (list(range(len(found.index))) if stack.layers is None else list(stack.layers))


@pytest.mark.parametrize("name", NOT_SERVED)
def test_those_that_are_refused_make_no_call(name):
    entry = NOT_SERVED[name]
    model = entry.build(entry.stock[0])
    if "get_interface" in Path(inspect.getfile(type(model))).read_text():
        pytest.skip("this transformers has brought it to the interface")
    with capture(model) as captured:
        prepare(entry, model, "plain").play()
    assert captured.calls == []


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "t5", "swin", "llava"])
def test_it_holds_in_double_precision(name):
    """Where it is the arithmetic of the formula that is compared, not its rounding."""
    _, _, _, captured = played(name, "sdpa", "plain", torch.float64)
    for call in captured.calls:
        made = materialise(call)
        assert relative_error(output_of(call, made), call.output) < 1e-13


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt_oss", {"s_aux": None}),
        ("gemma2", {"softcap": None}),
        ("t5", {"position_bias": None}),
        ("opt", {"scaling": None}),
        ("clip", {"is_causal": False}),
    ],
)
def test_the_check_can_fail(name, change):
    entry, _, _, captured = played(name, ENTRIES[name].stock[-1], "plain")
    call = next(call for call in captured.calls if call.name == entry.stacks[0].path)
    right = relative_error(output_of(call, materialise(call)), call.output)
    call.kwargs = call.kwargs | change
    assert right < rounding(call) < 1e-2 < relative_error(output_of(call, materialise(call)), call.output)


def test_the_rule_of_the_backend_matters():
    """No mask hides nothing from eager, and the future from sdpa where a module says that it is causal."""
    _, _, _, captured = played("llama", "sdpa", "plain")
    call = captured.calls[0]
    assert call.mask is None
    assert not materialise(call).visible[0, 0].triu(1).any()
    call.backend = "eager"
    assert materialise(call).visible.all()


@pytest.mark.parametrize("situation", ["plain", "left", "packed"])
def test_a_llama_has_the_statistics_of_its_own_oracle(situation):
    """The two were written from the definitions at different times."""
    entry, model, run, captured = played("llama", "sdpa", situation, torch.float64)
    axis, (stack,) = run.axes["ids"], entry.stacks
    segments = torch.arange(axis.real.shape[1]).expand(2, -1) // 5
    config = AttentionStatsConfig(
        statistics="all",
        norms=True,
        map_size=4,
        sink_tokens=2,
        window=3,
        top_k=20,
        segments=segments,
        rows=slice(2, None, 3),
        keep=segments[None, :, None].expand(-1, -1, 2, -1) != torch.tensor([1, 2])[:, None],
    )
    inputs = {"input_ids": axis.ids}
    if situation == "left":
        inputs["attention_mask"] = axis.real.long()
    if situation == "packed":
        inputs |= {"position_ids": _restarting(axis.sequence), "use_cache": False}
    names = list(statistics_table())
    layers, last = own.capture(own.stock_of(model), **inputs)
    wanted = own.expected(
        layers, last, config, names, real=axis.real, segments=segments, tokens=axis.ids,
        **({"sequences": axis.sequence} if situation == "packed" else {}),
    )  # fmt: skip
    found = expected(gather(model, captured, stack, run.axes, config), names, config, stack)
    assert set(found) == set(wanted)
    errors = {name: relative_error(found[name], value) for name, value in wanted.items()}
    assert max(errors.values()) < 1e-12, errors


def _restarting(sequence):
    same = sequence[:, :, None] == sequence[:, None, :]
    return same.tril().sum(-1) - 1
