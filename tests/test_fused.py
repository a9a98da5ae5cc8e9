"""The attention function of the streaming backends: what it takes, what it refuses, and how often it differentiates."""

from __future__ import annotations

from dataclasses import replace

import jaxtyping
import pytest
import torch
from conftest import tiny_model
from torch.autograd import forward_ad, functional

from llama_attn import engines
from llama_attn.backends.registry import attention_function
from llama_attn.engines import _fused, choose_engine, native, torch as torch_engine
from llama_attn.engines._fused import fused
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import make_inputs, relative_error

ENGINES = tuple(name for name in ("native", "torch") if name in engines._loaded)
CPU = torch.device("cpu")


@pytest.fixture(params=ENGINES)
def attend(request):
    return attention_function(f"streaming_{request.param}")


@pytest.fixture
def _no_shapes_checked():
    """Without the checks that tests put before every function, so that the functions' own answer."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(queries=9, keys=9, batch=2, heads=4, kv_heads=2, channels=8, value_channels=8):
    return (
        drawn(batch, heads, queries, channels, seed=1),
        drawn(batch, kv_heads, keys, channels, seed=2),
        drawn(batch, kv_heads, keys, value_channels, seed=3),
    )


def module_with(**fields):
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    for name, value in fields.items():
        setattr(module, name, value)
    return module.eval()


def written_out(query, key, value, mask=None, scaling=None, softcap=None, sinks=None, bias=None):
    """Attention as the textbook has it."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    keys = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :keys] @ value.repeat_interleave(group, 1)).transpose(1, 2)


@pytest.mark.parametrize("extent", [(9, 9), (5, 9), (9, 5), (1, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"is_causal": True}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_no_mask_means_what_it_means_to_sdpa(attend, extent, fields, is_causal):
    call = tensors(*extent)
    expected, _ = attention_function("sdpa")(module_with(**fields), *call, None, is_causal=is_causal)
    actual, weights = attend(module_with(**fields), *call, None, is_causal=is_causal)
    assert weights is None
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_as_a_tensor(attend, kind, shape):
    call = tensors(5, 9)
    mask = drawn(*shape, 5, 9, seed=4) < 0.4
    mask[..., 0] = True
    if kind == "additive":
        mask = drawn(*shape, 5, 9, seed=5).masked_fill(~mask, torch.finfo(torch.float64).min)
    actual, _ = attend(module_with(), *call, mask, scaling=0.3)
    assert relative_error(actual, written_out(*call, mask, 0.3)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_visibility_of_fewer_keys_than_there_are(engine):
    """A window in a static cache; the bias is as long as the cache."""
    query, key, value = tensors(9, 12)
    visibility = Visibility(2, 0, 9, CPU, first_key=torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 6]]))
    i, j = torch.arange(9)[:, None], torch.arange(12)
    bias = drawn(1, 1, 9, 12, seed=4)
    actual, _ = fused(query, key, value, visibility, Scoring(0.3, position_bias=bias), engine)
    expected = written_out(query, key, value, (j <= i) & (j > i - 3), 0.3, bias=bias)
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_what_models_say_of_scores(attend, name):
    """Values narrower than keys, a cap, sinks and a bias: output, and gradients of all that can learn."""
    query, key, value = tensors(5, 9, value_channels=3)
    learned = [query, key, value, drawn(4, seed=6), drawn(1, 4, 5, 9, seed=7)]
    results = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in learned]
        *call, sinks, bias = leaves
        if ours:
            mask = torch.ones(5, 9, dtype=torch.bool)[None, None]
            output, _ = attend(module_with(), *call, mask, softcap=2.0, position_bias=bias, **{name: sinks})
        else:
            output = written_out(*call, softcap=2.0, sinks=sinks, bias=bias)
        output.backward(drawn(*output.shape, seed=8))
        results.append([output, *(leaf.grad for leaf in leaves)])
    for mine, right in zip(*results, strict=True):
        assert relative_error(mine, right) < 1e-10


def test_a_mask_that_learns(attend):
    """As swin's relative positions do: no tensor of a model is left without its gradient."""
    call = tensors(5, 9)
    hidden = drawn(1, 1, 5, 9, seed=9) > 0.8
    results = []
    for ours in (True, False):
        learned = drawn(1, 4, 5, 9, seed=7).requires_grad_()
        mask = learned.masked_fill(hidden, torch.finfo(torch.float64).min)
        bias = drawn(1, 4, 1, 9, seed=8).expand(-1, -1, 5, -1)
        output = (
            attend(module_with(), *call, mask, position_bias=bias)[0] if ours else written_out(*call, mask, bias=bias)
        )
        output.backward(drawn(*output.shape, seed=8))
        results.append((output, learned.grad))
    for mine, right in zip(*results, strict=True):
        assert relative_error(mine, right) < 1e-10


