"""``llama-attn run`` on models of many kinds, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import cli_models
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_cli import invoke
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, T5EncoderModel
from transformers.models.llama import LlamaConfig, modeling_llama as upstream
from transformers.utils import logging as transformers_logging

from llama_attn import AttentionStats, AttentionStatsConfig, record
from llama_attn.cli.loading import plan, what_is_wrong
from llama_attn.cli.showing import show
from llama_attn.cli.terminal import console
from llama_attn.demo import Checkpoint

TEXT = "Hello there, parrot"


@pytest.fixture
def undrawn(monkeypatch):
    """Numbers without pictures, which take the most time."""

    def save(stats, out, layers, kind, rows=(), *, about=""):
        stats.save(out / "stats.safetensors")
        console.print(about, soft_wrap=True)

    monkeypatch.setattr("llama_attn.cli.run.show", save)


@pytest.fixture(scope="session")
def _zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    return {kind: cli_models.save(kind, root / kind) for kind in cli_models.MODELS}


@pytest.fixture
def zoo(_zoo, tmp_path):
    """Copies, which a test may damage."""

    def copy(kind):
        return shutil.copytree(_zoo[kind], tmp_path / kind, dirs_exist_ok=True)

    return copy


def run(folder, *arguments, out, fails=False):
    """The statistics that a run leaves, and what it printed; of one that fails, its message."""
    layers = () if {"--layers", "--measure-layers"} & set(arguments) else ("--measure-layers", "0,2")
    result = invoke("run", folder, *arguments, "--device", "cpu", *layers, "--out", out)
    said = " ".join(result.output.split())
    if not fails:
        assert result.exit_code == 0, result.output
        return AttentionStats.load(out / "stats.safetensors"), said
    assert result.exit_code == 2, result.output
    assert not out.exists()
    message = [line for line in result.output.splitlines() if line.startswith("llama-attn: ")]
    assert len(message) == 1, result.output
    assert "Traceback" not in result.output
    return message[0]


def entropies(weights):
    return torch.special.entr(torch.stack(weights).double()).sum(-1)


def matches(stats, model, layers=(0, 2), **inputs):
    """Whether the entropies are those of the weights that eager attention returns."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    expected = entropies([(output.attentions or output.encoder_attentions)[layer] for layer in layers])
    assert stats.layers == tuple(layers)
    torch.testing.assert_close(stats["entropy"].double(), expected, rtol=1e-5, atol=1e-5)


DECODERS = {
    "llama": "LlamaForCausalLM: streaming attention",
    "qwen2": "Qwen2ForCausalLM: sdpa attention",
    "mistral": "MistralForCausalLM: sdpa attention",
    "gpt2": "GPT2LMHeadModel: sdpa attention",
}


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind, zoo, tmp_path):
    folder = zoo(kind)
    stats, said = run(folder, "--prompt", TEXT, out=tmp_path / "out")
    assert DECODERS[kind] in said
    assert (stats.direction, stats.num_keys) == ("causal", len(TEXT))
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    theirs = upstream.LlamaForCausalLM if kind == "llama" else AutoModelForCausalLM
    matches(stats, theirs.from_pretrained(folder).eval(), input_ids=ids)
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {
        f"{name}.png" for i in (0, 2) for name in (f"layer_{i}_attention", f"hidden_states_{i}_norm", f"kv_{i}_norm")
    }
    assert "6 pictures, report.html" in said


@pytest.mark.parametrize("kind", ["bert", "bert_masked_lm"])
def test_encoders(kind, zoo, tmp_path):
    folder = zoo(kind)
    stats, said = run(folder, "--prompt", TEXT, out=tmp_path / "out")
    assert {"bert": "BertModel: sdpa", "bert_masked_lm": "BertForMaskedLM: sdpa"}[kind] in said
    assert stats.direction == "bidirectional"
    assert stats.tokens[0][0] == "[CLS]"
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    matches(stats, AutoModel.from_pretrained(folder).eval(), input_ids=ids)
    assert "6 pictures" in said


