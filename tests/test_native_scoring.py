"""The C++ engine on every way to score and to see: statistics, output and gradients against float64."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest
import torch

from llama_attn import AttentionStatsConfig
from llama_attn.engines import _library as library, native
from llama_attn.stats.block import Wanted
from llama_attn.stats.recorder import mark_padding
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import relative_error

KNOWN = tuple(statistic for statistic in statistics_table().values() if native.knows(statistic))
CPU = torch.device("cpu")
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
CONFIG = AttentionStatsConfig(sink_tokens=3, window=11)
BATCH, HEADS, KV_HEADS = 2, 6, 2


@pytest.fixture(scope="module", autouse=True)
def _built():
    try:
        library.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    library.build()


@dataclass
class Situation:
    """Who sees whom, told to the engine and, pair by pair, to the reference.

    Args:
        queries: Slots of the queries.
        keys: Number of keys.
        pairs: Who sees whom but for padding, (1 or batch, query, key).
        told: Further fields of the visibility.
        real: Keys that are no padding, (batch, key).
        rank: Real keys of the same sequence before each, (batch, key); by default counted from ``offset``.
        both_sides: Whether distances count to both sides.
    """

    queries: range
    keys: int
    pairs: torch.Tensor
    told: dict
    real: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    both_sides: bool = False

    @property
    def visibility(self) -> Visibility:
        extent = {"causal": not self.both_sides, "real": self.real, "stride": self.queries.step} | self.told
        return Visibility(BATCH, self.queries.start, self.keys, CPU, **extent)

    @property
    def visible(self) -> torch.Tensor:
        """(batch, query, key)."""
        real = torch.ones(BATCH, self.keys, dtype=torch.bool) if self.real is None else self.real
        return self.pairs & real[:, None]

    def reference(self, query, key, value, scoring, visible=None) -> Reference:
        offset = self.told.get("offset", 0)
        rank = torch.arange(offset, offset + self.keys).expand(BATCH, -1) if self.rank is None else self.rank
        if self.real is not None and self.rank is None:
            rank = self.real.long().cumsum(-1) - 1 + offset
        if self.real is not None:
            rank = torch.where(self.real, rank, CONFIG.sink_tokens)
        return Reference(
            query, key[:, :, : self.keys], value[:, :, : self.keys], scoring.scale,
            (self.visible if visible is None else visible)[:, None], real_queries=self.real_queries, rank=rank,
            query_positions=torch.tensor(self.queries), config=CONFIG, bidirectional=self.both_sides,
            bias=scoring.position_bias, softcap=scoring.softcap, sinks=scoring.sinks, offset=offset,
        )  # fmt: skip

    @property
    def real_queries(self) -> torch.Tensor:
        sees = self.visible.any(-1)
        if self.real is None or not self.told.get("aligned", True):
            return sees
        return sees & self.real[:, torch.tensor(self.queries)]


def spans(queries, first, stop):
    """Fields of a visibility, the same for every row."""
    numbers = [[first(i) for i in queries], [stop(i) for i in queries]]
    first_key, stop_key = torch.tensor(numbers, dtype=torch.int32)[:, None]
    return {"first_key": first_key, "stop_key": stop_key}


def windowed(queries, keys, window, **changes):
    """Causal, each query sees the last ``window`` keys."""
    i, j = torch.tensor(queries)[:, None], torch.arange(keys)
    told = spans(queries, lambda i: max(0, i - window + 1), lambda i: i + 1) | changes.pop("told", {})
    if queries.stop != keys:
        told["stop_query"] = queries.stop
    return Situation(queries, keys, ((j <= i) & (j > i - window))[None], told, **changes)


def padding(keys, left=0, right=0):
    real = torch.ones(BATCH, keys, dtype=torch.bool)
    real[0, :left] = False
    real[0, keys - right :] = False
    return real


def situations():
    i, j = torch.arange(90)[:, None], torch.arange(90)
    documents = torch.tensor([[0] * 20 + [1] * 45 + [2] * 25, [0] * 70 + [1] * 20])
    packed = documents[:, :, None] == documents[:, None]
    rank = torch.stack([torch.cat([torch.arange(int(n)) for n in torch.bincount(row)]) for row in documents])
    keys_of_encoder = torch.ones(1, 90, 40, dtype=torch.bool)
    nobody = windowed(range(90), 90, 9)
    nobody.pairs = nobody.pairs & ((i < 30) | (i >= 65))
    nobody.told = spans(
        range(90),
        lambda i: max(30, i - 8) if 30 <= i < 65 else max(0, i - 8),
        lambda i: max(30, i - 8) if 30 <= i < 65 else i + 1,
    )
    return {
        "causal": Situation(range(90), 90, (j <= i)[None], {}),
        "left padding": Situation(range(90), 90, (j <= i)[None], {}, padding(90, left=70)),
        "window": windowed(range(90), 90, 9),
        "window wider than a block": windowed(range(300), 300, 150),
        "window, left padding": windowed(range(90), 90, 9, real=padding(90, left=33)),
        "window and a cache": windowed(range(60, 90), 90, 17),
        "window, the cache has dropped keys": windowed(range(16, 26), 26, 17, told={"offset": 64}),
        "one query, the cache has dropped a sink": windowed(range(8, 9), 9, 9, told={"offset": 1}),
        "window, every third query": windowed(range(0, 90, 3), 90, 9),
        "window, queries end before the keys": windowed(range(20, 60), 90, 9),
        "chunks": Situation(
            range(90), 90, ((j <= i) & (j // 16 == i // 16))[None], spans(range(90), lambda i: i // 16 * 16, lambda i: i + 1)
        ),
        "window to both sides": Situation(
            range(90), 90, ((j - i).abs() < 9)[None], spans(range(90), lambda i: max(0, i - 8), lambda i: min(90, i + 9)),
            padding(90, right=20), both_sides=True,
        ),
        "packed": Situation(range(90), 90, (j <= i) & packed, {"sequence": documents}, rank=rank),
        "packed, window": windowed(range(90), 90, 9, told={"sequence": documents}, rank=rank),
        "some see nothing": nobody,
        "cross": Situation(
            range(90), 40, keys_of_encoder, {"stop_query": 90, "aligned": False}, padding(40, right=7), both_sides=True
        ),
        "cross, few queries": Situation(
            range(5), 40, keys_of_encoder[:, :5], {"stop_query": 5, "aligned": False}, both_sides=True
        ),
    }  # fmt: skip


SITUATIONS = situations()
SITUATIONS["packed, window"].pairs = SITUATIONS["packed, window"].pairs & SITUATIONS["packed"].pairs
SCORINGS = {
    "plain": (),
    "softcap": ("softcap",),
    "sinks": ("sinks",),
    "bias": ("position_bias",),
    "everything": ("softcap", "sinks", "position_bias"),
}


def draw(situation, ways, channels=16, value_channels=16, dtype=torch.float64, seed=0, heads=HEADS, kv_heads=KV_HEADS):
    """Query, key, value, the gradient of the output, and how scores are made."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    queries, keys = len(situation.queries), situation.keys
    query, key = 2 * normal(BATCH, heads, queries, channels), normal(BATCH, kv_heads, keys, channels)
    value, grad = normal(BATCH, kv_heads, keys, value_channels), normal(BATCH, queries, heads, value_channels)
    scoring = Scoring(
        channels**-0.5,
        3.0 if "softcap" in ways else None,
        normal(1, heads, queries, keys) if "position_bias" in ways else None,
        2 * normal(heads) if "sinks" in ways else None,
    )
    return query, key, value, grad / value_channels**0.5, scoring


