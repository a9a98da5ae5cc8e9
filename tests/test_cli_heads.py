"""``llama-attn heads``: roles from a random sequence that comes twice."""

from __future__ import annotations

import os
import re
import stat
from types import SimpleNamespace

import cli_models
import matplotlib.image
import pandas
import pytest
import torch
from test_cli import invoke
from transformers import AutoTokenizer
from transformers.models.llama import modeling_llama as upstream

from llama_attn import AttentionStats
from llama_attn.cli.heads import repeated
from llama_attn.demo import HUB_ID


def heads(*arguments, out):
    before = os.umask(0o027)
    try:
        result = invoke("heads", *arguments, "--out", out)
    finally:
        os.umask(before)
    assert result.exit_code == 0, result.output
    frame = pandas.read_csv(out / "head_roles.csv")
    assert matplotlib.image.imread(out / "head_roles.png").size > 0
    for name in ("head_roles.csv", "head_roles.png"):
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o640
    return frame, AttentionStats.load(out / "stats.safetensors"), result.output


def roles_of(output):
    """Role, number of heads, and which has it most, of every line of the table."""
    lines = re.findall(r"^ +([a-z ]+?) {2,}(\d+)(?: +(\d+)\.(\d+) )?", output, re.MULTILINE)
    return {role.replace(" ", "_"): (int(count), layer, head) for role, count, layer, head in lines}


def test_scores_are_of_the_second_half(tmp_path):
    folder = cli_models.save("llama", tmp_path / "llama")
    frame, stats, said = heads(folder, "--length", 20, "--seed", 3, out=tmp_path / "out")
    tokens = stats.tokens[0]
    assert tokens[:20] == tokens[20:]
    assert "queries 20 to 39, the second reading of 20 random tokens (seed 3)" in said
    model = upstream.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(tokens)])
    with torch.no_grad():
        weights = torch.stack(model(ids, output_attentions=True).attentions).double()[:, 0]
    follows = torch.zeros(40, 40, dtype=torch.bool)
    follows[:, 1:] = ids[0, None, :-1] == ids[0, :, None]
    expected = (weights * follows)[:, :, 20:].sum(-1).mean(-1)
    found = torch.tensor(frame.induction_score.values).view(3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    counts = {role: count for role, (count, *_) in roles_of(said).items()}
    assert counts == frame.role.value_counts().to_dict()
    _, other, _ = heads(folder, "--length", 20, "--seed", 4, out=tmp_path / "other")
    assert other.tokens[0] != tokens


def test_a_text_of_ordinary_tokens_behind_the_one_that_begins():
    of_twelve = type("Tokenizer", (SimpleNamespace,), {"__len__": lambda self: 12})
    tokenizer = of_twelve(all_special_ids=[0, 1, 2], bos_token_id=1, cls_token_id=None)
    chosen = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9)))
    first, *rest = repeated(tokenizer, chosen, 200, 0)
    assert first == 1
    assert rest[:200] == rest[200:]
    assert set(rest) == set(range(3, 9)), "tokens that the model knows, and none that are special"


@pytest.mark.smollm2
def test_heads_of_smollm2(tmp_path):
    frame, stats, said = heads(HUB_ID, out=tmp_path)
    assert (len(stats.layers), stats.num_keys) == (30, 129)
    assert stats.model == HUB_ID, "not the folder of the package"
    found = roles_of(said)
    assert sum(count for count, *_ in found.values()) == len(frame) == 270
    assert found["induction"][1:] == ("18", "6")
    assert found["previous_token"][1:] == ("16", "0")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--length", "1"], "--length"), (["--attn", "sdpb"], "is not supported; there are")]
)
def test_bad_requests(arguments, message, tmp_path):
    result = invoke("heads", "nowhere", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()