@pytest.mark.parametrize("kind", ["t5", "t5_encoder"])
@pytest.mark.usefixtures("undrawn")
def test_the_encoder_of_an_encoder_decoder(kind, zoo, tmp_path):
    folder = zoo(kind)
    stats, said = run(folder, "--prompt", TEXT, out=tmp_path / "out")
    assert ("the encoder of T5ForConditionalGeneration" in said) == (kind == "t5")
    assert stats.direction == "bidirectional"
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    matches(stats, T5EncoderModel.from_pretrained(folder).eval(), input_ids=ids)


def test_a_model_that_sees_reads_text(zoo, tmp_path):
    stats, said = run(zoo("llava"), "--prompt", TEXT, out=tmp_path / "out")
    assert "LlavaForConditionalGeneration: sdpa" in said
    assert stats.stack == "model.language_model.layers.#.self_attn"
    # Its template takes parts; what it would leave out of a string is there.
    stats, _ = run(zoo("llava"), "--system", "Be brief", "--user", "Ahoy", out=tmp_path / "chat")
    assert "".join(stats.tokens[0]) == "system:ĠBeĠbriefuser:ĠAhoy"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("kind", "wanted", "layers"), [("albert", "0,2", (0, 2)), ("lfm2", "0-9", (1, 2)), ("lfm2", "2", (2,))]
)
def test_layers_that_show_only_when_they_run(kind, wanted, layers, zoo, tmp_path):
    """A layer that is called several times; layers without attention are passed over."""
    folder = zoo(kind)
    stats, _ = run(folder, "--prompt", TEXT, "--measure-layers", wanted, out=tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    model = plan_class(folder).from_pretrained(folder).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    # Where layers have no attention, transformers lists those that have it.
    expected = entropies([weights[layer - 3 + len(weights)] for layer in layers])
    assert stats.layers == layers
    torch.testing.assert_close(stats["entropy"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_a_backend_that_was_asked_for(zoo, tmp_path):
    stats, said = run(zoo("qwen2"), "--prompt", TEXT, "--attn", "eager", "--dtype", "bfloat16", out=tmp_path / "out")
    assert stats.backend == "eager"
    assert "Qwen2ForCausalLM: eager attention" in said
    assert "bfloat16 on cpu" in said


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava"])
@pytest.mark.usefixtures("undrawn")
def test_generation(kind, zoo, tmp_path):
    folder = zoo(kind)
    stats, said = run(folder, "--prompt", TEXT, "--generate", 4, out=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = plan_class(folder).from_pretrained(folder).eval()
    inputs = tokenizer(TEXT, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert stats.tokens[0] == tokenizer.convert_ids_to_tokens(new[0].tolist())[:-1]
    assert len(stats.queries) == new.shape[1] - 1
    text = tokenizer.decode(new[0, len(TEXT) :], skip_special_tokens=True)
    shown = "".join(character for character in text if character.isprintable() or character in "\n\t")
    assert f"generated: {' '.join(shown.split())}" in said
    with record(model, AttentionStatsConfig(layers=(0, 2))) as recording:
        model(new[:, :-1])
    torch.testing.assert_close(stats["entropy"], recording.stats["entropy"], rtol=1e-5, atol=1e-5)


def test_what_is_generated_is_drawn(zoo, tmp_path):
    _, said = run(zoo("mistral"), "--prompt", TEXT, "--generate", 4, out=tmp_path / "out")
    assert "6 pictures, report.html" in said


def plan_class(folder):
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, plan(Checkpoint(str(folder)), None).family)


@pytest.mark.usefixtures("undrawn")
def test_generation_of_an_encoder_decoder_measures_its_decoder(zoo, tmp_path):
    folder = zoo("t5")
    stats, said = run(folder, "--prompt", TEXT, "--generate", 4, out=tmp_path / "out")
    assert (stats.direction, stats.num_keys) == ("causal", 4)
    assert stats.stack.startswith("decoder.block.#")
    assert stats.tokens[0][0] == "<pad>"
    assert "generated:" in said


def texts(tmp_path, **contents):
    paths = []
    for name, content in contents.items():
        paths += ["--file", tmp_path / f"{name}.txt"]
        paths[-1].write_text(content)
    return paths


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.usefixtures("undrawn")
def test_several_files_are_rows(kind, zoo, tmp_path):
    folder, long, short = zoo(kind), "Once upon a time there was a parrot", "Ahoy, me"
    stats, _ = run(folder, *texts(tmp_path, long=long, short=short), out=tmp_path / "out")
    assert stats.batch == 2
    for row, text in enumerate((long, short)):
        alone, _ = run(folder, "--prompt", text, out=tmp_path / f"alone{row}")
        length = alone.num_keys
        assert stats.tokens[row][:length] == alone.tokens[0]
        torch.testing.assert_close(stats["entropy"][:, row, :, :length], alone["entropy"][:, 0], rtol=1e-5, atol=1e-5)
        assert stats["entropy"][:, row, :, length:].isnan().all()
    assert length < stats.num_keys


def test_every_file_has_its_pictures(zoo, tmp_path):
    _, said = run(zoo("qwen2"), *texts(tmp_path, long="Once upon a time", short="Ahoy"), out=tmp_path / "out")
    for name in ("long.txt", "short.txt"):
        assert name in said
        assert len(list((tmp_path / "out" / name).glob("*.png"))) == 6
        assert (tmp_path / "out" / name / "report.html").is_file()
    assert "12 pictures, report.html for each file" in said


@pytest.mark.usefixtures("undrawn")
def test_a_model_that_ends_by_itself(zoo, tmp_path):
    folder = shutil.copytree(zoo("llama"), tmp_path / "model")
    stats, said = run(folder, "--prompt", TEXT, "--generate", 4, out=tmp_path / "out")
    assert "ended by itself" not in said
    (second,) = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(stats.tokens[0][-2:-1])
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": second}))
    _, said = run(folder, "--prompt", TEXT, "--generate", 4, out=tmp_path / "out")
    assert "the model ended by itself, after 2 of 4 tokens" in said
    assert "never fed back" not in said
    first = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(stats.tokens[0][-3])
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": first}))
    _, said = run(folder, "--prompt", TEXT, "--generate", 4, out=tmp_path / "out")
    assert "after 1 of 4 tokens; it was never fed back, so that no token measured is of the answer" in said


@pytest.mark.usefixtures("undrawn")
def test_rows_generate_what_they_would_alone(zoo, tmp_path):
    folder, long, short = zoo("gpt2"), "Once upon a time there was a parrot", "Ahoy, me"
    stats, _ = run(folder, *texts(tmp_path, long=long, short=short), "--generate", 3, out=tmp_path / "out")
    for row, text in enumerate((long, short)):
        alone, _ = run(folder, "--prompt", text, "--generate", 3, out=tmp_path / f"alone{row}")
        ours = stats["entropy"][:, row, :, -alone.num_keys :]
        torch.testing.assert_close(ours, alone["entropy"][:, 0], rtol=1e-4, atol=1e-4)
        assert stats.tokens[row][-alone.num_keys :] == alone.tokens[0]
        # The report marks what was generated: the last new token was never read.
        segments = stats.values["key_segment"][row].tolist()
        assert stats.segments == ("prompt", "generated")
        assert segments == [-1] * (stats.num_keys - alone.num_keys) + [0] * (alone.num_keys - 2) + [1] * 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", "AĠparrot</s>AĠship,Ġasea</s>Where?"),
        ("bert", "[CLS]AĠparrot[SEP]AĠship,Ġasea[SEP]Where?[SEP]"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_documents_are_segments_of_one_prompt(kind, expected, zoo, tmp_path):
    files = texts(tmp_path, one="A parrot", two="A ship, asea", three="Where?")
    stats, said = run(zoo(kind), *files, "--documents", out=tmp_path / "out")
    assert "".join(stats.tokens[0]) == expected
    assert stats.segments == ("special", "one.txt", "two.txt", "three.txt")
    mass = stats["segment_mass"]
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    weights = stats["weights_map"]
    assert weights.shape[-1] == stats.num_keys, "one token per bin"
    start = 1 if kind == "bert" else 0
    torch.testing.assert_close(mass[:, 0, :, -1, 1], weights[:, 0, :, -1, start : start + 8].sum(-1))
    queries, whose = (slice(None), "all tokens") if kind == "bert" else (slice(-1, None), "the last token")
    for name, share in zip(stats.segments, mass[:, 0, :, queries].mean((0, 1, 2)).tolist(), strict=True):
        assert f"{name} {share:.1%}" in said
    assert f"attention of {whose}" in said


@pytest.mark.usefixtures("undrawn")
def test_documents_and_what_is_generated_from_them(zoo, tmp_path):
    files = texts(tmp_path, one="A parrot", two="A ship, asea")
    stats, said = run(zoo("llama"), *files, "--documents", "--generate", 4, out=tmp_path / "out")
    assert stats.segments == ("special", "one.txt", "two.txt", "generated")
    assert "attention of the last 3 tokens" in said
    share = float(stats["segment_mass"][:, 0, :, -3:, 1].mean())
    assert f"one.txt {share:.1%}" in said


@pytest.mark.usefixtures("undrawn")
def test_files_of_one_name_are_told_apart(zoo, tmp_path):
    files = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text(f"This is {place}")
        files += ["--file", tmp_path / place / "text.txt"]
    stats, _ = run(zoo("qwen2"), *files, "--documents", out=tmp_path / "out")
    assert stats.segments == ("special", "text.txt", "text-2.txt")


def test_what_a_model_does_not_show_is_left_out_with_a_word(ids, tmp_path, capsys):
    with record(
        model := tiny_model(), AttentionStatsConfig(statistics=("sink_mass", "received", "weights_map", "key_norm"))
    ) as recording:
        model(ids)
    show(recording.stats, tmp_path, [0, 1], "weights", about="a model")
    said = " ".join(capsys.readouterr().out.split())
    assert {path.name for path in tmp_path.glob("*.png")} == {"layer_0_attention.png", "layer_1_attention.png"}
    assert "no table and no pictures of hidden states: this model does not show hidden_max, hidden_max_channel" in said
    assert "a model 2 pictures, report.html" in said


@pytest.mark.parametrize(
    ("kind", "architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM", ("AutoModelForCausalLM", "LlamaForCausalLM")),
        ("llama", None, ("AutoModelForCausalLM", "LlamaForCausalLM")),
        ("llama", "LlamaModel", ("AutoModel", "LlamaModel")),
        (
            "llama",
            "LlamaForSequenceClassification",
            ("AutoModelForSequenceClassification", "LlamaForSequenceClassification"),
        ),
        ("llama", "SomethingElse", ("AutoModelForCausalLM", "LlamaForCausalLM")),
        ("bert", "BertForMaskedLM", ("AutoModelForMaskedLM", "BertForMaskedLM")),
        ("bert", "BertLMHeadModel", ("AutoModelForCausalLM", "BertLMHeadModel")),
        ("bert", None, ("AutoModel", "BertModel")),
        ("t5", None, ("AutoModelForSeq2SeqLM", "T5ForConditionalGeneration")),
        ("t5", "T5EncoderModel", ("AutoModelForTextEncoding", "T5EncoderModel")),
        ("llava", None, ("AutoModelForImageTextToText", "LlavaForConditionalGeneration")),
    ],
)
def test_the_class_is_the_one_that_the_checkpoint_names(kind, architecture, expected, zoo):
    folder = zoo(kind)
    edit(folder, architectures=architecture and [architecture])
    chosen = plan(Checkpoint(str(folder)), None)
    assert (chosen.family, chosen.name) == expected
    assert chosen.is_llama == (expected == ("AutoModelForCausalLM", "LlamaForCausalLM"))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_of_loading_are_for_terminals(is_terminal, zoo, monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: is_terminal, write=str, flush=bool))
    transformers_logging.enable_progress_bar()
    try:
        plan(Checkpoint(str(zoo("bert"))), None)
        assert transformers_logging.is_progress_bar_enabled() == is_terminal
    finally:
        transformers_logging.enable_progress_bar()


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def drop(*names):
    def change(weights):
        for name in names:
            del weights[name]

    return change


def add(name, *shape):
    def change(weights):
        weights[name] = torch.zeros(shape)

    return change


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", drop(f"{Q}.weight"), f"1 weight is missing and would be random: {Q}.weight"),
        ("llama", drop("lm_head.weight"), "1 weight is missing and would be random: lm_head.weight"),
        (
            "llama",
            add(f"{Q}.bias", 48),
            f"as LlamaForCausalLM: 1 weight is in the files and not in the model: {Q}.bias",
        ),
        (
            "llama",
            add("model.layers.3.mlp.up_proj.weight", 64, 48),
            "in the files and not in the model: model.layers.3",
        ),
        ("llama", add("lm_head.bias", 263), "in the files and not in the model: lm_head.bias"),
        ("llama", add("model.embed_positions.weight", 128, 48), "not in the model: model.embed_positions.weight"),
        ("llama", add(f"{Q}.weight", 48, 96), "cannot load"),
        ("bert", drop("pooler.dense.weight", "pooler.dense.bias"), "2 weights are missing and would be random: pooler"),
        ("bert", add("encoder.layer.0.attention.self.distance.weight", 9, 9), "1 weight is in the files and not in"),
        ("t5", drop("decoder.block.0.layer.1.EncDecAttention.q.weight"), "1 weight is missing"),
        ("llava", drop("model.vision_tower.pre_layrnorm.weight"), "missing and would be random"),
    ],
)
def test_weights_that_do_not_fit(kind, change, message, zoo, tmp_path):
    folder = zoo(kind)
    weights = load_file(folder / "model.safetensors")
    if kind == "llava" and not any(name.startswith("model.vision_tower") for name in weights):
        change = drop(*(name for name in weights if name.endswith("pre_layrnorm.weight")))
    weights_of(folder, change)
    assert message in run(folder, "--prompt", TEXT, out=tmp_path / "out", fails=True)


def test_the_list_of_weights_is_short(zoo, tmp_path):
    folder = zoo("llama")
    edit(folder, num_hidden_layers=2)
    message = run(folder, "--prompt", TEXT, out=tmp_path / "out", fails=True)
    assert "9 weights are in the files and not in the model" in message
    assert "and 6 more" in message
    edit(folder, num_hidden_layers=5)
    assert "18 weights are missing" in run(folder, "--prompt", TEXT, out=tmp_path / "out", fails=True)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("bert_masked_lm", add("cls.seq_relationship.weight", 2, 48)),
        ("bert_masked_lm", add("bert.pooler.dense.weight", 48, 48)),
        ("llama", add("score.weight", 2, 48)),
        # Buffers of older versions.
        ("llama", add("model.layers.0.self_attn.rotary_emb.inv_freq", 6)),
        ("bert", add("embeddings.position_ids", 1, 128)),
    ],
)
def test_weights_that_no_attention_depends_on(kind, change, zoo):
    folder = zoo(kind)
    weights_of(folder, change)
    model, info = plan_class(folder).from_pretrained(folder, output_loading_info=True)
    assert what_is_wrong(model, info) is None


