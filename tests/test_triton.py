"""The triton engine without a GPU: interpreted against float64, compiled for two of them, and refused."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from forked import Python

from llama_attn import AttentionStatsConfig, available_backends
from llama_attn.engines import triton as engine
from llama_attn.testing import make_inputs

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is for Linux only")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")


@needs_triton
@pytest.mark.parametrize(
    ("chosen", "settings"),
    # Dynamo cannot trace functions that are wrapped to check the shapes of their arguments.
    [("not compiled", ()), ("compiled", ("-o", "addopts=--strict-markers"))],
    ids=["eager", "compiled"],
)
def test_interpreted_kernels_equal_the_textbook(chosen, settings):
    """Triton reads TRITON_INTERPRET when it is imported, hence the process."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, *settings, "triton_worker.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:]


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "mode", "capability", "head_dim", "element"),
    [
        ("attention_forward", "fused", 80, 128, "bf16"),
        ("attention_forward", "fused", 90, 64, "fp16"),
        ("attention_forward", "fused, padded", 90, 96, "bf16"),
        ("attention_forward", "observed", 80, 64, "fp16"),
        ("attention_received", "", 80, 128, "bf16"),
        ("attention_received", "", 90, 64, "fp16"),
        ("attention_backward_query", "", 80, 128, "bf16"),
        ("attention_backward_query", "", 90, 64, "fp16"),
        ("attention_backward_key_value", "", 80, 128, "bf16"),
        ("attention_backward_key_value", "", 90, 64, "fp16"),
    ],
)
def test_compiled_kernels_spill_nothing(kernel, mode, capability, head_dim, element, tmp_path, monkeypatch):
    """Some of what docs/make_triton_table.py compiles."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    script = runpy.run_path(str(TESTS.parent / "docs" / "make_triton_table.py"))
    device = next(device for device in script["DEVICES"] if device.capability == capability)
    usage = script["compile_kernel"](kernel, mode, device, head_dim, element)
    assert usage.stack == 0
    # A program on an A100 may have 163 KiB; within 100, most of it is left to the L1 cache.
    assert usage.shared <= 100 * 1024
    assert usage.programs_per_multiprocessor >= 1


def test_the_page_shows_no_spills():
    """The rows of the whole set, as the script wrote them."""
    page = (TESTS.parent / "docs" / "triton.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| attention_")]
    assert len(rows) == 8 * len(engine.HEAD_DIMS)
    assert {row[3] for row in rows} == {row[7] for row in rows} == {"0"}
    assert "Not yet timed on a GPU" in page


@needs_no_gpu
def test_it_says_why_it_does_not_run(monkeypatch):
    if importlib.util.find_spec("triton"):
        assert "needs a CUDA device" in available_backends()["streaming_triton"]
        with pytest.raises(ImportError, match="'streaming_triton' does not run here: it needs a CUDA device"):
            tiny_model().set_attn_implementation("streaming_triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'llama_attn[triton]'" in engine.unavailable()


@needs_no_gpu
@needs_triton
def test_asked_for_as_an_engine(ids):
    with pytest.raises(ImportError, match="the engine 'triton' does not run here: it needs a CUDA device"):
        tiny_model()(ids, output_attention_stats=AttentionStatsConfig(engine="triton"))


def test_importing_llama_attn_loads_no_kernels():
    script = "import sys, llama_attn; print('llama_attn.engines._triton_kernels' in sys.modules)"
    assert Python("-c", script).ended() == (0, "False\n")


def test_it_refuses_tensors_elsewhere():
    inputs = make_inputs(head_dim=64)
    with pytest.raises(ValueError, match=r"device: the triton engine takes CUDA tensors, got cpu; .*streaming_torch"):
        engine.walk(inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring)
