"""Our class reads Llamas, refuses the rest, and steps back for a checkpoint that brings its own class."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from conftest import tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama import modeling_llama as upstream

import llama_attn
from llama_attn import LlamaForCausalLM, LlamaModel

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def entropies(model, ids):
    """Of eager's own weights."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(ids, output_attentions=True).attentions).double()
    return torch.special.entr(weights).sum(-1)


@pytest.fixture(params=["qwen2", "mistral"])
def other(request, tmp_path, ids):
    """A checkpoint that is no Llama, and what a Llama would make of it."""
    torch.manual_seed(0)
    if request.param == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    else:
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, entropies(model, ids)


def test_another_architecture_is_refused(other, ids):
    folder, right = other
    stated = json.loads((folder / "config.json").read_text())["model_type"]
    # Stock transformers warns and goes on, with other numbers.
    stock = upstream.LlamaForCausalLM.from_pretrained(folder)
    assert float((entropies(stock, ids) - right).abs().max()) > 0.5
    message = f"model_type '{stated}' is not 'llama'.*AutoModelForCausalLM.*llama_attn.record"
    for refused in (
        lambda: LlamaForCausalLM.from_pretrained(folder),
        lambda: LlamaModel.from_pretrained(folder),
        lambda: LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig.from_pretrained(folder)),
        lambda: LlamaForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder)),
        lambda: LlamaForCausalLM(AutoConfig.from_pretrained(folder)),
        lambda: LlamaForCausalLM._from_config(AutoConfig.from_pretrained(folder)),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ in ("Qwen2ForCausalLM", "MistralForCausalLM")


def test_a_configuration_given_by_hand_is_taken_at_its_word(other):
    folder, _ = other
    assert type(LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig(**SIZES))) is LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class DuckConfig(PreTrainedConfig):
    model_type = "duck"
    attribute_map = LlamaConfig.attribute_map


@pytest.mark.parametrize("config_class", [LlamaConfig, OwnConfig])
def test_subclasses_read_their_own_files_and_those_of_llama(config_class, tmp_path, ids):
    class Own(LlamaForCausalLM):
        config_class = OwnConfig

    model = tiny_model()
    model.config = config_class(**tiny_config().to_dict() | {"model_type": config_class.model_type})
    model.save_pretrained(tmp_path)
    loaded = Own.from_pretrained(tmp_path, config=OwnConfig.from_pretrained(tmp_path)).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(Own.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
    if config_class is OwnConfig:
        with pytest.raises(ValueError, match="model_type 'own_llama'"):
            LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_that_nobody_registered_passes(ids):
    model = LlamaForCausalLM(DuckConfig(**{k: v for k, v in tiny_config().to_dict().items() if k != "model_type"}))
    assert model(ids).logits.shape == (2, 37, 97)


CODE = """
from transformers import LlamaForCausalLM

class Louder(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A ``llama`` checkpoint with a class of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "louder"
    tiny_model().save_pretrained(folder)
    (folder / "louder.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "louder.Louder"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_with_code_of_its_own_keeps_its_class(with_code):
    load = AutoModelForCausalLM.from_pretrained
    try:
        llama_attn.unregister()
        expected = {trust: type(load(with_code, trust_remote_code=trust)).__name__ for trust in (None, False, True)}
    finally:
        llama_attn.register()
    assert expected == {None: "LlamaForCausalLM", False: "LlamaForCausalLM", True: "Louder"}
    for trust, name in expected.items():
        for model in (
            load(with_code, trust_remote_code=trust),
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(with_code), trust_remote_code=trust),
        ):
            assert type(model).__name__ == name
            assert (type(model) is LlamaForCausalLM) == (trust is not True)


def test_what_auto_model_makes_is_ours_in_every_way(tmp_path, ids):
    made = AutoModelForCausalLM.from_config(tiny_config())
    assert type(made) is LlamaForCausalLM
    assert type(AutoModelForCausalLM._model_mapping[LlamaConfig](tiny_config())) is LlamaForCausalLM
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301
        assert type(copied) is LlamaForCausalLM
        assert torch.equal(copied.eval()(ids).logits, made.eval()(ids).logits)