def check_statistics(situation, query, key, value, scoring, sizes=(24, 64)):
    """Compare what is measured, and the output; return the walk."""
    bound = BOUNDS[query.dtype]
    visibility, reference = situation.visibility, situation.reference(query, key, value, scoring)
    walk = native.walk(query, key, value, visibility, scoring, Wanted(KNOWN, CONFIG), *sizes)
    assert set(walk.raw) == {statistic.name for statistic in KNOWN}
    for statistic in KNOWN:
        if statistic.of_distance and not visibility.aligned:
            continue
        actual = walk.raw[statistic.name][None]
        if statistic.finish is not None:
            actual = statistic.finish(actual, visibility, CONFIG)
        expected = mark_padding(statistic, statistic.textbook(reference)[None].clone(), visibility)
        error = relative_error(mark_padding(statistic, actual.clone(), visibility), expected)
        assert error <= bound, (statistic.name, error)
    real = situation.real_queries
    assert relative_error(walk.output[real], reference.output.transpose(1, 2)[real]) <= bound
    return walk


def check_gradients(situation, query, key, value, grad, scoring, walk, sizes=(24, 64)):
    sees = situation.visible.any(-1)
    tensors = [query, key, value, scoring.position_bias, scoring.sinks]
    leaves = [None if tensor is None else tensor.double().clone().requires_grad_() for tensor in tensors]
    # A row that sees nothing would give NaN, and gives nothing.
    reference = situation.reference(
        *leaves[:3], replace(scoring, position_bias=leaves[3], sinks=leaves[4]), situation.visible | ~sees[..., None]
    )
    output = reference.output.transpose(1, 2) * sees[:, :, None, None]
    there = [leaf for leaf in leaves if leaf is not None]
    expected = torch.autograd.grad(output, there, grad.double())
    actual = native.backward(
        grad, query, key, value, walk.output, walk.logsumexp, situation.visibility, scoring, *sizes
    )  # fmt: skip
    assert [gradient is None for gradient in actual] == [leaf is None for leaf in leaves]
    names = [name for name, leaf in zip(actual._fields, leaves, strict=True) if leaf is not None]
    for name, mine, right in zip(names, (g for g in actual if g is not None), expected, strict=True):
        assert mine.dtype == query.dtype
        error = relative_error(mine, right)
        assert error <= BOUNDS[query.dtype], (name, error)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("way", SCORINGS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_equals_float64(name, way, dtype):
    situation = SITUATIONS[name]
    query, key, value, grad, scoring = draw(situation, SCORINGS[way], dtype=dtype)
    walk = check_statistics(situation, query, key, value, scoring)
    check_gradients(situation, query, key, value, grad, scoring, walk)
    # However the work is cut, and whatever is asked for.
    plain = native.walk(query, key, value, situation.visibility, scoring)
    assert relative_error(plain.output, walk.output) <= BOUNDS[dtype]
    assert relative_error(plain.logsumexp, walk.logsumexp) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("channels", "value_channels"), [(12, 6), (6, 12), (192, 128), (256, 256), (320, 64), (576, 512), (1, 1), (80, 576)]
)
def test_head_sizes(channels, value_channels, dtype):
    situation = SITUATIONS["window"]
    drawn = draw(situation, SCORINGS["everything"], channels, value_channels, dtype, heads=4, kv_heads=1)
    query, key, value, grad, scoring = drawn
    walk = check_statistics(situation, query, key, value, scoring, (48, 512))
    check_gradients(situation, query, key, value, grad, scoring, walk, (48, 512))


