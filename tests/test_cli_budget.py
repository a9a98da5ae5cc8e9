"""``llama-attn budget``: what is kept and what it costs, against a model that is given the mask."""

from __future__ import annotations

import cli_models
import matplotlib.image
import pandas
import pytest
import torch
from test_cli import invoke
from transformers import AutoTokenizer
from transformers.models.llama import modeling_llama as upstream

from llama_attn import AttentionStatsConfig, record
from llama_attn.analysis import keep_mask
from llama_attn.demo import HUB_ID
from llama_attn.viz import plot_budget

TEXT = " ".join(
    ["a", "b", "c", "d", "e", "f", "g", "h", "the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog"] * 4
)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return cli_models.save("llama", tmp_path / "llama")


def budget(folder, tmp_path, *arguments):
    return invoke(
        "budget", folder, "--file", tmp_path / "text.txt", "--out", tmp_path / "out", "--dtype", "float32", *arguments
    )  # fmt: skip


def test_every_policy_and_budget(checkpoint, tmp_path):
    result = budget(
        checkpoint, tmp_path, "--budgets", "20,4", "--policies", "knorm,streaming,h2o,snapkv,tova", "--readers", "12"
    )
    assert result.exit_code == 0, result.output
    frame = pandas.read_csv(tmp_path / "out" / "budget.csv")
    assert matplotlib.image.imread(tmp_path / "out" / "budget.png").size > 0
    assert set(frame.budget) == {4, 20}
    model = upstream.LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]])
    length, first = ids.shape[1], ids.shape[1] - 12
    config = AttentionStatsConfig(statistics=("received_total", "key_norm"), rows=slice(-64, None))
    with torch.no_grad():
        with record(model, config) as recording:
            model(ids[:, :first])
        weights = torch.stack(model(ids, output_attentions=True).attentions)[:, 0, :, first:].double()
        full = loss_of(model, ids, first, torch.ones(length, length, dtype=torch.bool).tril())
        assert f"last 11 tokens when the 12 readers see all {first} before them: {full:.3g} nat" in result.output
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for (policy, size), part in frame.groupby(["policy", "budget"]):
            recent = min(64, size // 2) if policy == "snapkv" else None
            keep = torch.as_tensor(keep_mask(recording.stats, policy, size, recent=recent).values)[:, 0]
            group = weights.shape[1] // keep.shape[1]
            kept = torch.cat([keep, torch.ones(*keep.shape[:2], 12, dtype=torch.bool)], -1).repeat_interleave(group, 1)
            expected = (weights * kept[:, :, None]).sum(-1).mean((1, 2))
            assert part.kept.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
            seen = causal & (kept[:, :, None] | (torch.arange(length) < first)[:, None])
            assert part.loss.iloc[0] == pytest.approx(loss_of(model, ids, first, seen), abs=1e-5)


def loss_of(model, ids, first, seen):
    """Loss of the tokens behind the first that reads, where every layer and head sees what ``seen`` says."""
    hooks = []
    if seen.ndim == 4:
        for layer, mask in zip(model.model.layers, seen, strict=True):
            bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None]
            hooks.append(
                layer.self_attn.register_forward_pre_hook(
                    lambda _, args, kwargs, bias=bias: (args, kwargs | {"attention_mask": bias}), with_kwargs=True
                )
            )
    logits = model(ids, use_cache=False).logits[:, first:-1]
    for hook in hooks:
        hook.remove()
    return float(torch.nn.functional.cross_entropy(logits.mT, ids[:, first + 1 :]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budgets", "0"), "--budgets: expected numbers of keys from 1 up"),
        (("--budgets", ""), "--budgets: expected numbers of keys from 1 up"),
        (("--budgets", "4,x"), "--budgets: expected numbers of keys from 1 up"),
        (("--budgets", "100000"), "--budgets: expected 1 to"),
        (("--budgets", "1"), "snapkv keeps the last key"),
        (("--policies", "fifo"), "--policies: expected some of"),
        (("--policies", ","), "--policies: expected some of"),
        (("--readers", "100000"), f"--readers: the text has {len(TEXT)} tokens, so expected 2 to {len(TEXT) - 2}, got"),
    ],
)
def test_what_cannot_be(arguments, message, checkpoint, tmp_path):
    result = budget(checkpoint, tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_texts_that_are_too_short(checkpoint, tmp_path):
    for text, options, least in (("1234567", (), 8), ("123", ("--readers", "2"), 4)):
        (tmp_path / "text.txt").write_text(text)
        result = budget(checkpoint, tmp_path, *options)
        assert result.exit_code == 2
        assert f"--file: expected a text of {least} tokens or more, got {len(text)}" in result.output


def test_budgets_that_nobody_named_are_those_that_fit(checkpoint, tmp_path):
    result = budget(checkpoint, tmp_path, "--policies", "streaming", "--readers", "4")
    assert result.exit_code == 0, result.output
    assert "budgets: 256, 1,024 left out" in result.output
    assert {*pandas.read_csv(tmp_path / "out" / "budget.csv").budget} == {64}


def test_default_budgets_that_do_not_fit_are_not_called_an_option(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("1234567890123456")
    result = budget(checkpoint, tmp_path)
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "none of the default budgets 64, 256 and 1,024 fits, since 12 of 16 tokens are read before" in said
    assert "give --budgets of 1 to 12 keys" in said
    assert "expected 1 to" not in said


@pytest.mark.smollm2
def test_the_demo_model_is_called_by_its_id(tmp_path, monkeypatch):
    """In its picture: the table holds numbers only."""
    drawn = []
    monkeypatch.setattr("llama_attn.viz.plot_budget", lambda frame: drawn.append(frame) or plot_budget(frame))
    (tmp_path / "text.txt").write_text("The parrot sat on the mast and saw the sea")
    result = budget(HUB_ID, tmp_path, "--budgets", "4", "--policies", "streaming", "--readers", "2")
    assert result.exit_code == 0, result.output
    assert drawn[0].attrs["model"] == HUB_ID
