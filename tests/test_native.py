"""The C++ engine as a library: what it knows and costs, where it is chosen, and how it is built.

Private to it, since other engines are not compiled ahead, need no memory of their own and promise less of threads. What
its numbers mean is in test_engine_*.py and test_properties.py, which every engine passes.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from calls import BOUND, CPU
from conftest import tiny_model
from engines import same
from test_engine_queries import case_of
from typer.testing import CliRunner

import llama_attn.engines as engines
from llama_attn import AttentionStatsConfig, available_backends
from llama_attn.cli import app
from llama_attn.engines import _compiler, _library as library, native, torch as reference_engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import statistics_table
from llama_attn.stats.visibility import Visibility
from llama_attn.testing import make_inputs, relative_error

pytestmark = pytest.mark.usefixtures("built_native")

KNOWN = tuple(statistic for statistic in statistics_table().values() if native.knows(statistic))
NAMES = {
    "entropy", "logsumexp", "max_logit", "max_weight", "effective_keys", "sink_mass", "local_mass", "mean_distance",
    "received", "received_total", "distance_histogram", "learned_sink_mass", "weight_count", "weight_mass", "kept_mass",
    "row_weights",
}  # fmt: skip


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


def test_what_it_knows():
    assert {statistic.name for statistic in KNOWN} == NAMES
    assert {statistic.name for statistic in statistics_table().values() if statistic.default} <= NAMES


def test_large_buffers():
    """Packed keys and copied values of 10 MiB each, which come from the system and not from the C library."""
    inputs = make_inputs(batch=1, heads=1, kv_heads=1, queries=63, cached=20_000, head_dim=64, dtype=torch.float64)
    apart = inputs.value.repeat_interleave(2, dim=2)[:, :, ::2]
    statistics = [statistic for statistic in KNOWN if statistic.per_query and statistic.needs is None]
    call = (inputs.query, inputs.key, apart, inputs.visibility, inputs.scoring)
    walk = native.walk(*call, Wanted(statistics, AttentionStatsConfig()), tile_rows=24, block_keys=64)
    reference = inputs.reference()
    assert relative_error(walk.output, reference.output.transpose(1, 2)) <= BOUND[torch.float64]
    for statistic in statistics:
        error = relative_error(walk.raw[statistic.name], statistic.textbook(reference))
        assert error <= BOUND[torch.float64], statistic.name


@pytest.mark.parametrize(("queries", "cached"), [(700, 0), (1, 2600)], ids=["a prompt", "a token"])
def test_the_number_of_threads_changes_no_bit(queries, cached):
    """Which no other engine promises: tiles and parts of keys are added in their own order, whoever works on them."""
    inputs = make_inputs(heads=6, kv_heads=3, queries=queries, cached=cached, padding="left")
    case, results = case_of(inputs, inputs.visibility), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        walk = case.walk(native)
        call = (inputs.query, inputs.key, inputs.value, walk.output, walk.logsumexp, inputs.visibility, inputs.scoring)
        gradients = native.backward(torch.ones_like(walk.output), *call)
        results.append([walk.output, walk.logsumexp, *(walk.raw[name] for name in sorted(NAMES)), *gradients[:3]])
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(same(one, other) for one, other in zip(result, results[0], strict=True))


def test_a_window_costs_what_its_pairs_cost():
    """Of 16,384 tokens a window of 512 leaves a sixteenth of the pairs, and of the time; a fifth is allowed."""
    length, window = 16_384, 512
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 32, generator=generator) for _ in range(3))
    wanted = Wanted([statistic for statistic in KNOWN if statistic.default], AttentionStatsConfig())
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
    expected = inputs.reference().output.transpose(1, 2)
    assert relative_error(native.walk(*call).output, expected) < BOUND[torch.float32]


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