def test_as_many_heads_as_a_latent_attention_has():
    """128 query heads that share one key: more rows in a tile than it should have."""
    situation = SITUATIONS["window"]
    query, key, value, grad, scoring = draw(situation, SCORINGS["sinks"], heads=128, kv_heads=1)
    walk = check_statistics(situation, query, key, value, scoring)
    check_gradients(situation, query, key, value, grad, scoring, walk)


@pytest.mark.parametrize("shape", [(1, 1), (1, HEADS), (BATCH, 1), (BATCH, HEADS)], ids=str)
def test_a_bias_that_is_shared(shape):
    situation = SITUATIONS["causal"]
    query, key, value, grad, scoring = draw(situation, ())
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(*shape, 90, 90, generator=generator, dtype=torch.float64).mT
    scoring = replace(scoring, position_bias=bias)
    walk = check_statistics(situation, query, key, value, scoring)
    check_gradients(situation, query, key, value, grad, scoring, walk)


def test_a_bias_that_hides():
    """−∞ in it, and zero times it is no number."""
    situation = SITUATIONS["causal"]
    query, key, value, grad, scoring = draw(situation, ("sinks",))
    hidden = torch.rand(1, 1, 90, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[..., range(90), range(90)] = False
    bias = torch.zeros(1, 1, 90, 90, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    walk = native.walk(
        query, key, value, situation.visibility, replace(scoring, position_bias=bias), Wanted(KNOWN, CONFIG)
    )
    masked = replace(situation.visibility, mask=~hidden)
    expected = native.walk(query, key, value, masked, scoring, Wanted(KNOWN, CONFIG))
    for name in walk.raw:
        assert relative_error(walk.raw[name], expected.raw[name]) <= 1e-10, name
    gradients = native.backward(
        grad, query, key, value, walk.output, walk.logsumexp, situation.visibility, replace(scoring, position_bias=bias)
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("score", [-torch.inf, -1e30, -1e4, -50.0, 50.0, 1e4, 1e30])
def test_sinks_that_take_nothing_or_everything(score):
    situation = SITUATIONS["left padding"]
    query, key, value, grad, scoring = draw(situation, ())
    scoring = replace(scoring, sinks=torch.full((HEADS,), score, dtype=torch.float64))
    walk = check_statistics(situation, query, key, value, scoring)
    check_gradients(situation, query, key, value, grad, scoring, walk)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_cap_is_a_hyperbolic_tangent(dtype):
    """To two roundings of each result, through the largest score of one key."""
    numbers = torch.cat([torch.linspace(-22, 22, 40_001), torch.logspace(-30, 1.3, 4_000), torch.zeros(1)]).to(dtype)
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    query = torch.cat([numbers, infinite])[None, None, :, None]
    visibility = Visibility(1, 0, 1, CPU, causal=False, stop_query=query.shape[2], aligned=False)
    wanted = Wanted([statistics_table()["max_logit"]], CONFIG)
    capped = native.walk(query, torch.ones(1, 1, 1, 1, dtype=dtype), None, visibility, Scoring(1.0, 1.0), wanted)
    actual, expected = capped.raw["max_logit"].flatten().double(), query.flatten().double().tanh()
    assert ((actual - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()


def test_keys_behind_those_that_the_visibility_knows():
    """A static cache holds more than it is filled with: nobody sees them, and their gradient is zero."""
    situation = SITUATIONS["window"]
    query, key, value, grad, scoring = draw(situation, ("sinks",))
    longer = [torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=2) for tensor in (key, value)]
    walk = check_statistics(situation, query, *longer, scoring)
    actual = native.backward(
        grad, query, *longer, walk.output, walk.logsumexp, situation.visibility, scoring
    )  # fmt: skip
    expected = native.backward(grad, query, key, value, walk.output, walk.logsumexp, situation.visibility, scoring)
    for mine, right in zip(actual[1:3], expected[1:3], strict=True):
        assert torch.equal(mine[:, :, :90], right)
        assert (mine[:, :, 90:] == 0).all()


def test_a_view_that_is_negated():
    """Its numbers in memory have the other sign."""
    situation = SITUATIONS["causal"]
    query, key, value, grad, scoring = draw(situation, ())
    negated = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in (query, key, value, grad)]
    assert all(tensor.is_neg() for tensor in negated)
    walk = check_statistics(situation, *negated[:3], scoring)
    check_gradients(situation, *negated, scoring, walk)


def test_a_window_costs_what_its_pairs_cost():
    """Of 16,384 tokens a window of 512 leaves a sixteenth of the pairs, and of the time; a fifth is allowed."""
    length, window = 16_384, 512
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 32, generator=generator) for _ in range(3))
    wanted = Wanted([statistic for statistic in KNOWN if statistic.default], CONFIG)
    i = torch.arange(length, dtype=torch.int32)[None]
    times = []
    for limits in ({}, {"first_key": (i - window + 1).clamp(min=0)}):
        visibility = Visibility(1, 0, length, CPU, **limits)
        best = float("inf")
        for _ in range(2):
            start = time.process_time()
            walk = native.walk(query, key, value, visibility, Scoring(32**-0.5), wanted)
            native.backward(walk.output, query, key, value, walk.output, walk.logsumexp, visibility, Scoring(32**-0.5))
            best = min(best, time.process_time() - start)
        times.append(best)
    assert times[1] < times[0] / 5, times


def test_the_checks_can_fail():
    situation = SITUATIONS["window"]
    query, key, value, grad, scoring = draw(situation, SCORINGS["everything"])
    walk = check_statistics(situation, query, key, value, scoring)
    for changes in ({"softcap": 3.1}, {"sinks": scoring.sinks + 0.1}, {"position_bias": scoring.position_bias * 1.01}):
        wrong = replace(scoring, **changes)
        with pytest.raises(AssertionError):
            check_gradients(situation, query, key, value, grad, wrong, walk)
    situation.pairs = situation.pairs.clone()
    situation.pairs[0, 50, 42] = False
    with pytest.raises(AssertionError):
        check_statistics(situation, query, key, value, scoring)
