"""The C++ engine: against the textbook, against the engine in PyTorch, and how it is built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, strategies as st
from test_properties import cases
from typer.testing import CliRunner

import llama_attn.engines as engines
from llama_attn import AttentionStatsConfig, available_backends
from llama_attn.cli import app
from llama_attn.engines import _compiler, _library as library, native, torch as reference_engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import assert_matches_reference, make_inputs, relative_error

pytestmark = pytest.mark.usefixtures("built_native")

KNOWN = tuple(statistic for statistic in statistics_table().values() if native.knows(statistic))
NAMES = {
    "entropy", "logsumexp", "max_logit", "max_weight", "effective_keys", "sink_mass", "local_mass", "mean_distance",
    "received", "received_total", "distance_histogram", "learned_sink_mass", "weight_count", "weight_mass", "kept_mass",
    "row_weights",
}  # fmt: skip
# More than one tile and more than one block even where there are few tokens.
SIZES = st.tuples(st.integers(1, 200), st.sampled_from([64, 128, native.BLOCK_KEYS]))


@pytest.fixture
def _nothing_built(monkeypatch, tmp_path):
    """A machine on which the engine was never built, and came with no wheel."""
    monkeypatch.setenv("LLAMA_ATTN_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMA_ATTN_ISA", raising=False)
    monkeypatch.setattr(_compiler, "portable", dict)
    monkeypatch.setattr(engines, "_loaded", {"torch": reference_engine})
    library.choices.cache_clear()
    yield
    monkeypatch.undo()
    library.choices.cache_clear()


def everything(inputs, config=AttentionStatsConfig(), statistics=KNOWN):  # noqa: B008 - it is frozen
    """All that the engine knows, with every other key kept, from another one on in each KV head."""
    batch, kv_heads, keys = inputs.key.shape[:3]
    keep = (torch.arange(keys) + torch.arange(kv_heads)[:, None]) % 2 == 0
    return Wanted(statistics, config, keep=keep.expand(batch, -1, -1))


def same(actual, expected) -> bool:
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())


def known_of(case):
    """``case`` with the statistics that the engine knows and the sizes of its tiles."""

    class Known(type(case)):
        @property
        def statistics(self):
            return KNOWN

    return Known(**vars(case))


def arguments(case):
    return case.query, case.key, case.value, case.visibility, case.scoring


def test_what_it_knows():
    assert {statistic.name for statistic in KNOWN} == NAMES
    assert {statistic.name for statistic in statistics_table().values() if statistic.default} <= NAMES


@given(cases(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)), SIZES)
def test_equals_the_textbook(case, sizes):
    case = known_of(case)
    wanted, reference = Wanted(KNOWN, case.config, keep=case.config.kept[0]), case.reference()
    walk = native.walk(*arguments(case), wanted, *sizes)
    values = case.finished(walk.raw)
    for statistic in KNOWN:
        expected = case.marked(statistic, statistic.textbook(reference))
        assert relative_error(values[statistic.name], expected) <= case.bound, statistic.name
    real = reference.real_queries
    largest = max(1.0, float(case.value.abs().max()))
    bound = case.bound * largest + torch.finfo(case.value.dtype).eps
    assert walk.output.dtype == case.value.dtype
    assert relative_error(walk.output[real], reference.output.transpose(1, 2)[real]) <= bound
    # The output does not depend on what is measured, nor the numbers on whether there is an output.
    plain = native.walk(*arguments(case), None, *sizes)
    assert not plain.raw
    assert same(plain.output, walk.output)
    assert same(plain.logsumexp, walk.logsumexp)
    observed = native.walk(case.query, case.key, None, *arguments(case)[3:], wanted, *sizes)
    assert observed.output is None
    assert all(same(observed.raw[name], value) for name, value in walk.raw.items())


@given(cases(), SIZES)
def test_gradients_equal_those_of_the_torch_engine(case, sizes):
    walk = reference_engine.walk(*arguments(case))
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(walk.output.shape, generator=generator, dtype=torch.float64)

    def backward(engine, walk, *sizes):
        tensors = (grad, *arguments(case)[:3], walk.output, walk.logsumexp)
        return engine.backward(*tensors, *arguments(case)[3:], *sizes)[:3]

    expected = backward(reference_engine, walk)
    for actual, wanted in zip(backward(native, native.walk(*arguments(case)), *sizes), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-10


@pytest.mark.parametrize("kind", ["bool", "additive", "bfloat16", "per_head", "nobody", "transposed"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_a_mask_of_the_users_own(kind, heads):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, heads[0] if kind in ("per_head", "nobody") else 1, 70, 70, generator=generator) < 0.4
    if kind == "nobody":
        mask[1, 2, 5] = False  # one head of one query sees nothing
    if kind in ("additive", "bfloat16"):
        bias = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
        bias = bias.masked_fill(~mask, -torch.inf).masked_fill(~mask & (bias > 0), -1e4)
        mask = bias.to(torch.bfloat16) if kind == "bfloat16" else bias
    if kind == "transposed":
        mask = mask.mT
    visibility = Visibility.of_mask(mask, batch=2, device=torch.device("cpu"))
    inputs = make_inputs(heads=heads[0], kv_heads=heads[1], queries=70, dtype=torch.float64)
    compare(inputs, visibility)


@pytest.mark.parametrize(
    "changes", [{"stride": 3}, {"stride": 4, "first": 9}, {"rows": torch.tensor([True, False])}], ids=str
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_some_of_the_queries(changes, padding):
    inputs = make_inputs(queries=90, cached=13, padding=padding, dtype=torch.float64)
    visibility = inputs.visibility.measured(**changes)
    rows = visibility.query_positions - inputs.cached
    compare(replace(inputs, query=inputs.query[:, :, rows]), visibility)


def compare(inputs, visibility):
    """Output and statistics of both engines."""
    wanted = everything(inputs, AttentionStatsConfig(sink_tokens=3, window=11))
    call = (inputs.query, inputs.key, inputs.value, visibility, inputs.scoring)
    expected = reference_engine.walk(*call, wanted)
    actual = native.walk(*call, wanted, tile_rows=24, block_keys=64)
    assert relative_error(actual.output, expected.output) < 1e-12
    assert set(actual.raw) == NAMES
    real = visibility.real_queries[:, None].expand_as(actual.logsumexp)
    for name, value in expected.raw.items():
        rows = real if value.shape == real.shape else ...
        # Keys that are not seen stand in the last bin, if anywhere: there `finish` counts.
        rows = (..., slice(-1)) if name == "weight_count" else rows
        assert relative_error(actual.raw[name][rows], value[rows]) < 1e-10, name


def test_large_buffers():
    """Packed keys and copied values of 10 MiB each, which come from the system and not from the C library."""
    inputs = make_inputs(batch=1, heads=1, kv_heads=1, queries=63, cached=20_000, head_dim=64, dtype=torch.float64)
    apart = inputs.value.repeat_interleave(2, dim=2)[:, :, ::2]
    compare(replace(inputs, value=apart), inputs.visibility)


@pytest.mark.parametrize("value_channels", [16, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_those_of_sdpa(dtype, value_channels):
    inputs = make_inputs(heads=6, kv_heads=2, queries=130, dtype=torch.float64)
    value = torch.randn(2, 2, 130, value_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs.query, inputs.key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(output, leaves, grad)
    call = (inputs.query.to(dtype), inputs.key.to(dtype), value.to(dtype))
    walk = native.walk(*call, inputs.visibility, inputs.scoring)
    actual = native.backward(
        grad.transpose(1, 2).to(dtype), *call, walk.output, walk.logsumexp, inputs.visibility, inputs.scoring,
        tile_rows=30, block_keys=64,
    )  # fmt: skip
    for mine, sdpas in zip(actual[:3], expected, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, sdpas) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_outputs_match_float64(dtype):
    assert_matches_reference("streaming_native", dtype=dtype)


def test_the_number_of_threads_changes_nothing():
    inputs = make_inputs(heads=6, kv_heads=3, queries=700, padding="left")
    wanted = everything(inputs)
    results = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        call = (inputs.query, inputs.key, inputs.value)
        walk = native.walk(*call, inputs.visibility, inputs.scoring, wanted)
        gradients = native.backward(
            torch.ones_like(walk.output), *call, walk.output, walk.logsumexp, inputs.visibility, inputs.scoring
        )
        results.append([walk.output, walk.logsumexp, *(walk.raw[name] for name in sorted(NAMES)), *gradients[:3]])
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(same(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_scores_that_are_no_numbers(strange):
    inputs = make_inputs(queries=80, padding="right")
    query = inputs.query.clone()
    query[1, 1, 40] = strange
    call = (query, inputs.key, inputs.value, inputs.visibility, inputs.scoring)
    wanted = everything(inputs)
    actual, expected = native.walk(*call, wanted, 24, 64), reference_engine.walk(*call, wanted)
    spoiled = torch.zeros(2, 80, 4, dtype=torch.bool)
    spoiled[1, 40, 1] = True
    assert torch.equal(actual.output.isnan().all(-1), expected.output.isnan().all(-1))
    assert relative_error(actual.output[~spoiled], expected.output[~spoiled]) < 1e-5
    assert actual.output[spoiled].isnan().all()
    for name in ("entropy", "max_weight", "logsumexp"):
        assert actual.raw[name][1, 1, 40].isnan(), name
    native.backward(torch.ones_like(actual.output), *call[:3], actual.output, actual.logsumexp, *call[3:])


def test_only_what_is_wanted():
    inputs = make_inputs()
    call = (inputs.query, inputs.key, None, inputs.visibility, inputs.scoring)
    of_all = native.walk(*call, everything(inputs)).raw
    for statistic in KNOWN:
        raw = native.walk(*call, everything(inputs, statistics=[statistic])).raw
        assert set(raw) == {statistic.name}
        assert same(raw[statistic.name], of_all[statistic.name])


def test_it_is_the_default_and_says_so(ids, left_padding):
    assert engines.default_engine(torch.device("cpu")) == "native"
    assert engines.default_engine(torch.device("meta")) == "torch"
    assert available_backends()["streaming_native"] is None
    config = AttentionStatsConfig()
    inputs = {"input_ids": ids, "attention_mask": left_padding}
    with torch.no_grad():
        stats = tiny_model("streaming")(**inputs, output_attention_stats=config).attention_stats
        by_name = tiny_model("streaming_native")(**inputs, output_attention_stats=config).attention_stats
        more = replace(config, statistics=("entropy", "weights_map"))
        both = tiny_model("streaming")(**inputs, output_attention_stats=more).attention_stats
        torch_alone = replace(config, engine="torch")
        beside = tiny_model("streaming")(**inputs, output_attention_stats=torch_alone).attention_stats
    assert (stats.engine, by_name.engine, both.engine, beside.engine) == ("native", "native", "native+torch", "torch")
    for name in stats.names:
        assert same(stats[name], by_name[name])
        assert relative_error(stats[name], beside[name]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_keys": 100}, ValueError, "block_keys: expected a multiple of 64, got 100"),
        ({"block_keys": 0}, ValueError, "block_keys: expected a multiple of 64, got 0"),
        ({"device": "meta"}, ValueError, "query: the native engine works on the CPU, got a tensor on meta"),
    ],
)
def test_what_it_refuses(changes, error, message):
    inputs = make_inputs(device=changes.pop("device", "cpu"))
    with pytest.raises(error, match=message):
        native.walk(inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring, **changes)


@pytest.mark.usefixtures("_nothing_built")
def test_not_built():
    assert native.unavailable() == "not built; run `llama-attn build`"
    assert available_backends()["streaming_native"] == "not built; run `llama-attn build`"
    assert engines.default_engine(torch.device("cpu")) == "torch"
    with pytest.raises(ImportError, match=r"'native' does not run here: not built; run `llama-attn build`"):
        engines.get_engine("native")
    with pytest.raises(ImportError, match="'streaming_native' does not run here: not built"):
        tiny_model("streaming_native")
    with pytest.raises(ImportError, match="not built"):
        library.load(library.path())


@pytest.mark.usefixtures("_nothing_built")
def test_building(monkeypatch, tmp_path):
    """With flags that make the compiler quick; built once, kept, and by another name where the flags differ."""
    usual = library.path()
    monkeypatch.setenv("LLAMA_ATTN_CXXFLAGS", "-O0")
    library.choices.cache_clear()
    assert library.path() != usual
    result = CliRunner().invoke(app, ["build"])
    assert result.exit_code == 0, result.output
    assert "took" in result.output
    assert str(library.path()) in result.output.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == [library.path().name], "nothing else is left"
    assert native.unavailable() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = CliRunner().invoke(app, ["build"])
    assert result.exit_code == 0, "it is there, so no compiler is needed"
    assert "was there already" in result.output
    inputs = make_inputs()
    call = (inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring)
    assert relative_error(native.walk(*call).output, reference_engine.walk(*call).output) < 1e-5


@pytest.mark.usefixtures("_nothing_built")
def test_building_fails_clearly(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_ATTN_CXXFLAGS", "-O0 -no-such-flag")
    library.choices.cache_clear()
    with pytest.raises(RuntimeError, match=r"failed:\n(.|\n)*no-such-flag"):
        library.build()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = CliRunner().invoke(app, ["build"])
    assert result.exit_code == 2
    assert "no C++ compiler found; looked for ['no-such-compiler']" in " ".join(result.output.split())
