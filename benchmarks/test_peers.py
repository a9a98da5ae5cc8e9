"""What others take for attention statistics: eager weights with formulas on top, and TransformerLens."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from check import shrunk
from fresh_process import run
from models import ours, stock
from results import ROOT, Row
from timing import Case, alternate, keep
from transformers import AutoTokenizer

from llama_attn import AttentionStatsConfig
from llama_attn.demo import demo_checkpoint

pytestmark = pytest.mark.benchmark(group="peers")

CONFIG = AttentionStatsConfig()
PEER = ROOT / ".venv-peers" / "bin" / "python"
LENS = Path(__file__).parent / "transformer_lens_process.py"


def from_weights(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The default statistics that the weights of one layer, (batch, head, query, key), tell: six of eight.

    The logsumexp and the largest score are lost in the softmax. Plain PyTorch, one line each, as one would write it.
    """
    length = weights.shape[-1]
    positions = torch.arange(length, device=weights.device)
    distance = positions[:, None] - positions
    near = (distance >= 0) & (distance < CONFIG.window)
    return {
        "entropy": -torch.xlogy(weights, weights).sum(-1),
        "max_weight": weights.amax(-1),
        "sink_mass": weights[..., : CONFIG.sink_tokens].sum(-1),
        "local_mass": (weights * near).sum(-1),
        "mean_distance": torch.einsum("bhqk,qk->bhq", weights, distance.to(weights.dtype)),
        "received": weights.sum(-2) / (length - positions),
    }


@torch.no_grad()
def test_eager(benchmark, model, text):
    """Stock eager attention that returns its weights, then six of the eight default statistics from them."""
    length = shrunk(2048)
    ids, eager, streaming = text(length), stock(model, "eager"), ours(model, "streaming")

    def theirs():
        output = eager(ids, logits_to_keep=1, use_cache=False, output_attentions=True)
        layers = [from_weights(weights) for weights in output.attentions]
        return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}

    def measured():
        return streaming(ids, logits_to_keep=1, use_cache=False, output_attention_stats=True).attention_stats

    stats = measured()
    for name, value in theirs().items():
        # Two attentions in float32 whose roundings 30 layers amplify: a thousandth of the statistic's own scale.
        torch.testing.assert_close(stats[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()), msg=name)
    alternate(
        benchmark,
        Case("stock eager, output_attentions, six statistics from the weights", theirs),
        [Case(f"streaming ({stats.engine}), statistics", measured, at_most=0.25)],
        shape=f"SmolLM2, float32, T {length:,}",
    )


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory, model):
    """SmolLM2 as a folder that any version of transformers reads."""
    folder, source = tmp_path_factory.mktemp("smollm2"), demo_checkpoint()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.name, gguf_file=source.gguf_file).save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(not PEER.exists(), reason="TransformerLens has no environment yet: make .venv-peers/.ready")
@pytest.mark.parametrize("length", [1024, 2048])
def test_transformer_lens(benchmark, checkpoint_folder, length):
    """All patterns by run_with_cache, no statistic of them yet; time and memory of a process each, on the CPU."""
    options = ("--length", length, "--rounds", 5)
    theirs = run(checkpoint_folder, *options, python=str(PEER), script=str(LENS))
    measured = benchmark.pedantic(
        run, args=("streaming", "--statistics", "--folder", checkpoint_folder, *options), rounds=1
    )
    assert theirs["shape"][-1] == shrunk(length)
    expected = torch.tensor(theirs["received"])
    torch.testing.assert_close(torch.tensor(measured["received"]), expected, rtol=1e-3, atol=1e-5)
    case, shape = f"streaming ({measured['engine']}), statistics", f"SmolLM2, float32, T {length:,}"
    peer = f"TransformerLens {theirs['version']}, run_with_cache of the patterns"
    seconds = [statistics.median(each["seconds"]) for each in (measured, theirs)]
    keep(
        benchmark,
        [
            Row.over(case, shape, seconds[0], "s", peer, seconds[1]),
            Row.over(case, shape, measured["peak_mib"], "MiB", peer, theirs["peak_mib"]),
        ],
    )
