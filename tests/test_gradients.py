"""The backward of the streaming backend, against sdpa's."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from llama_attn import AttentionStatsConfig
from llama_attn.backends.registry import attention_function
from llama_attn.engines import torch as engine
from llama_attn.testing import make_inputs


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed", "own_mask", "bidirectional"])
def test_equal_to_sdpas(kind, heads):
    model = tiny_model("sdpa", torch.float64, num_attention_heads=heads[0], num_key_value_heads=heads[1]).train()
    ids = torch.randint(3, 97, (2, 43), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if kind in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 13) if kind == "left" else slice(30, 43)] = 0
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    elif kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(20), torch.arange(23)])[None].expand(2, -1)
    elif kind == "own_mask":
        mask = torch.rand(2, 1, 43, 43, generator=torch.Generator().manual_seed(2)) < 0.5
        mask[:, :, range(43), range(43)] = True
        inputs["attention_mask"] = mask
    elif kind == "bidirectional":
        inputs["is_causal"] = False
    expected = gradients(model, **inputs)
    model.set_attn_implementation("streaming")
    actual = gradients(model, **inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
def test_observing_leaves_them_bit_identical(backend, ids, left_padding):
    model = tiny_model(backend).train()
    inputs = {"input_ids": ids, "attention_mask": left_padding, "labels": ids}
    off = gradients(model, **inputs)
    on = gradients(model, **inputs, output_attention_stats=AttentionStatsConfig(statistics="all", norms=True))
    assert all(torch.equal(on[name], gradient) for name, gradient in off.items())


def test_statistics_carry_no_gradient(ids):
    stats = tiny_model("streaming").train()(ids, output_attention_stats=True).attention_stats
    assert not any(tensor.requires_grad for tensor in stats.values.values())


def test_a_query_that_sees_nothing():
    """Its output is 0, and whatever its gradient is, it moves nothing."""
    inputs = make_inputs(queries=33, padding="left", dtype=torch.float64)
    walk = engine.walk(inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring)
    nothing = ~inputs.real_keys
    assert (walk.output[nothing] == 0).all()
    grad = torch.randn(walk.output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual, expected = (
        engine.backward(
            given, inputs.query, inputs.key, inputs.value, walk.output, walk.logsumexp, inputs.visibility,
            inputs.scoring,
        )[:3]
        for given in (grad, grad.masked_fill(nothing[..., None, None], 0))
    )  # fmt: skip
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing():
    """Neither around the forward nor around the backward: what reaches the backend keeps its precision."""
    inputs, results = make_inputs(queries=33), []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            attend = attention_function("streaming")
            output, _ = attend(torch.nn.Module(), *leaves, None, scaling=inputs.scaling, visibility=inputs.visibility)
            output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for on, off in zip(*results, strict=True):
        assert torch.equal(on, off)


def test_block_size_does_not_change_gradients():
    inputs = make_inputs(queries=63, padding="left", dtype=torch.float64)
    walk = engine.walk(inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring)
    results = [
        engine.backward(
            torch.ones_like(walk.output), inputs.query, inputs.key, inputs.value, walk.output, walk.logsumexp,
            inputs.visibility, inputs.scoring, block_rows=rows,
        )[:3]
        for rows in (1, 7, 64)
    ]  # fmt: skip
    for gradients_of_block in results[1:]:
        for actual, expected in zip(gradients_of_block, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
