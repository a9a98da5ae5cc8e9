"""One of two processes on the CPU: ``python distributed_worker.py CASE DIRECTORY RANK``. What is wrong, raises."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

warnings.simplefilter("error")

import corpora  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import tiny_model  # noqa: E402
from torch import distributed  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

from llama_attn import AttentionStatsConfig, LlamaForCausalLM  # noqa: E402
from llama_attn.corpus.weights import fingerprint  # noqa: E402

EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)
SELECTIONS = {
    "all": EVERYTHING,
    "on one process": AttentionStatsConfig(statistics="all", norms=True, heads=(4,), query_stride=3),
    "unevenly, in another order": AttentionStatsConfig(statistics="all", norms=True, heads=(5, 0, 4), layers=(2, 0)),
    "offloaded": AttentionStatsConfig(offload="cpu"),
}


def make_inputs(rows=2, seed=1):
    ids = torch.randint(3, 97, (rows, 21), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(actual, expected):
    assert (actual.names, actual.layers, actual.heads) == (expected.names, expected.layers, expected.heads)
    for name in expected.names:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(model, **arguments):
    """Of every parameter, the part of it that lies here."""
    model.zero_grad()
    model(**arguments).loss.backward()
    local = {name: getattr(p.grad, "_local_tensor", p.grad).clone() for name, p in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in local.values())
    return local


def assert_observing_leaves_gradients(model, **inputs):
    model.train()
    off = gradients(model, **inputs, labels=inputs["input_ids"])
    on = gradients(model, **inputs, labels=inputs["input_ids"], output_attention_stats=EVERYTHING)
    assert all(torch.equal(on[name], gradient) for name, gradient in off.items())
    model.eval()


def split_checkpoint(directory, **sizes):
    """The tiny model split over the processes, and whole."""
    whole = tiny_model(dtype=torch.float64)
    if distributed.get_rank() == 0:
        whole.save_pretrained(directory / "model")
    distributed.barrier()
    config = DistributedConfig(**sizes)
    split = LlamaForCausalLM.from_pretrained(directory / "model", dtype=torch.float64, distributed_config=config)
    return split.eval(), whole


@torch.no_grad()
def tensor_parallel(directory):
    split, whole = split_checkpoint(directory, tp_size=2)
    assert split.model.layers[0].self_attn.o_proj.weight.to_local().shape == (48, 24)
    for backend in ("sdpa", "streaming"):
        split.set_attn_implementation(backend)
        whole.set_attn_implementation(backend)
        for config in SELECTIONS.values():
            inputs = make_inputs()
            actual, expected = (m(**inputs, output_attention_stats=config).attention_stats for m in (split, whole))
            assert_same(actual, expected)
            settings = {"return_dict_in_generate": True, "max_new_tokens": 6, "do_sample": False}
            actual, expected = (
                m.generate(**make_inputs(), **settings, output_attention_stats=config) for m in (split, whole)
            )
            assert torch.equal(actual.sequences, expected.sequences)
            assert_same(actual.attention_stats, expected.attention_stats)
    # Without a head.
    actual, expected = (m.model(**make_inputs(), output_attention_stats=True).attention_stats for m in (split, whole))
    assert_same(actual, expected)
    with torch.enable_grad():
        assert_observing_leaves_gradients(split, **make_inputs())


@torch.no_grad()
def pipeline_parallel(directory):
    split, whole = split_checkpoint(directory, pp_size=2)
    settings = {"return_dict_in_generate": True, "max_new_tokens": 3, "do_sample": False}
    for _ in range(2):
        # On both ranks, or the second round would find one of them still waiting for the other.
        with pytest.raises(ValueError, match="not with pipeline parallelism"):
            split(**make_inputs(), output_attention_stats=True)
        with pytest.raises(ValueError, match="not with pipeline parallelism"):
            split.generate(**make_inputs(), **settings, output_attention_stats=True)
        actual, expected = (m(**make_inputs()).logits for m in (split, whole))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    # Not of padded prompts: upstream's later stages lose their positions.
    prompt = make_inputs()["input_ids"]
    assert torch.equal(*(m.generate(prompt, **settings).sequences for m in (split, whole)))


def data_parallel(directory):
    """Each process has its own row."""
    whole = tiny_model(dtype=torch.float64)
    inputs = {name: tensor[[distributed.get_rank()]] for name, tensor in make_inputs().items()}
    expected = whole(**inputs, output_attention_stats=EVERYTHING).attention_stats
    for static_graph in (False, True):
        model = DistributedDataParallel(tiny_model(dtype=torch.float64), static_graph=static_graph)
        assert_same(model(**inputs, output_attention_stats=EVERYTHING).attention_stats, expected)
        assert_observing_leaves_gradients(model, **inputs)


def fully_sharded(directory):
    """Each process has its own row, and half of the weights."""
    inputs = {name: tensor[[distributed.get_rank()]] for name, tensor in make_inputs().items()}
    settings = {"return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False}
    whole = tiny_model(dtype=torch.float64)
    expected = whole(**inputs, output_attention_stats=EVERYTHING).attention_stats
    generated = whole.generate(**inputs, **settings, output_attention_stats=EVERYTHING)
    # By layer, and besides by the projection whose weight a statistic reads.
    for finer in (False, True):
        for backend in ("sdpa", "streaming"):
            model = tiny_model(backend, dtype=torch.float64)
            for layer in model.model.layers:
                if finer:
                    fully_shard(layer.self_attn.o_proj)
                fully_shard(layer)
            fully_shard(model)
            stats = model(**inputs, output_attention_stats=EVERYTHING).attention_stats
            assert_same(stats, expected)
            actual = model.generate(**inputs, **settings, synced_gpus=True, output_attention_stats=EVERYTHING)
            assert torch.equal(actual.sequences, generated.sequences)
            assert_same(actual.attention_stats, generated.attention_stats)
            assert_observing_leaves_gradients(model, **inputs)


def corpus(directory):
    """Both processes read every text together; one decides and writes."""
    split, whole = split_checkpoint(directory, tp_size=2)
    assert fingerprint(split) == fingerprint(whole)
    split.set_attn_implementation("streaming")
    whole.set_attn_implementation("streaming")
    config = AttentionStatsConfig(offload="cpu")
    run = corpora.run(directory / "texts", directory / "split", every=9, module=split, config=config)
    run = replace(run, group=distributed.group.WORLD)
    run.begin()
    found = run.measure(lambda texts, tokens: None)
    if distributed.get_rank() == 0:
        expected = corpora.measured(directory / "texts", directory / "whole", every=9, module=whole, config=config)
        corpora.assert_same(found, replace(expected, about=replace(expected.about, model=found.about.model)))
    assert found.texts == 23


CASES = {f.__name__: f for f in (tensor_parallel, pipeline_parallel, data_parallel, fully_sharded, corpus)}

if __name__ == "__main__":
    case, directory, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=2)
    CASES[case](directory)
    # Nobody leaves while another still speaks.
    distributed.barrier()
    distributed.destroy_process_group()
    # All is said. An interpreter that ends while a thread of gloo asks for it takes the whole process down ("terminate
    # called without an active exception"), now and then: end without it.
    sys.stdout.flush()
    os._exit(0)
