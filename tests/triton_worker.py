"""Checks of the triton engine against float64, run by test_triton.py with Triton's interpreter in a process of its own.

On a machine with a CUDA device ``python -m pytest -o addopts= tests/triton_worker.py`` runs the compiled kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import LARGE, make_call
from conftest import tiny_model
from engines import On, check
from oracle import rounding_bound, visible_by_hand
from test_engine_queries import (  # noqa: F401
    test_keys_behind_those_that_the_visibility_knows,
    test_no_queries,
    test_no_rows,
    test_only_what_is_wanted,
)
from test_engine_scoring import test_every_kind  # noqa: F401

from llama_attn import AttentionStatsConfig, available_backends
from llama_attn.engines import triton
from llama_attn.stats.block import Wanted
from llama_attn.stats.counts import Counts
from llama_attn.stats.labelling import mark_padding
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATISTICS = tuple(statistic for statistic in statistics_table().values() if triton.knows(statistic))

# Tiles have 32 rows and columns or more, so 63 and 130 end in the middle of one.
SITUATIONS = {
    "one query": {"queries": 1},
    "7 queries, head size 96": {"queries": 7, "head_dim": 96},
    "63 queries, head size 128, groups of 4": {"queries": 63, "head_dim": 128, "heads": 4},
    "130 queries, groups of 3": {"queries": 130, "heads": 3},
    "200 queries, narrow window": {"queries": 200, "heads": 1, "window": 5},
    "no groups": {"queries": 7, "kv_heads": 2},
    "one query, cache": {"queries": 1, "cached": 100, "head_dim": 96},
    "cache and left padding": {"queries": 5, "cached": 70, "padding": "left"},
    "left padding, many sinks": {"queries": 63, "padding": "left", "sink_tokens": 40},
    "right padding": {"queries": 63, "padding": "right"},
    "a row of padding": {"queries": 33, "padding": "all"},
    "padding in the middle": {"queries": 63, "padding": "middle", "sink_tokens": 3},
    "packed": {"queries": 100, "packed": True, "sink_tokens": 3},
    "packed and padded": {"queries": 63, "packed": True, "padding": "right"},
    "bidirectional": {"queries": 63, "causal": False},
    "bidirectional, packed and padded": {"queries": 63, "causal": False, "packed": True, "padding": "left"},
    "every third query": {"queries": 63, "cached": 10, "stride": 3},
    "window and sinks wider than the row": {"queries": 63, "window": 10**6, "sink_tokens": 10**6},
}


@pytest.fixture
def engine():
    """Of the tests that every engine passes, those that its interpreter has time for."""
    return On(triton, DEVICE)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random queries, keys and values, and who sees whom."""

    def __init__(
        self, dtype, *, queries, heads=2, kv_heads=1, batch=None, cached=0, head_dim=64, padding=None, packed=False,
        causal=True, stride=1, window=9, sink_tokens=2,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(queries + head_dim)
        keys = cached + queries
        batch = batch or (2 if padding or packed else 1)

        def draw(heads, length):
            return torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype).to(DEVICE)

        mask = torch.ones(batch, keys, dtype=torch.long)
        if padding:
            third = keys // 3
            parts = {"left": slice(third), "right": slice(-third, None), "middle": slice(third, 2 * third)}
            mask[0, parts.get(padding, slice(None))] = 0
        self.sequences = None
        if packed:
            self.sequences = (torch.rand(batch, keys, generator=generator) < 0.05).long().cumsum(-1)
        real = None if bool(mask.all()) else mask.bool()
        whole = Visibility(batch, cached, keys, torch.device("cpu"), causal, real=real)
        self.visibility = replace(whole, sequence=self.sequences).measured(stride=stride)
        # Wide enough that some rows attend to one key and others to many.
        self.query = 2 * draw(heads, queries)[:, :, self.visibility.query_slots - cached]
        # As they lie in memory after the projections: heads next to each other.
        self.key, self.value = (draw(kv_heads, keys).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(2))
        self.real, self.causal, self.scaling = mask.bool(), causal, head_dim**-0.5
        self.config = AttentionStatsConfig(window=window, sink_tokens=sink_tokens)

    def walk(self, value=True, statistics=STATISTICS):
        wanted = Wanted(statistics, self.config) if statistics else None
        visibility = self.visibility.to(DEVICE)
        return triton.walk(
            self.query, self.key, self.value if value else None, visibility, Scoring(self.scaling), wanted
        )

    def reference(self, **leaves) -> Reference:
        num_queries = self.key.shape[2] - self.visibility.first_query
        visible, real, rank, _ = visible_by_hand(self.real, num_queries, self.sequences, self.causal)
        rows = self.visibility.query_slots - self.visibility.first_query
        tensors = {name: getattr(self, name).double().cpu() for name in ("query", "key", "value")}
        return Reference(
            **(tensors | leaves), scaling=self.scaling, visible=visible[:, :, rows], real_queries=real[:, rows],
            rank=rank, query_slots=self.visibility.query_slots, config=self.config,
            bidirectional=not self.causal,
        )  # fmt: skip

    @property
    def bound(self) -> float:
        return rounding_bound(self.query, self.key)

    @property
    def half(self) -> float:
        """One unit in the last place, and 0 where nothing is rounded to half precision: Triton's interpreter cuts
        off; a GPU, which rounds to the nearest, does half of that.
        """
        return 0.0 if self.query.dtype == torch.float32 else torch.finfo(self.query.dtype).eps

    def check(self, walk) -> None:
        reference, counts = self.reference(), Counts.of(self.visibility)
        for statistic in STATISTICS:
            actual = walk.raw[statistic.name].cpu()[None].clone()
            if statistic.finish is not None:
                actual = statistic.finish(actual, counts, self.config)
            expected = mark_padding(statistic, statistic.textbook(reference)[None].clone(), counts)
            error = relative_error(mark_padding(statistic, actual, counts), expected)
            assert error <= self.bound, (statistic.name, error, self.bound)
        if walk.output is not None:
            assert walk.output.dtype == self.value.dtype
            # A real query's weights add to 1; each is rounded once, and so is the result. Rows without keys give 0.
            largest = max(1.0, float(self.value.abs().max()))
            allowed = (self.bound + self.half) * largest + max(self.half, torch.finfo(torch.float32).eps)
            error = relative_error(walk.output, reference.output.transpose(1, 2))
            assert error <= allowed, ("output", error, allowed)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_statistics_and_output(situation):
    case = Case(torch.float32, **SITUATIONS[situation])
    case.check(case.walk())


