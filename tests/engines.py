"""The same tests for every engine, so that none is the only one to pass its own.

A test that takes the fixture ``engine`` runs once for each, and is given its module; ``-k native`` chooses one of them.
What an engine does not do it is asked itself.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import replace

import pytest
import torch
from calls import BOUND
from hypothesis import strategies as st

from llama_attn.stats.block import Wanted
from llama_attn.testing import relative_error

# Sizes of blocks: those that an engine chooses itself, and some that a few tokens fill; and any at all.
BLOCKS = ({}, {"block_rows": 1}, {"block_rows": 7}, {"tile_rows": 24, "block_keys": 64})
SIZES = st.fixed_dictionaries(
    {
        "block_rows": st.integers(1, 50),
        "tile_rows": st.integers(1, 200),
        "block_keys": st.sampled_from([64, 128, 512]),
    }
)


class On:
    """An engine whose calls are made on another device, from which their results are brought back."""

    def __init__(self, engine, device) -> None:
        self._engine, self._device = engine, device
        self.walk, self.backward = (functools.wraps(f)(self._moved(f)) for f in (engine.walk, engine.backward))

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def _moved(self, function):
        def moved(thing):
            if isinstance(thing, Wanted):
                names = ("segments", "tokens", "token_before", "keep")
                return replace(thing, **{name: moved(getattr(thing, name)) for name in names})
            return None if thing is None else thing.to(self._device)

        def back(thing):
            if isinstance(thing, dict):
                return {name: back(value) for name, value in thing.items()}
            return None if thing is None else thing.cpu()

        def call(*arguments, **sizes):
            result = function(*map(moved, arguments), **sizes)
            return type(result)(*map(back, result))

        return call


def taken(engine, sizes):
    """Those of ``sizes`` that the engine has."""
    has = inspect.signature(engine.walk).parameters
    return {name: size for name, size in sizes.items() if name in has}


def blocks(engine):
    """Each of `BLOCKS` whose sizes the engine has."""
    return [sizes for sizes in BLOCKS if taken(engine, sizes) == sizes]


def backend(engine) -> str:
    """The backend that runs on it whatever else is there."""
    return "streaming_" + engine.__name__.rpartition(".")[2]


def same(actual, expected) -> bool:
    """Whether every bit is, numbers that are none included."""
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())


def refused(engine, call) -> bool:
    """Whether the engine says that it does no such call; then the call itself must say the same."""
    reason = engine.refuses(call.visibility, call.scoring)
    channels = {call.query.shape[-1], call.value.shape[-1]}
    if hasattr(engine, "HEAD_DIMS") and (len(channels) > 1 or not channels <= set(engine.HEAD_DIMS)):
        reason = reason or "head_dim: the "
    if hasattr(engine, "DTYPES") and call.query.dtype not in engine.DTYPES:
        reason = reason or "dtype: the "
    if reason is None:
        return False
    with pytest.raises(ValueError, match=re.escape(reason)):
        call.walk(engine)
    return True


def check(engine, call, bound=None, *, sizes=None, gradients=True):
    """What is measured, the output and the gradients against float64, in blocks of several sizes; or the refusal."""
    if refused(engine, call):
        return
    dtype, known, real = call.query.dtype, call.known(engine), call.real_queries
    bound = bound or BOUND[dtype]
    expected, output = call.expected(known), call.reference().output.transpose(1, 2)[real]
    if dtype != torch.float64 or call.scoring.softcap is not None:
        # Below float64, and where a soft-cap flattens scores, the order of nearly equal weights is a matter of rounding.
        expected.pop("topk_position", None)
    if dtype != torch.float64:
        # So is the bin of a weight at the end of one: tests/test_engine_weights.py allows it either.
        expected.pop("weight_count", None)
        expected.pop("weight_mass", None)
    # Weights are off by ``bound`` relative to themselves, and the result is rounded once more to the dtype of values.
    of_output = bound * max(1.0, float(call.value.abs().max())) + torch.finfo(call.value.dtype).eps
    for some in blocks(engine) if sizes is None else [sizes]:
        walk = call.walk(engine, **some)
        assert set(walk.raw) == {statistic.name for statistic in known}
        values = call.finished(walk.raw, known)
        for name, right in expected.items():
            error = relative_error(values[name], right)
            assert error <= bound, (name, error, some)
        assert walk.output.dtype == call.value.dtype
        assert relative_error(walk.output[real], output) <= of_output, some
        assert not walk.output.isnan().any()
        if gradients:
            check_gradients(engine, call, walk, **some)


def check_gradients(engine, call, walk, **sizes):
    """The gradients of everything that the output is made of, each in the shape and dtype of what it is of."""
    shape, scoring, dtype = walk.output.shape, call.scoring, call.query.dtype
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) / shape[-1] ** 0.5
    of = (call.query, call.key, call.value, scoring.position_bias, scoring.sinks)
    leaves = [None if tensor is None else tensor.double().clone().requires_grad_() for tensor in of]
    there = [leaf for leaf in leaves if leaf is not None]
    expected = iter(torch.autograd.grad(call.written_out(*leaves), there, grad.double()))
    actual = engine.backward(
        grad, call.query, call.key, call.value, walk.output, walk.logsumexp, call.visibility, scoring, **sizes
    )
    for name, mine, tensor in zip(actual._fields, actual, of, strict=True):
        assert (mine is None) == (tensor is None), name
        if tensor is not None:
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
            error = relative_error(mine, next(expected))
            assert error <= BOUND[dtype], (name, error, sizes)
