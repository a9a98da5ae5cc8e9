"""``llama-attn ablate``: the loss without each head, and without the first token."""

from __future__ import annotations

import json

import cli_models
import matplotlib.image
import numpy as np
import pandas
import pytest
import torch
from test_cli import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_attn.demo import HUB_ID
from llama_attn.viz import plot_ablation

TEXTS = ("The ship sailed on, and on.", "A parrot!")


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{at}.txt" for at in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return [part for path in paths for part in ("--file", path)]


def loss_of(model, tokenizer, hide=None):
    """Mean over the predicted tokens of all texts, each text alone; of a float64 softmax."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if hide is not None:
            mask[hide + 1 :, hide] = False
        logits = model(ids, attention_mask=mask[None, None]).logits.double()
        losses.append(-logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return float(torch.cat(losses).mean())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_losses_are_those_of_a_model_without_the_head(kind, files, tmp_path):
    folder, out = cli_models.save(kind, tmp_path / kind), tmp_path / "out"
    result = invoke("ablate", folder, *files, "--sinks", "--heads", "all", "--attn", "sdpa", "--out", out)
    assert result.exit_code == 0, result.output
    frame, content = pandas.read_csv(out / "ablation.csv"), json.loads((out / "ablation.json").read_text())
    assert matplotlib.image.imread(out / "ablation.png").size > 0
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = loss_of(model, tokenizer)
    assert content["loss"] == pytest.approx(whole, abs=1e-5)
    assert content["first_token_hidden"]["loss"] == pytest.approx(loss_of(model, tokenizer, hide=0), abs=1e-5)
    assert f"{whole:.4f} nat" in result.output
    # Older releases of pandas read the last digit otherwise than it was written.
    assert content["heads"] == [pytest.approx(line, rel=1e-14) for line in frame.to_dict("records")]
    assert list(zip(frame.layer, frame["head"], strict=True)) == [(n // 4, n % 4) for n in range(12)]
    for line in frame.itertuples():
        is_gpt2 = kind == "gpt2"
        layer = (model.transformer.h if is_gpt2 else model.model.layers)[line.layer]
        weight = layer.attn.c_proj.weight.T if is_gpt2 else layer.self_attn.o_proj.weight
        columns = weight.data[:, 12 * line.head : 12 * line.head + 12]
        kept = columns.clone()
        columns.zero_()
        assert line.loss == pytest.approx(loss_of(model, tokenizer), abs=1e-5)
        assert line.change == pytest.approx(line.loss - content["loss"], abs=1e-9)
        columns.copy_(kept)
    table = [line.split()[0] for line in result.output.splitlines() if line.strip()[:1].isdigit()]
    order = frame.sort_values("change", ascending=False)
    assert table == [f"{layer}.{head}" for layer, head in zip(order.layer, order["head"], strict=True)]


def test_some_heads_and_the_sink_alone(files, tmp_path):
    folder, out = cli_models.save("llama", tmp_path / "llama"), tmp_path / "out"
    result = invoke("ablate", folder, *files, "--heads", "2.1, 0.all,2.0", "--mode", "mean", "--out", out)
    assert result.exit_code == 0, result.output
    frame = pandas.read_csv(out / "ablation.csv")
    assert list(zip(frame.layer, frame["head"], strict=True)) == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1)]
    assert json.loads((out / "ablation.json").read_text())["mode"] == "mean"
    result = invoke("ablate", folder, *files, "--sinks", "--out", out)
    assert result.exit_code == 0, result.output
    assert [path.name for path in out.iterdir()] == ["ablation.json"], "those of an older run are gone"
    assert "with the first token hidden from all later ones" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "3"], "--heads: expected all, or layer.head"),
        (["--heads", "1.x"], "--heads: expected all, or layer.head"),
        (["--heads", "7.0"], "there is no attention in layer 7; there is in 0, 1, 2"),
        (["--heads", "1.0,9.9"], "there is no attention in layer 9; there is in 0, 1, 2"),
        (["--heads", "1.4"], "layer 1 has no head 4; there are 0 to 3"),
        (["--mode", "median"], "--mode: expected zero or mean"),
        (["--sinks", "--mode", "zero"], "--mode: with --sinks alone no head is tried; name some with --heads"),
        (["--attn", "sdpb"], "is not supported; there are"),
    ],
)
def test_bad_requests(arguments, message, files, tmp_path):
    folder, out = cli_models.save("llama", tmp_path / "llama"), tmp_path / "out"
    result = invoke("ablate", folder, *files, *arguments, "--out", out)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "cannot measure" not in result.output, "it is said once what is wrong"
    assert not out.exists()


def test_models_and_texts_without_a_loss(files, tmp_path):
    for kind in ("bert", "t5"):
        result = invoke("ablate", cli_models.save(kind, tmp_path / kind), *files, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "does not predict the next token of a text" in " ".join(result.output.split())
    (tmp_path / "short.txt").write_text("a")
    folder = cli_models.save("llama", tmp_path / "llama")
    result = invoke("ablate", folder, "--file", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert "expected texts of three tokens or more" in " ".join(result.output.split())
    assert "Missing option '--file'" in invoke("ablate", folder, "--out", tmp_path / "out").output


def test_the_grid():
    frame = pandas.DataFrame(
        {"layer": [4, 1, 1], "head": [0, 2, 0], "loss": [3.0, 2.0, 2.5], "change": [0.5, -1.0, 0.0]}
    )
    frame.attrs |= {"loss": 2.5, "model": "/some/where/tiny$model", "text": "a$b.txt", "mode": "mean"}
    figure = plot_ablation(frame)
    axes, bar = figure.axes
    image = axes.images[0]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), [[0.0, -1.0], [0.5, np.nan]])
    assert image.get_clim() == (-1.0, 1.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    assert "replaced by its mean\ntiny$model, a$b.txt\nloss 2.500 nat" in axes.get_title()
    assert bar.get_ylabel() == "change of the loss [nat]"


@pytest.mark.smollm2
def test_the_demo_model_is_called_by_its_id(files, tmp_path):
    result = invoke("ablate", HUB_ID, *files, "--heads", "0.0", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["model"] == HUB_ID