@pytest.mark.parametrize("kind", LARGE)
def test_several_tiles(kind, engine):
    """As test_many_blocks of the other engines, on half of the heads, since the interpreter is slow."""
    check(engine, make_call(**{"queries": 140} | LARGE[kind], heads=2, kv_heads=1, dtype=torch.float32))


@pytest.mark.parametrize("situation", ["7 queries, head size 96", "packed and padded"])
def test_observed(situation):
    case = Case(torch.float32, **SITUATIONS[situation])
    observed = case.walk(value=False)
    assert observed.output is None
    case.check(observed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", triton.HEAD_DIMS)
def test_half_precision(dtype, head_dim):
    case = Case(dtype, queries=63, cached=67, head_dim=head_dim, padding="left")
    case.check(case.walk())


def test_the_same_every_time():
    case = Case(torch.bfloat16, queries=63, padding="left")
    first, second = case.walk(), case.walk()
    assert torch.equal(first.output, second.output)
    for name, tensor in first.raw.items():
        assert torch.equal(tensor.nan_to_num(), second.raw[name].nan_to_num()), name


def test_the_check_can_fail():
    case = Case(torch.float32, queries=33, padding="left")
    case.visibility = replace(case.visibility, real=None)
    wrong = case.walk()
    case.visibility = replace(case.visibility, real=case.real)
    with pytest.raises(AssertionError):
        case.check(wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "situation",
    [
        "7 queries, head size 96", "63 queries, head size 128, groups of 4", "130 queries, groups of 3",
        "cache and left padding", "a row of padding", "packed and padded", "bidirectional, packed and padded",
    ],
)  # fmt: skip
def test_gradients(situation, dtype):
    case = Case(dtype, **SITUATIONS[situation])
    walk = case.walk(statistics=())
    grad_output = torch.randn(walk.output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    actual = triton.backward(
        grad_output, case.query, case.key, case.value, walk.output, walk.logsumexp, case.visibility.to(DEVICE),
        Scoring(case.scaling),
    )  # fmt: skip
    leaves = {n: getattr(case, n).double().cpu().requires_grad_() for n in ("query", "key", "value")}
    reference = case.reference(**leaves)
    grad = grad_output.double().cpu().transpose(1, 2)
    expected = torch.autograd.grad((reference.output * grad).sum(), list(leaves.values()))

    # Of the gradient dS = A (dA − Σ A dA), both terms are at most |dO| |v|. A is off by a relative `bound`; dA is a
    # sum of as many products as there are channels; the output in the second term, dS, and A have been rounded.
    eps, half = torch.finfo(torch.float32).eps, case.half
    relative = case.bound + case.query.shape[-1] * eps
    largest = float(grad.norm(dim=-1).max() * case.value.double().norm(dim=-1).max())
    scores = case.scaling * largest * (2 * relative + 3 * half)
    group = case.query.shape[1] // case.key.shape[1]
    received = reference.weights.detach().sum(-2).unflatten(1, (-1, group)).sum(2)[..., None]
    allowed = {
        "query": scores * case.key.double().abs().max().cpu(),
        "key": scores * case.query.double().abs().max().cpu() * received,
        "value": (relative + half) * grad.abs().max() * received,
    }
    for (name, allowance), tensor, exact in zip(allowed.items(), actual[:3], expected, strict=True):
        assert tensor.dtype == dtype
        error = (tensor.double().cpu() - exact).abs()
        excess = error - allowance - max(half, eps) * exact.abs() - torch.finfo(dtype).tiny
        assert (excess <= 0).all(), (name, float(error.max()), float(allowance.max()))


def model_with(backend, dtype=torch.float32):
    model = tiny_model(
        backend, dtype, num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=1, hidden_size=32
    )
    return model.to(DEVICE)


@pytest.mark.parametrize("backend", ["streaming_triton", "sdpa"])
def test_a_model(backend, ids, left_padding):
    """Fused, and observed beside sdpa; what the engine does not know comes from torch."""
    assert available_backends()["streaming_triton"] is None
    inputs = {"input_ids": ids.to(DEVICE), "attention_mask": left_padding.to(DEVICE)}
    asked = AttentionStatsConfig(statistics="all", engine="torch")
    with torch.no_grad():
        expected = model_with("streaming_torch")(**inputs, output_attention_stats=asked)
        model = model_with(backend)
        actual = model(**inputs, output_attention_stats=replace(asked, engine="triton"))
    real = left_padding.bool()
    assert actual.attention_stats.engine == "triton+torch"
    assert actual.attention_stats.names == expected.attention_stats.names
    # Both are float32 models, for which the error budget allows 1e-5 each against float64.
    assert relative_error(actual.logits.cpu()[real], expected.logits.cpu()[real]) < 2e-5
    for statistic in STATISTICS:
        one, other = (outputs.attention_stats[statistic.name] for outputs in (actual, expected))
        assert relative_error(one, other) < 2e-5, statistic.name


@pytest.mark.filterwarnings("ignore")  # Dynamo's, about transformers' own code
def test_a_compiled_model(ids):
    """The same numbers through the operator that stands for the walk in a graph."""
    model = model_with("streaming_triton")
    asked = AttentionStatsConfig(engine="triton")
    with torch.no_grad():
        expected = model(ids.to(DEVICE), output_attention_stats=asked)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = compiled(ids.to(DEVICE), output_attention_stats=asked)
    assert torch.equal(actual.logits, expected.logits)
    for statistic in expected.attention_stats.names:
        assert torch.equal(actual.attention_stats[statistic], expected.attention_stats[statistic]), statistic


def test_training_a_model(ids):
    gradients = []
    for backend in ("sdpa", "streaming_triton"):
        model = model_with(backend).train()
        model(ids.to(DEVICE), labels=ids.to(DEVICE)).loss.backward()
        gradients.append({name: parameter.grad.cpu() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "dtype: .*torch.float64.*streaming_torch"),
        ({"head_dim": 32}, r"head_dim: .*\[64, 96, 128\].* got 32 .*streaming_torch"),
    ],
    ids=str,
)
def test_what_it_refuses(changes, message):
    case = Case(changes.pop("dtype", torch.float32), queries=3, **changes)
    with pytest.raises(ValueError, match=message):
        case.walk()


def test_it_refuses_a_mask_of_the_users_own():
    case = Case(torch.float32, queries=3)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    case.visibility = Visibility.of_mask(mask, batch=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"attention_mask: .*\(2, 1, 3, 3\).*streaming_torch"):
        case.walk()


@pytest.mark.parametrize(
    "scores", [{"softcap": 3.0}, {"sinks": torch.zeros(2)}, {"position_bias": torch.zeros(1, 1, 3, 3)}], ids=str
)
def test_it_refuses_scores_that_are_not_plain(scores):
    case = Case(torch.float32, queries=3)
    (name,) = scores
    with pytest.raises(ValueError, match=f"{name}: the triton engine takes scores without; .*streaming_torch"):
        triton.walk(case.query, case.key, case.value, case.visibility.to(DEVICE), Scoring(0.1, **scores))
    assert name in triton.refuses(case.visibility, Scoring(0.1, **scores))


def test_it_refuses_mixed_types():
    case = Case(torch.float32, queries=3)
    case.key = case.key.half()
    with pytest.raises(ValueError, match=r"dtype: .*float16.*float32"):
        case.walk()
