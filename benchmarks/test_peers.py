"""What others take for attention statistics: eager weights with formulas on top, and TransformerLens."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from check import shrunk
from fresh_process import run
from results import ROOT, Row
from timing import alternate, keep
from transformers import AutoTokenizer
from workloads import from_eager

from llama_attn.demo import demo_checkpoint

pytestmark = pytest.mark.benchmark(group="peers")

PEER = ROOT / ".venv-peers" / "bin" / "python"
LENS = Path(__file__).parent / "transformer_lens_process.py"


def test_eager(benchmark, model, text):
    length = shrunk(2048)
    theirs, measuring = from_eager(model, text(length), at_most=0.25)
    alternate(benchmark, theirs, [measuring], shape=f"SmolLM2, float32, T {length:,}")


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