@pytest.mark.usefixtures("undrawn")
def test_tied_weights_are_not_missing(zoo, tmp_path):
    torch.manual_seed(0)
    folder = zoo("llama")
    tied = upstream.LlamaForCausalLM(LlamaConfig(**cli_models.GROUPED, tie_word_embeddings=True))
    tied.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    run(folder, "--prompt", TEXT, out=tmp_path / "out")


@pytest.mark.usefixtures("undrawn")
def test_a_base_encoder_leaves_the_head_of_its_checkpoint(zoo, tmp_path):
    """Where no class is named, the base of an encoder is loaded; a pooler that the files lack would be random."""
    folder = zoo("bert_masked_lm")
    edit(folder, architectures=None)
    message = run(folder, "--prompt", TEXT, out=tmp_path / "out", fails=True)
    assert "as BertModel: 2 weights are missing and would be random: pooler.dense.bias, pooler.dense.weight" in message
    weights_of(folder, add("bert.pooler.dense.weight", 48, 48))
    weights_of(folder, add("bert.pooler.dense.bias", 48))
    _, said = run(folder, "--prompt", TEXT, out=tmp_path / "out")
    assert "BertModel: sdpa" in said


def cut(name, length):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:length])

    return damage


def remove(*patterns):
    def damage(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return damage


def configure(**changes):
    return lambda folder: edit(folder, **changes)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("llama", cut("model.safetensors", 2000), "cannot load"),
        ("llama", cut("model.safetensors", -100), "cannot load"),
        ("llama", cut("config.json", 40), "cannot load"),
        ("llama", cut("tokenizer.json", 100), "cannot load the tokenizer"),
        ("llama", remove("config.json"), "cannot load"),
        ("llama", remove("model.safetensors"), "cannot load"),
        ("llama", remove("*token*"), ", which has no tokenizer.json: "),
        ("bert", remove("*token*"), "cannot load the tokenizer"),
        ("t5", remove("*token*"), "cannot load the tokenizer"),
        ("llama", configure(model_type="parrot"), "cannot load"),
        ("llama", configure(model_type="vit", architectures=None), "transformers has no class that reads text for"),
        ("llama", configure(hidden_size="large"), "cannot load"),
        ("llama", configure(num_attention_heads=5), "cannot load"),
        ("llama", configure(vocab_size=90), "it gives the token"),
    ],
)
def test_folders_that_cannot_be_loaded(kind, damage, message, zoo, tmp_path):
    folder = zoo(kind)
    damage(folder)
    assert message in run(folder, "--prompt", TEXT, out=tmp_path / "out", fails=True)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("llama", ["--prompt", "x", "--generate", "0"], "--generate: expected 1 or more, got 0"),
        ("llama", ["--prompt", "x", "--generate", "-3"], "--generate: expected 1 or more, got -3"),
        ("bert", ["--prompt", "x", "--generate", "2"], "no model that generates text (BertModel)"),
        ("bert_masked_lm", ["--prompt", "x", "--generate", "2"], "no model that generates text (BertForMaskedLM)"),
        ("llama", ["--prompt", "x", "--file", "ONE"], "give one of"),
        ("llama", ["--file", "ONE", "--documents"], "--documents: give --file for each of at least two, got 1"),
        ("llama", ["--prompt", "x", "--documents"], "--documents: give --file for each of at least two, got 0"),
        ("llama", ["--file", "ONE", "--file", "EMPTY"], "the text is empty: "),
        ("llama", ["--file", "ONE", "--file", "EMPTY", "--documents"], "the text is empty: "),
        ("llama", ["--file", "ONE", "--file", "NOTHING"], "cannot read "),
        ("llama", ["--messages", "EMPTY"], "the text is empty: "),
        (
            "llama",
            ["--file", "ONE", "--file", "ONE", "--statistics", "segment_mass"],
            "several --file with --documents",
        ),
        ("bert", [], "the tokenizer has no chat template"),
        (
            "bloom",
            ["--prompt", "x"],
            "cannot measure BloomForCausalLM: record: BloomForCausalLM has no attention that goes",
        ),
        ("vit", ["--prompt", "x"], "transformers has no class that reads text for the model_type 'vit'"),
        ("lfm2", ["--prompt", "x", "--layers", "0"], "--layers: 0 names no layer with attention; there are 1, 2"),
        (
            "lfm2",
            ["--prompt", "x", "--measure-layers", "0"],
            "-layers: 0 names no layer with attention; there are 1, 2",
        ),
        ("gpt2", ["--prompt", "x" * 200], "the text has 200 tokens, and the model positions for 128"),
        (
            "gpt2",
            ["--prompt", "x" * 120, "--generate", "10"],
            "the text has 130 tokens, and the model positions for 128",
        ),
        ("bert", ["--prompt", "x" * 200], "the text has 202 tokens, and the model positions for 128"),
        ("gpt2", ["--prompt", "x", "--attn", "flex_attention"], "cannot load"),
        ("llama", ["--prompt", "x", "--gguf-file", "missing.gguf"], "cannot load"),
        ("llama", ["--prompt", "x", "--adapter", "NOTHING"], "--adapter: there is no folder"),
        ("llama", ["--prompt", "x", "--adapter", "."], "--adapter: there is no adapter_config.json in ."),
    ],
    ids=str,
)
def test_bad_requests(kind, arguments, message, zoo, tmp_path):
    (tmp_path / "one").write_text("Ahoy")
    (tmp_path / "empty").write_text("\n")
    names = {name.upper(): tmp_path / name for name in ("one", "empty", "nothing")}
    arguments = [str(names.get(argument, argument)) for argument in arguments]
    assert message in run(zoo(kind), *arguments, out=tmp_path / "out", fails=True)


