"""The demo model and a long text for every benchmark."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoTokenizer

from llama_attn import LlamaForCausalLM
from llama_attn.demo import demo_checkpoint


@pytest.fixture(scope="session")
def model():
    """SmolLM2-135M in float32."""
    checkpoint = demo_checkpoint()
    loaded = LlamaForCausalLM.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="session")
def text():
    """Token ids of a text that is as long as a benchmark asks for: (length) -> (1, length)."""
    checkpoint = demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file)
    sentences = "".join(
        f"In chapter {n} the pirates sail on and find island number {n * 7 % 31}. " for n in range(2000)
    )
    ids = torch.tensor([tokenizer(sentences)["input_ids"]])
    return lambda length: ids[:, :length]
