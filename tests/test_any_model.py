"""`record` on every type of the zoo: statistics equal the oracle, and nothing of the model changes."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from pathlib import Path

import pytest
import torch
from any_expected import expected, gather
from any_model import state
from any_oracle import capture
from zoo import ENTRIES, NOT_SERVED, NOT_STREAMED
from zoo_situations import prepare

from llama_attn import AttentionStatsConfig, record
from llama_attn.stats.table import statistics_table
from llama_attn.testing import relative_error

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
CONFIG = AttentionStatsConfig(
    statistics="all", norms=True, map_size=4, sink_tokens=2, window=3, top_k=4, rows=slice(None, None, 3)
)
# Every situation on every backend takes a quarter of an hour: `make long`. Otherwise these have every situation on one of
# their backends, and the others one situation on each; which one goes round.
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
LEADERS = ("qwen2", "llama4_text", "gpt_oss", "qwen3_next", "bert", "t5", "gemma3")
BACKENDS = {
    entry.name: (*entry.stock, *(() if entry.name in NOT_STREAMED else ("streaming",))) for entry in ENTRIES.values()
}


def cases():
    """Name, backend and situation of every test."""
    turn = 0
    for entry in ENTRIES.values():
        backends = BACKENDS[entry.name]
        for at, situation in enumerate(entry.situations):
            for nth, backend in enumerate(backends):
                if LONG or (entry.name in LEADERS and at % len(backends) == nth):
                    yield entry.name, backend, situation
        for backend in () if LONG or entry.name in LEADERS else backends:
            yield entry.name, backend, entry.situations[turn % len(entry.situations)]
            turn += 1


CASES = list(cases())


def tensors(output):
    """What a forward gave, as one list."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


def is_close_to_another(weights, bound):
    """Whether a weight is that of its neighbour, or the last of those listed, whose next is not known."""
    close = weights.diff(dim=-1).abs() < bound
    no = torch.zeros_like(close[..., :1])
    return torch.cat([no, close], -1) | torch.cat([close, ~no], -1)


def check(stats, wanted, bound, label):
    """Every statistic within the bound; what the container must always hold."""
    errors = {}
    for name, value in wanted.items():
        if name == "topk_position":
            # Of weights that only rounding tells apart, either may be the larger.
            value = torch.where(is_close_to_another(wanted["topk_weight"], bound), stats[name], value)
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
    wanted = expected(found, recording.stats.names, CONFIG, stack)
    if stack.inside and len(forwards) > 1:
        # Which key is real, and the first or the next, differs from forward to forward.
        del wanted["sink_mass"], wanted["induction"]
    check(recording.stats, wanted, bound, "merged")


@pytest.mark.parametrize(("name", "backend", "situation"), CASES)
def test_every_statistic(name, backend, situation):
    entry = ENTRIES[name]
    is_stock = backend in entry.stock
    # In float64 the lowest number overflows in eager's softmax, so that rows of padding are NaN there.
    dtype = torch.float32 if is_stock or entry.stock == ("eager",) else torch.float64
    model = entry.build(backend, dtype)
    # What streaming is asked is captured from a stock backend, whose own rounding is that of float64.
    known, captured = oracle(entry, model if is_stock else entry.build(entry.stock[-1], dtype), situation)
    bound = BOUND[dtype]
    for n, stack in enumerate(entry.stacks):
        # Queries of padding, which see nothing, come to the encoder's keys with whatever a backend made of that.
        is_undefined = stack.cross and backend == "streaming" and situation == "left"
        if stack.axis != "pieces" and not is_undefined:
            has_default = n == 0 and entry.name != "siglip"
            recording = run(entry, model, situation, None if has_default else stack.path)
            compare(recording, entry, stack, model, known, captured, bound)


SELECTED = ("qwen3", "qwen2", "gpt_oss", "qwen3_next", "bert", "t5")


@pytest.mark.parametrize("name", SELECTED)
def test_segments_and_selections(name):
    """Part of the layers and heads, segments, and every third query."""
    entry = ENTRIES[name]
    stack = entry.stacks[0]
    model = entry.build(entry.stock[-1])
    known, captured = oracle(entry, model, "left")
    length = known.axes[stack.axis].real.shape[1]
    places = torch.arange(length).expand(2, -1)
    whole = dataclasses.replace(CONFIG, segments=places // 3, keep=places % 4 != 1)
    found = gather(model, captured, stack, known.axes, whole)
    layers, heads = (found.index[-1], found.index[0]), (3, 1)
    chosen = dataclasses.replace(whole, layers=tuple(sorted(set(layers))), heads=heads)
    recordings = []
    for config in (chosen, dataclasses.replace(chosen, query_stride=3)):
        with record(model, config) as recording:
            # A stack that it does not fit, as the encoder before a decoder, is not the one that is wanted.
            prepare(entry, model, "left").play()
        recordings.append(recording.stats)
    stats, strided = recordings
    assert {"segment_mass", "kept_mass", "row_weights"} <= set(stats.names)
    at = [found.index.index(layer) for layer in chosen.layers]
    every = expected(found, stats.names, whole, stack)
    wanted = {}
    for statistic in (statistics_table()[name] for name in stats.names if not name.startswith("visible_")):
        value = every[statistic.name]
        value = value if statistic.dims[0] == "hidden_layer" else value[at]
        wanted[statistic.name] = value[:, :, list(heads)] if "head" in statistic.dims else value
    # Which layers' input is measured follows the selection.
    wanted = {name: value for name, value in wanted.items() if value.shape == stats[name].shape}
    assert {"entropy", "segment_mass", "received", "weights_map", "value_norm"} <= set(wanted)
    check(stats, wanted, BOUND[torch.float32], "selected")
    thirds = {
        name: value[..., ::3] if value.ndim == 4 else value[..., ::3, :]
        for name, value in wanted.items()
        if statistics_table()[name].dims[3:4] == ("query",)
    }
    assert {"entropy", "segment_mass", "topk_weight"} <= set(thirds)
    check(strided, thirds, BOUND[torch.float32], "every third query")


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_refused(name):
    entry = NOT_SERVED[name]
    model = entry.build(entry.stock[0])
    if "get_interface" in Path(inspect.getfile(type(model))).read_text():
        pytest.skip("this transformers has brought it to the interface")
    with pytest.raises(ValueError, match="record: "), record(model):
        prepare(entry, model, "plain").play()


@pytest.mark.parametrize("name", NOT_STREAMED)
def test_what_streaming_refuses(name):
    """When it is built, and when its backend is set, which leaves it as it was."""
    entry = ENTRIES[name]
    with pytest.raises(ValueError, match=rf"do not serve .{name}.*\"sdpa\" or \"eager\""):
        entry.build("streaming")
    model = entry.build("sdpa")
    with pytest.raises(ValueError, match=rf"do not serve .{name}"):
        model.set_attn_implementation("streaming")
    assert model.config._attn_implementation == "sdpa"
