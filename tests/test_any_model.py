"""`record` on every type of the zoo: statistics equal the oracle, and nothing of the model changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from any_expected import expected, gather
from any_oracle import capture
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import ENTRIES, NOT_SERVED
from zoo_situations import prepare

from llama_attn import AttentionStatsConfig, record
from llama_attn.testing import relative_error

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
CONFIG = AttentionStatsConfig(statistics="all", norms=True, map_size=4, sink_tokens=2, window=3, top_k=4)
CASES = [
    (entry.name, backend, situation)
    for entry in ENTRIES.values()
    for backend in entry.stock
    for situation in entry.situations
]


def tensors(output):
    """What a forward gave, as one list."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


def state(model):
    """Whatever a recording could leave behind."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs), sorted(vars(m)))
        for m in model.modules()
    ]
    mapping = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ALL_MASK_ATTENTION_FUNCTIONS}
    return (
        hooks,
        mapping,
        dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping),
        sorted(vars(ALL_ATTENTION_FUNCTIONS)),
        model.config.to_dict(),
    )


def check(stats, wanted, bound, label):
    """Every statistic within the bound; what the container must always hold."""
    errors = {}
    for name, value in wanted.items():
        if name.startswith("visible_") and stats[name].ndim > value.ndim:
            # Layers may see others, and as many.
            value = value.expand_as(stats[name])
        try:
            errors[name] = relative_error(stats[name], value)
        except AssertionError as error:
            errors[name] = str(error)
    wrong = {name: error for name, error in errors.items() if isinstance(error, str) or error > bound}
    assert not wrong, (label, wrong)


def run(entry, model, situation, stack=None):
    """Outputs, captured calls and recording of the same situation, three runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = prepare(entry, model, situation).play()
        before = state(model)
        with record(model, CONFIG, stack=stack) as recording:
            recorded = prepare(entry, model, situation).play()
        assert state(model) == before
        for a, b in zip(plain, recorded, strict=True):
            assert all(torch.equal(x, y) or x.isnan().any() for x, y in zip(tensors(a), tensors(b), strict=True))
    return recording


def oracle(entry, model, situation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = prepare(entry, model, situation)
        with capture(model, entry.stacks) as captured:
            known.play()
    return known, captured


def compare(recording, entry, stack, model, known, captured, bound):
    forwards = captured.of(stack)
    assert len(recording.forwards) == len(forwards)
    for n, stats in enumerate(recording.forwards):
        found = gather(model, captured, stack, known.axes, CONFIG, slice(n, n + 1))
        wanted = expected(found, stats.names, CONFIG, stack)
        assert tuple(stats.layers) == tuple(found.index)
        assert stats.first_key == found.first_key
        check(stats, wanted, bound, f"forward {n}")
    found = gather(model, captured, stack, known.axes, CONFIG)
    check(recording.stats, expected(found, recording.stats.names, CONFIG, stack), bound, "merged")


@pytest.mark.parametrize(("name", "backend", "situation"), CASES)
def test_stock(name, backend, situation):
    entry = ENTRIES[name]
    model = entry.build(backend)
    known, captured = oracle(entry, model, situation)
    for n, stack in enumerate(entry.stacks):
        if stack.axis == "pieces":
            continue
        recording = run(entry, model, situation, None if n == 0 and entry.family != "joint" else stack.path)
        compare(recording, entry, stack, model, known, captured, BOUND[torch.float32])


@pytest.mark.parametrize(("name", "situation"), sorted({(name, situation) for name, _, situation in CASES}))
def test_streaming(name, situation):
    entry = ENTRIES[name]
    stock = entry.build(entry.stock[-1], torch.float64)
    model = entry.build("streaming", torch.float64)
    known, captured = oracle(entry, stock, situation)
    bound = BOUND[torch.float64] if entry.stock[-1] == "sdpa" else 1e-5
    for n, stack in enumerate(entry.stacks):
        if stack.axis == "pieces":
            continue
        recording = run(entry, model, situation, None if n == 0 and entry.family != "joint" else stack.path)
        compare(recording, entry, stack, model, known, captured, bound)


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_refused(name):
    entry = NOT_SERVED[name]
    model = entry.build(entry.stock[0])
    with pytest.raises(ValueError, match="record: "), record(model):
        prepare(entry, model, "plain").play()