def test_a_bias_alone_is_differentiated(attend):
    """Frozen projections and a bias or a sink that learns."""
    call = tensors()
    for name, shape in (("position_bias", (1, 4, 9, 9)), ("s_aux", (4,))):
        leaf = drawn(*shape, seed=5).requires_grad_()
        attend(module_with(), *call, **{name: leaf})[0].square().sum().backward()
        assert leaf.grad.abs().sum() > 0


@pytest.mark.usefixtures("_no_shapes_checked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "key: expected KV heads that divide the 4 query heads, got 0"),
        (lambda q, k, v: (q[:, :3], k, v), "key: expected KV heads that divide the 3 query heads, got 2"),
        (lambda q, k, v: (q, k, v[:, :1]), "value: expected batch, KV heads and tokens"),
        (lambda q, k, v: (q, k, v[:, :, :5]), "value: expected batch, KV heads and tokens"),
        (lambda q, k, v: (q, k, v[:1]), "value: expected batch, KV heads and tokens"),
        (lambda q, k, v: (q.repeat(1500, 1, 1, 1), k[:1], v[:1]), "key: expected batch 3000"),
        (lambda q, k, v: (q, k[..., :5], v), "key: expected batch 2 and 8 channels"),
        (lambda q, k, v: (q, k[:, :, :5], v[:, :, :5]), "visibility: expected batch 2, 9 queries and at most 5 keys"),
        (lambda q, k, v: (q[:, :, :5], k, v), "visibility: expected batch 2, 5 queries"),
        (lambda q, k, v: (q[0], k, v), "query: expected floats"),
        (lambda q, k, v: (q, k.long(), v), "key: expected floats"),
        (lambda q, k, v: (q, k, v.to("meta")), "value: expected a tensor on cpu, got one on meta"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_tensors_that_do_not_fit(engine, change, message):
    visibility = Visibility(2, 0, 9, CPU)
    call = change(*tensors())
    if call[0].shape[0] == 3000:
        visibility = Visibility(3000, 0, 9, CPU)
    for grad in (False, True):
        for tensor in call:
            tensor.requires_grad_(grad and tensor.is_floating_point())
        with pytest.raises(ValueError, match=message):
            fused(*call, visibility, Scoring(0.3), engine)


@pytest.mark.usefixtures("_no_shapes_checked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask: expected a tensor .* got \(2, 9\)"),
        (
            {"attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)},
            r"attention_mask: expected .* got \(3, 1, 9, 9\)",
        ),
        (
            {"attention_mask": torch.ones(2, 3, 9, 9, dtype=torch.bool)},
            r"attention_mask: expected .* got \(2, 3, 9, 9\)",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 9, 10, dtype=torch.bool)},
            r"attention_mask: expected .* got \(2, 1, 9, 10\)",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 8, 9, dtype=torch.bool)},
            r"attention_mask: expected .* got \(2, 1, 8, 9\)",
        ),
        ({"attention_mask": torch.ones(2, 1, 9, 9).long()}, "attention_mask: a 4-D mask must be bool or additive"),
        ({"s_aux": torch.zeros(3)}, r"sinks: expected one per head, \(4,\), got \(3,\)"),
        ({"sinks": torch.zeros(2, 4, 9, 1)}, "sinks: expected floats with 1 dimension"),
        ({"position_bias": torch.zeros(1, 3, 9, 9)}, "position_bias: expected"),
        ({"position_bias": torch.zeros(1, 4, 9, 8)}, "position_bias: expected"),
        ({"softcap": 0.0}, "softcap: expected None or a number above 0"),
        ({"softcap": -1.0}, "softcap: expected None or a number above 0"),
        ({"scaling": float("nan")}, "scale: expected a finite number"),
        ({"dropout": 0.1}, "attention dropout is not supported"),
        ({"indices": torch.zeros(2, 9, 3)}, r"who sees whom in \['indices'\], .*; use \"sdpa\" or \"eager\""),
        (
            {"block_indices": torch.zeros(2, 9, 3)},
            r"who sees whom in \['block_indices'\], .*; use \"sdpa\" or \"eager\"",
        ),
    ],
)
def test_arguments_that_do_not_fit(attend, changes, message):
    with pytest.raises(ValueError, match=message):
        attend(module_with(), *tensors(), **changes)


