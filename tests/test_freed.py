"""What was measured is freed when nobody holds it any more, and not when Python next looks for circles."""

import gc
import weakref

import pytest
import torch
from conftest import tiny_model

from llama_attn import AttentionStatsConfig, record
from llama_attn.corpus.batches import Reader
from llama_attn.corpus.examples import Text

IDS = torch.arange(20)[None]
CONFIG = AttentionStatsConfig()


@pytest.fixture(scope="module")
def model():
    return tiny_model("streaming")


def forward(model):
    return model(IDS, output_attention_stats=CONFIG).attention_stats


def backward(model):
    output = model(IDS, labels=IDS, output_attention_stats=CONFIG)
    output.loss.backward()
    return output.attention_stats


def generate(model):
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(IDS, output_attention_stats=CONFIG, **options).attention_stats


def recorded(model):
    with record(model, CONFIG) as recording:
        model(IDS)
    return recording.stats


def recorded_run(model):
    with record(model, CONFIG) as recording:
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return recording.stats


@pytest.mark.parametrize("measure", [forward, backward, generate, recorded, recorded_run])
def test_statistics(model, measure):
    measure(model)
    gc.collect()
    gc.disable()
    try:
        stats = measure(model)
        held = [weakref.ref(stats[name]) for name in stats.names]
        assert all(ref() is not None for ref in held)
        del stats
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def test_batch_of_a_corpus(model, monkeypatch):
    held = []
    monkeypatch.setattr(
        "llama_attn.corpus.batches.summarize",
        lambda stats, *_, **__: held.extend(weakref.ref(stats[name]) for name in stats.names),
    )
    reader = Reader(model, None, CONFIG, "", max_tokens=20, batch_tokens=40, examples=1)
    gc.collect()
    gc.disable()
    try:
        reader.measure([Text("texts.txt", 1, 1, tuple(range(20)))])
        assert held
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()
