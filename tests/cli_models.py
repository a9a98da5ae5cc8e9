"""Tiny random models of many kinds, saved as folders with a tokenizer of 256 bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.models.llama import LlamaConfig, modeling_llama as upstream

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
VOCABULARY = [*SPECIAL.values(), "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As of models that also see: parts are looked at, strings are not.
TEMPLATE_OF_PARTS = (
    "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}\n{% endfor %}"
)
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


def tokenizer(template: str | None = TEMPLATE, *, encloses: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """One token per byte; as of a BERT, which puts [CLS] and [SEP] around a text, if it ``encloses``."""
    of_bytes = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    of_bytes.add_special_tokens(VOCABULARY[:7])
    if encloses:
        ids = [(token, VOCABULARY.index(token)) for token in ("[CLS]", "[SEP]")]
        of_bytes.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=of_bytes, **(special or {"eos_token": "</s>"}))
    made.chat_template = template
    return made


def _t5(cls: type[PreTrainedModel] = T5ForConditionalGeneration) -> PreTrainedModel:
    return cls(
        T5Config(
            vocab_size=len(VOCABULARY), d_model=48, d_kv=12, d_ff=64, num_layers=3, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip


def _llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = LlamaConfig(**GROUPED)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: upstream.LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=len(VOCABULARY), n_embd=48, n_layer=3, n_head=4, n_positions=128, eos_token_id=2)
    ),
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "bert_masked_lm": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "t5": _t5,
    "t5_encoder": lambda: _t5(T5EncoderModel),
    "llava": _llava,
    # One layer that is called three times; layers without attention between those with it.
    "albert": lambda: AlbertModel(AlbertConfig(**SIZES, embedding_size=16)),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "full_attention"], block_multiple_of=16)
    ),
    # Attention that nobody can observe, and a model that does not read.
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=len(VOCABULARY), hidden_size=48, n_layer=2, n_head=4)),
    "vit": lambda: ViTModel(
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=12)
    ),
}


def save(kind: str, folder: Path) -> Path:
    """A folder with a model of that kind and its tokenizer."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    # Biases are zero at first, and would not be missed.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if "bert" in kind:
        made = tokenizer(
            None, encloses=True, **{name: SPECIAL[name] for name in ("pad_token", "cls_token", "sep_token")}
        )
    else:
        made = tokenizer(TEMPLATE_OF_PARTS if kind == "llava" else TEMPLATE)
    made.save_pretrained(folder)
    return folder
