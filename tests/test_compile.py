"""`torch.compile`: the model as it is upstream, and statistics outside of the compiled graph."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from llama_attn import AttentionStatsConfig
from llama_attn.testing import relative_error

# Dynamo warns about transformers' own code while it traces.
pytestmark = pytest.mark.filterwarnings("ignore")

EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_off_it_compiles_to_one_graph(backend, ids):
    model = tiny_model(backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_on_the_numbers_are_those_of_the_plain_model(backend, ids, left_padding):
    model = tiny_model(backend, torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    for length in (37, 30, 22):
        inputs = {"input_ids": ids[:, :length], "attention_mask": left_padding[:, :length]}
        with torch.no_grad():
            expected = model(**inputs, output_attention_stats=EVERYTHING)
            actual = compiled(**inputs, output_attention_stats=EVERYTHING)
        torch.testing.assert_close(actual.logits, expected.logits)
        for name in expected.attention_stats.values:
            assert relative_error(actual.attention_stats[name], expected.attention_stats[name]) < 1e-9, name


@pytest.mark.parametrize(("backend", "statistics"), [("sdpa", True), ("streaming", False)])
def test_one_graph_with_the_engine_inside_is_refused(backend, statistics, ids):
    """The walk over blocks is not traced; fullgraph=True says so and gives no numbers."""
    compiled = torch.compile(tiny_model(backend), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(ids, output_attention_stats=statistics)
