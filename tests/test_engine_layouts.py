"""Every engine on tensors however they lie in memory: forward and backward against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from calls import BOUND, make_call
from engines import backend, check, taken

from llama_attn.backends.registry import attention_function
from llama_attn.testing import make_inputs, relative_error

ORDERS = tuple(itertools.permutations(range(4)))


def ordered(tensor, order):
    """The same numbers; the last axis of ``order`` is the one whose neighbours are adjacent in memory."""
    return tensor.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


def sliced(tensor, axis):
    """The same numbers with NaN in between and around, which nobody may read."""
    shape = list(tensor.shape)
    shape[axis] = 2 * shape[axis] + 3
    wide = tensor.new_full(shape, torch.nan)
    part = wide.narrow(axis, 1, 2 * tensor.shape[axis])[(slice(None),) * axis + (slice(None, None, 2),)]
    return part.copy_(tensor)


def expanded(tensor, *axes):
    """One of its slices, everywhere along ``axes``, with a stride of 0.

    Channels that are all the same make scores and gradients as many times larger; here they stay as large as they were.
    """
    one = tensor[tuple(slice(1 if axis in axes else None) for axis in range(4))]
    return (one / (tensor.shape[3] if 3 in axes else 1)).expand(tensor.shape)


LAYOUTS = {f"order {order}": lambda t, order=order: ordered(t, order) for order in ORDERS}
LAYOUTS |= {f"sliced along {axis}": lambda t, axis=axis: sliced(t, axis) for axis in range(4)}
LAYOUTS |= {f"expanded along {axis}": lambda t, axis=axis: expanded(t, axis) for axis in range(4)}
LAYOUTS["one number"] = lambda t: expanded(t, 0, 1, 2, 3)


def walk_and_gradients(engine, query, key, value, grad_output, inputs):
    sizes = taken(engine, {"block_rows": 12, "tile_rows": 12, "block_keys": 64})
    walk = engine.walk(query, key, value, inputs.visibility, inputs.scoring, **sizes)
    gradients = engine.backward(
        grad_output, query, key, value, walk.output, walk.logsumexp, inputs.visibility, inputs.scoring, **sizes
    )
    return walk.output, *gradients[:3]


def expected(query, key, value, grad_output, inputs):
    leaves = [tensor.double().clone().requires_grad_() for tensor in (query, key, value)]
    output = replace(inputs, query=leaves[0], key=leaves[1], value=leaves[2]).reference().output.transpose(1, 2)
    return output, *torch.autograd.grad(output, leaves, grad_output.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_output", "all"])
def test_any_layout(which, layout, engine):
    for dtype, channels in itertools.product(BOUND, (16, 24)):
        inputs = make_inputs(queries=70, cached=9, heads=4, head_dim=channels, padding="left", dtype=dtype)
        grad = torch.randn(2, 70, 4, channels, generator=torch.Generator().manual_seed(7)).to(dtype)
        tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "grad_output": grad}
        chosen = tensors if which == "all" else [which]
        tensors |= {name: LAYOUTS[layout](tensors[name]) for name in chosen}
        real = inputs.real_keys[:, 9:, None, None]
        # What a padding query gives is nobody's business.
        tensors["grad_output"] = tensors["grad_output"] if which in ("grad_output", "all") else grad * real
        actual, exact = walk_and_gradients(engine, **tensors, inputs=inputs), expected(**tensors, inputs=inputs)
        for name, mine, right in zip(("output", "query", "key", "value"), actual, exact, strict=True):
            assert relative_error(mine, right) <= BOUND[dtype], (name, dtype, channels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0)], ids=str)
def test_half_precision(order, dtype, engine):
    inputs = make_inputs(queries=70, heads=4, dtype=dtype)
    grad = torch.ones(2, 70, 4, 16, dtype=dtype)
    plain = walk_and_gradients(engine, inputs.query, inputs.key, inputs.value, grad, inputs)
    tensors = [ordered(tensor, order) for tensor in (inputs.query, inputs.key, inputs.value, grad)]
    for one, other in zip(walk_and_gradients(engine, *tensors, inputs), plain, strict=True):
        assert torch.equal(one, other)


def test_a_projection_whose_result_is_transposed(engine):
    """(W xᵀ)ᵀ: the tokens are adjacent in memory and the channels are not; the loss hands back an expanded gradient."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 33, 24, generator=generator)
    weights = [torch.randn(heads * 16, 24, generator=generator) / 5 for heads in (4, 2, 2)]
    results = []
    for name, dtype in (("sdpa", torch.float64), (backend(engine), torch.float32)):
        leaves = [weight.to(dtype).clone().requires_grad_() for weight in weights]
        states = hidden.to(dtype)
        query, key, value = ((leaf @ states.mT).mT.unflatten(-1, (-1, 16)).transpose(1, 2) for leaf in leaves)
        assert 1 not in (query.stride(-1), key.stride(-1), value.stride(-1))
        if name == "sdpa":
            output = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
        else:
            visibility = make_inputs(queries=33).visibility
            attend = attention_function(name)
            output, _ = attend(torch.nn.Module(), query, key, value, scaling=0.25, visibility=visibility)
        output.sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for right, mine in zip(*results, strict=True):
        assert relative_error(mine, right) <= BOUND[torch.float32]


def test_a_view_that_is_negated(engine):
    """Its numbers in memory have the other sign."""
    call = make_call()
    names = ("query", "key", "value")
    negated = {name: torch.complex(torch.zeros(()).double(), -getattr(call, name)).conj().imag for name in names}
    assert all(tensor.is_neg() for tensor in negated.values())
    check(engine, replace(call, **negated))
