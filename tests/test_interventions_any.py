"""Heads taken out of, and keys hidden from, every type of the zoo, in every situation that it is tested in."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from any_model import state
from any_oracle import NUMBER, capture, materialise, output_of, places, rounding
from torch import nn
from zoo import ENTRIES, NOT_STREAMED
from zoo_situations import prepare

from llama_attn import AttentionStatsConfig, ablate_heads, block_keys, record
from llama_attn.testing import relative_error

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
# Queries from the first on see what is kept of so many keys.
FIRST, LENGTH = 4, 7
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def backends(entry):
    return (*entry.stock, *(() if entry.name in NOT_STREAMED else ("streaming",)))


def cases(fits):
    """One situation of each type on one backend, which go round; all with `make long`."""
    turn = 0
    for entry in ENTRIES.values():
        if not fits(entry):
            continue
        every = [(name, backend) for name in entry.situations for backend in backends(entry)]
        chosen = every if LONG else [every[turn % len(every)]]
        yield from ((entry.name, backend, name) for name, backend in chosen)
        turn += 5


def play(entry, model, situation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = prepare(entry, model, situation).play()
    return [
        value
        for output in outputs
        for value in ([output] if isinstance(output, torch.Tensor) else output.values())
        if isinstance(value, torch.Tensor)
    ]


def projections(model, stack):
    """What takes the output of each attention layer, in the order of layers, and of how many heads."""
    found = []
    for path in [path for path, _ in model.named_modules() if NUMBER.sub("#", path) == stack.path]:
        if stack.layers and not stack.shared and int(NUMBER.findall(path)[0]) not in stack.layers:
            continue
        parts = path.split(".")
        for part in stack.output.split("/"):
            parts = parts[:-1] if part == ".." else parts + part.split(".")
        found.append(model.get_submodule(".".join(parts)))
    return found


def silence(module: nn.Module, head: int, width: int, turn: int, turns: int):
    """Zero what the projection gets of a head: the same as zeroing its columns, where one layer has them alone."""
    calls = []

    def hook(_, args):
        calls.append(1)
        if (len(calls) - 1) % turns != turn:
            return None
        states = args[0].clone()
        states[..., head * width : (head + 1) * width] = 0
        return (states, *args[1:])

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(("name", "backend", "situation"), list(cases(lambda entry: entry.stacks[0].output)))
def test_a_head_is_what_its_columns_of_the_projection_are(name, backend, situation):
    entry = ENTRIES[name]
    model, stack = entry.build(backend), entry.stacks[0]
    leaves = projections(model, stack)
    turns = len(stack.layers) if stack.shared else 1
    indices = stack.layers or tuple(range(len(leaves)))
    layer, at = indices[-1], len(indices) - 1
    plain, before = play(entry, model, situation), state(model)
    widths = []
    leaf = leaves[0 if stack.shared else at]
    handle = leaf.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    play(entry, model, situation)
    handle.remove()
    heads = heads_of(entry, stack, layer)
    handle = silence(leaf, 1, widths[0] // heads, at if stack.shared else 0, turns)
    expected = play(entry, model, situation)
    handle.remove()
    with ablate_heads(model, {layer: [1]}, stack=stack.path):
        found = play(entry, model, situation)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert situation == "generated" or not all(map(torch.equal, found, plain)), "a head that counts for something"
    assert state(model) == before
    again = play(entry, model, situation)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(again, plain, strict=True))


def heads_of(entry, stack, layer):
    """Query heads of a layer, as its attention is called."""
    model = entry.build(entry.stock[0])
    with capture(model, entry.stacks) as captured:
        play(entry, model, "plain")
    calls = captured.of(stack)[0]
    order = (stack.layers or tuple(range(len(calls)))).index(layer)
    return calls[order].query.shape[1]


def kept_by(keep, call, place):
    """Which slots each query may still see, (batch, 1, query, slot): written from the words of `block_keys`."""
    queries = place.start + torch.arange(call.query.shape[2])
    slots = place.offset + torch.arange(call.key.shape[2])
    inside = slots < LENGTH
    allowed = torch.ones(keep.shape[0], 1, len(queries), len(slots), dtype=torch.bool)
    allowed[..., inside] = keep[:, None, None, slots[inside]]
    return allowed | (slots == queries[:, None]) | (queries < FIRST)[:, None]


def by_own_mask(entry):
    """Types whose masks do not depend on what attention gave before."""
    return not entry.stacks[0].inside and entry.stacks[0].axis in ("ids", "decoder")


@pytest.mark.parametrize(
    ("name", "backend", "situation"), [case for case in cases(by_own_mask) if case[1] != "streaming"]
)
def test_keys_are_hidden_as_a_mask_would_hide_them(name, backend, situation):
    entry = ENTRIES[name]
    # Eager takes its softmax in float32 whatever the model is.
    dtype = torch.float64 if backend == "sdpa" else torch.float32
    model, stack = entry.build(backend, dtype), entry.stacks[0]
    keep = torch.tensor([[True, False, True, False, False, True, False], [False, True, True, False, True, False, True]])
    with capture(model, entry.stacks) as captured:
        play(entry, model, situation)
    plain = captured.of(stack)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = prepare(entry, model, situation)
    config = AttentionStatsConfig(statistics=("max_weight",))
    with (
        capture(model, entry.stacks) as captured,
        block_keys(model, keep, first_query=FIRST, stack=stack.path),
        record(model, config, stack=stack.path) as recording,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        run.play()
    blocked = captured.of(stack)
    real = run.axes[stack.axis].real
    where = places(plain, stack, run.axes)
    assert len(blocked) == len(plain) == len(recording.forwards)
    hidden = 0
    for before, after, spots, stats in zip(plain, blocked, where, recording.forwards, strict=True):
        for layer, (call, changed, place) in enumerate(zip(before, after, spots, strict=True)):
            expected = materialise(call).visible & kept_by(keep, call, place)
            made = materialise(changed)
            assert torch.equal(*torch.broadcast_tensors(made.visible, expected))
            hidden += int((materialise(call).visible & ~expected).sum())
            none = ~expected.any(-1).any(1)[..., None, None]
            written_out = output_of(changed, made).masked_fill(none, 0)
            assert relative_error(changed.output.masked_fill(none, 0), written_out) < rounding(changed)
            # Of real queries, record measures the weights of what is left.
            queries = slice(place.start, place.start + call.query.shape[2])
            own = real[:, queries] & expected.any(-1).any(1)
            found = stats["max_weight"][layer]
            assert torch.equal(found.isnan().all(1), ~own)
            wanted = made.weights.amax(-1).masked_fill(~own[:, None], 0)
            assert relative_error(found.nan_to_num(), wanted) < BOUND[dtype]
    assert hidden > 0


@pytest.mark.parametrize(
    ("name", "situation"),
    [(entry.name, entry.situations[at % len(entry.situations)]) for at, entry in enumerate(ENTRIES.values())
     if by_own_mask(entry) and entry.name not in NOT_STREAMED],
)  # fmt: skip
def test_streaming_hides_what_the_others_hide(name, situation):
    entry = ENTRIES[name]
    stack = entry.stacks[0]
    keep = torch.tensor([[True, False, True, False, False, True, False], [False, True, True, False, True, False, True]])
    outputs = []
    for backend in (entry.stock[-1], "streaming"):
        model = entry.build(backend, torch.float64)
        with block_keys(model, keep, first_query=FIRST, stack=stack.path):
            outputs.append(play(entry, model, situation))
    for theirs, mine in zip(*outputs, strict=True):
        rows = (
            ~(theirs.isnan() | mine.isnan())
            if theirs.is_floating_point()
            else torch.ones_like(theirs, dtype=torch.bool)
        )
        if situation in ("left", "right", "cached_left"):
            # What padding gives is nobody's.
            continue
        bound = 1e-8 if entry.stock[-1] == "sdpa" else 1e-4
        assert relative_error(mine[rows].double(), theirs[rows].double()) < bound