def test_who_does_what_the_default_engine_refuses(monkeypatch):
    """The engine in PyTorch; but who is asked for by name says why he does not."""
    visibility, scoring = Visibility(2, 0, 9, CPU), Scoring(0.3)
    assert choose_engine(None, visibility, scoring, CPU) == engines.default_engine(CPU)
    asked = []
    walk = torch_engine.walk
    monkeypatch.setattr(torch_engine, "walk", lambda *call: asked.append("torch") or walk(*call))
    monkeypatch.setattr(engines, "_loaded", engines._loaded | {"native": native})
    monkeypatch.setattr(
        native, "refuses", lambda visibility, scoring: "softcap: not today" if scoring.softcap else None
    )
    capped = replace(scoring, softcap=2.0)
    assert choose_engine(None, visibility, capped, CPU) == "torch"
    output, _ = attention_function("streaming")(module_with(), *tensors(), scaling=0.3, softcap=2.0)
    assert asked == ["torch"]
    assert relative_error(output, fused(*tensors(), visibility, capped, "torch")[0]) == 0
    with pytest.raises(ValueError, match="engine: 'native' refuses this call: softcap: not today"):
        choose_engine("native", visibility, capped, CPU)
    with pytest.raises(ValueError, match="engine: 'native' refuses this call: softcap: not today"):
        attention_function("streaming_native")(module_with(), *tensors(), softcap=2.0)
    assert choose_engine("native", visibility, scoring, CPU) == "native"


# Second derivatives: an error that names what to use, in whatever way they are asked for.

ONCE = "differentiated once, in backward mode; .*'eager' or 'sdpa'"


def attention_of(attend):
    return lambda query, key, value: attend(module_with(), query, key, value)[0]


def test_second_derivatives(attend):
    call, attention = tensors(), attention_of(attend)
    leaves = [tensor.clone().requires_grad_() for tensor in call]
    for leaf in leaves:
        with pytest.raises(RuntimeError, match=ONCE):
            torch.autograd.grad(attention(*leaves).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        attention(*leaves).sum().backward(create_graph=True)
    # A gradient of the output that depends on other things, which autograd's own mark for once does not cover.
    weight = drawn(2, 9, 4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.grad(attention(*leaves), leaves, weight, create_graph=True)


@pytest.mark.parametrize("product", ["hvp", "vhp", "hessian", "jvp"])
def test_products_with_the_second_derivative(attend, product):
    query, key, value = tensors(3, 3, batch=1)

    def loss(query):
        output = attention_of(attend)(query, key, value)
        return output if product == "jvp" else output.square().sum()

    arguments = (loss, query) if product == "hessian" else (loss, query, torch.ones_like(query))
    with pytest.raises(RuntimeError, match=ONCE):
        getattr(functional, product)(*arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, for forward mode
def test_forward_mode(attend):
    query, key, value = tensors(3, 3)
    with forward_ad.dual_level():
        for place in range(3):
            call = [query, key, value]
            call[place] = forward_ad.make_dual(call[place], torch.ones_like(call[place]))
            with pytest.raises(RuntimeError, match=ONCE):
                attention_of(attend)(*call)
        # A tensor that is constant is none of its business.
        assert attention_of(attend)(query, key, value).isfinite().all()
    for transform in (torch.func.jacfwd, torch.func.hessian, torch.func.grad):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(lambda query: attention_of(attend)(query, key, value).sum())(query)


def test_a_gradient_penalty(ids):
    """On embeddings, through a whole model: its second step was silently wrong."""
    model = tiny_model("streaming").train()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.grad(loss, embeddings, create_graph=True)
    model.set_attn_implementation("eager")
    loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_training_with_and_without_checkpoints(ids, reentrant):
    gradients = []
    for backend in ("sdpa", "streaming"):
        model = tiny_model(backend, torch.float64).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for mine, right in zip(*gradients, strict=True):
        assert relative_error(mine, right) < 1e-10


def test_the_mark_for_once_is_not_enough(monkeypatch):
    """Why the check is ours: what autograd offers lets a gradient through that takes the weights for constants."""
    ours = _fused.FusedAttention

    class Marked(ours):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *grads):
            return ours.backward(ctx, *grads)

    monkeypatch.setattr(_fused, "FusedAttention", Marked)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors()]
    output = attention_function("streaming_torch")(module_with(), *leaves)[0]
    (gradient,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
    assert not gradient.requires_grad


def test_autocast_and_half_precision_do_not_reach_the_engine(attend):
    inputs = make_inputs(dtype=torch.bfloat16)
    call = (inputs.query, inputs.key, inputs.value)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = attend(module_with(), *call, s_aux=torch.zeros(4, dtype=torch.bfloat16))
    expected = written_out(
        *(t.double() for t in call), torch.ones(7, 7, dtype=torch.bool).tril(), sinks=torch.zeros(4).double()
    )
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < torch.finfo(torch.bfloat16).eps