@pytest.mark.usefixtures("undrawn")
def test_a_template_that_leaves_out_a_message(zoo, tmp_path):
    folder = zoo("llama")
    (folder / "chat_template.jinja").write_text(
        "{% for turn in messages if turn.role == 'user' %}{{ turn.content }}{% endfor %}"
    )
    message = run(folder, "--system", "Be brief", "--user", "Ahoy", out=tmp_path / "out", fails=True)
    assert "the chat template leaves out what the system says" in message
    stats, _ = run(folder, "--user", "Ahoy", out=tmp_path / "out")
    assert "".join(stats.tokens[0]) == "Ahoy"


def test_a_folder_that_cannot_be_written_to(zoo, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("run", zoo("llama"), "--prompt", TEXT, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "--out: cannot make the folder" in result.output


def test_a_folder_that_was_there_stays(zoo, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    folder = zoo("llama")
    cut("model.safetensors", 2000)(folder)
    result = invoke("run", folder, "--prompt", TEXT, "--out", tmp_path / "out" / "new" / "er")
    assert result.exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]


CODE = """
from transformers import LlamaForCausalLM

class Louder(LlamaForCausalLM):
    pass
"""


@pytest.mark.usefixtures("undrawn")
def test_code_of_a_checkpoint_is_not_run_unasked(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = zoo("llama")
    (folder / "louder.py").write_text(CODE)
    edit(folder, auto_map={"AutoModelForCausalLM": "louder.Louder"}, architectures=["Louder"])
    message = run(folder, "--prompt", TEXT, out=tmp_path / "out", fails=True)
    assert "brings code of its own (AutoModelForCausalLM), which is not run unasked: --trust-remote-code" in message
    _, said = run(folder, "--prompt", TEXT, "--no-trust-remote-code", out=tmp_path / "out")
    assert "LlamaForCausalLM: streaming" in said
    _, said = run(folder, "--prompt", TEXT, "--trust-remote-code", out=tmp_path / "out")
    assert "Louder: sdpa" in said


@pytest.fixture
def adapted(zoo, tmp_path):
    """Makes an adapter of a model of some kind and size, as a folder."""
    from peft import LoraConfig, get_peft_model

    def make(base, settings=None, **changes):
        torch.manual_seed(1)
        model = upstream.LlamaForCausalLM(LlamaConfig(**cli_models.GROUPED | changes))
        settings = settings or LoraConfig(
            target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("undrawn")
def test_an_adapter(zoo, adapted, tmp_path):
    from peft import PeftModel

    folder, adapter = zoo("llama"), adapted("llama")
    plain, _ = run(folder, "--prompt", TEXT, out=tmp_path / "plain")
    stats, said = run(folder, "--prompt", TEXT, "--adapter", adapter, out=tmp_path / "out")
    assert "LlamaForCausalLM with LORA: streaming attention" in said
    assert float((stats["entropy"] - plain["entropy"]).abs().max()) > 0.01
    model = PeftModel.from_pretrained(upstream.LlamaForCausalLM.from_pretrained(folder), adapter).merge_and_unload()
    matches(
        stats, model.eval(), input_ids=AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    )
    run(folder, "--prompt", TEXT, "--adapter", adapter, "--generate", 3, out=tmp_path / "out")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("undrawn")
def test_an_adapter_with_tokens_of_its_own(zoo, adapted, tmp_path):
    from peft import PrefixTuningConfig

    adapter = adapted("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    stats, said = run(zoo("llama"), "--prompt", TEXT, "--adapter", adapter, out=tmp_path / "out")
    assert "with PREFIX_TUNING: streaming" in said
    assert "duplicate_token and induction are left out" in said
    assert stats.tokens[0][:5] == ["<adapter>"] * 4 + ["H"]
    assert stats.first_query == 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "is for another model: 8 weights are in the file and not in the model: "),
        ({"num_hidden_layers": 2}, "is for another model: 4 weights are missing and would be random: "),
        ({"hidden_size": 64}, "size mismatch for "),
    ],
)
def test_an_adapter_of_another_model(changes, message, zoo, adapted, tmp_path):
    adapter = adapted("llama", **changes)
    assert message in run(zoo("llama"), "--prompt", TEXT, "--adapter", adapter, out=tmp_path / "out", fails=True)
    assert "not found in the base model" in run(
        zoo("gpt2"), "--prompt", TEXT, "--adapter", adapter, out=tmp_path / "out", fails=True
    )
    message = run(adapter, "--prompt", TEXT, out=tmp_path / "out", fails=True)
    assert "this is an adapter; give its base model, and --adapter" in message
