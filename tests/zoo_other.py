"""Models of images and sound, pairs of encoder and decoder, images with text, and models that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from zoo_base import (
    ALONE,
    BERT_OUTPUT,
    ENCODING,
    FULL,
    IMAGE,
    MIXED,
    PAIRED,
    SLIDING,
    TEXT,
    WINDOW,
    WITHOUT_KV,
    Entry,
    Stack,
    config,
    of_class,
)


def pixels(batch: int, size: int = 12) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))}


def sound(batch: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 400, generator=torch.Generator().manual_seed(2))}


def _tower(name: str, cls: str, stack: Stack, settings: dict[str, Any], **more: Any) -> Entry:
    made = (IMAGE if name != "swin" else {}) | {"hidden_dropout_prob": 0.0, **settings}
    make = of_class(cls, lambda: config(more.pop("model_type", name), **made))
    stack = replace(stack, direction="bidirectional", axis="own")
    return Entry(name, make, "vision", (stack,), ALONE, inputs=more.pop("inputs", pixels), **more)


TOWERS = (
    _tower("vit", "ViTModel", Stack("layers.#.attention", output="o_proj"), {}),
    _tower("dinov2", "Dinov2Model", Stack("encoder.layer.#.attention", output="o_proj"), {}),
    _tower(
        "beit",
        "BeitModel",
        Stack("layers.#.attention", output="o_proj"),
        {"use_relative_position_bias": True},
    ),
    _tower("siglip_vision_model", "SiglipVisionModel", Stack("encoder.layers.#.self_attn", output="out_proj"), {}),
    _tower(
        "swin",
        "SwinModel",
        Stack("encoder.layers.#.blocks.#.attention", output="o_proj"),
        {
            "embed_dim": 16,
            "depths": [2],
            "num_heads": [4],
            "window_size": 2,
            "image_size": 8,
            "patch_size": 2,
            "drop_path_rate": 0.0,
        },
        inputs=lambda batch: pixels(batch, 8),
    ),
    _tower("clip_vision_model", "CLIPVisionModel", Stack("encoder.layers.#.self_attn", output="out_proj"), {}),
)


def _sound(name: str, cls: str, **more: Any) -> Entry:
    settings = {
        **WITHOUT_KV,
        "num_hidden_layers": 2,
        "conv_dim": (16, 16),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "apply_spec_augment": False,
        "layerdrop": 0.0,
        **{f"{part}_dropout": 0.0 for part in ("hidden", "activation", "attention", "final")},
    }
    stack = Stack("encoder.layers.#.attention", "bidirectional", "out_proj", axis="own")
    return Entry(name, of_class(cls, lambda: config(name, **settings)), "audio", (stack,), ALONE, inputs=sound, **more)


SOUNDS = (_sound("wav2vec2", "Wav2Vec2Model"), _sound("hubert", "HubertModel"))


def _pair(
    name: str, cls: str, stacks: tuple[str, str, str], output: str, settings: dict[str, Any], **more: Any
) -> Entry:
    """An encoder and a decoder. Paths: the decoder's attention to itself, to the encoder, the encoder's own."""
    decoder, cross, encoder = stacks
    # The layer is what the first number counts, a block of several in T5.
    first = {path: path[: path.index("#") + 1] for path in stacks}
    made = (
        Stack(decoder, "causal", output, axis="decoder", layer=first[decoder]),
        Stack(cross, "cross", output, axis="decoder", layer=first[cross]),
        Stack(encoder, "bidirectional", output, axis=more.pop("axis", "ids"), layer=first[encoder]),
    )
    make = of_class(cls, more.pop("make", lambda: config(more.get("model_type", name), **settings)))
    more.pop("model_type", None)
    return Entry(name, make, "pair", made, more.pop("situations", PAIRED), **more)


BART = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
BART_STACKS = (
    "model.decoder.layers.#.self_attn",
    "model.decoder.layers.#.encoder_attn",
    "model.encoder.layers.#.self_attn",
)
T5 = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5_STACKS = (
    "decoder.block.#.layer.#.SelfAttention",
    "decoder.block.#.layer.#.EncDecAttention",
    "encoder.block.#.layer.#.SelfAttention",
)


def _t5gemma() -> Any:
    module = {
        **TEXT,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL],
        "num_hidden_layers": 2,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    }
    return config("t5gemma", encoder=module, decoder=module, vocab_size=97, initializer_range=0.3)


def _bert2bert() -> Any:
    base = {**WITHOUT_KV, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}
    decoder = config("bert", **base, is_decoder=True, add_cross_attention=True)
    made = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config("bert", **base), decoder)
    made.decoder_start_token_id, made.pad_token_id, made.eos_token_id = 1, 0, 2
    return made


def spectrogram(batch: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 8, 24, generator=torch.Generator().manual_seed(2))}


PAIRS = (
    _pair(
        "whisper",
        "WhisperForConditionalGeneration",
        BART_STACKS,
        "out_proj",
        {
            **BART,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        inputs=spectrogram,
        axis="own",
        situations=("plain", "cached", "generated"),
    ),
    _pair("bart", "BartForConditionalGeneration", BART_STACKS, "out_proj", BART),
    _pair("m2m_100", "M2M100ForConditionalGeneration", BART_STACKS, "out_proj", BART),
    _pair("t5", "T5ForConditionalGeneration", T5_STACKS, "o", T5),
    _pair("mt5", "MT5ForConditionalGeneration", T5_STACKS, "o", T5),
    _pair(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        ("model.decoder.layers.#.self_attn", "model.decoder.layers.#.cross_attn", "model.encoder.layers.#.self_attn"),
        "o_proj",
        {},
        make=_t5gemma,
        stock=("eager",),
    ),
    _pair(
        "bert2bert",
        "EncoderDecoderModel",
        tuple(
            f"{side}.layer.#.{part}.self"
            for side, part in (
                ("decoder.bert.encoder", "attention"),
                ("decoder.bert.encoder", "crossattention"),
                ("encoder.encoder", "attention"),
            )
        ),
        BERT_OUTPUT,
        {},
        make=_bert2bert,
    ),
)


def _joint(name: str, cls: str, stacks: tuple[Stack, ...], settings: Callable[[], Any], **more: Any) -> Entry:
    return Entry(
        name, of_class(cls, settings), "joint", stacks, more.pop("situations", ("plain", "left", "cached")), **more
    )


# Four tokens of the ids stand for the image.
IMAGE_TOKEN = 96
IMAGE_PLACE = slice(4, 8)


def _grid(batch: int) -> dict[str, torch.Tensor]:
    """Patches as the Qwen models take them: 4 × 4 of each image, merged by twos."""
    values = torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}


def _tiles(batch: int) -> dict[str, torch.Tensor]:
    values = torch.randn(batch, 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {
        "pixel_values": values,
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(batch, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(batch, 12, 1, 2, dtype=torch.long),
    }


SMALL = {**IMAGE, "image_size": 8}
LANGUAGE = Stack("model.language_model.layers.#.self_attn")
TOWER = Stack("model.vision_tower.encoder.layers.#.self_attn", "bidirectional", "out_proj", axis="own")
PIECES = Stack("model.visual.blocks.#.attn", "bidirectional", None, axis="pieces")


def _qwen_vl(version: str) -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 4,
        "in_channels": 3,
        "out_hidden_size": 32,
    }
    vision |= (
        {"window_size": 16, "fullatt_block_indexes": [1]}
        if version == "qwen2_5_vl"
        else {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    )
    return config(
        version,
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=95,
        vision_start_token_id=94,
        vision_end_token_id=93,
    )


def _clip(name: str) -> Any:
    text = {**WITHOUT_KV, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    return config(name, text_config=text, vision_config=IMAGE, projection_dim=16)


JOINT = (
    _joint(
        "llava",
        "LlavaForConditionalGeneration",
        (LANGUAGE, TOWER),
        lambda: config(
            "llava",
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**SMALL, "model_type": "clip_vision_model"},
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            vision_feature_layer=-1,
        ),
        inputs=lambda batch: pixels(batch, 8),
    ),
    _joint(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        (LANGUAGE, TOWER),
        lambda: config(
            "gemma3",
            text_config={**TEXT, **MIXED, "query_pre_attn_scalar": 8},
            vision_config={**IMAGE, "image_size": 16},
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            boi_token_index=95,
            eoi_token_index=94,
        ),
        inputs=lambda batch: pixels(batch, 16),
        situations=("plain", "left", "cached", "generated", "right"),
    ),
    _joint(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        (LANGUAGE, PIECES),
        lambda: _qwen_vl("qwen2_5_vl"),
        inputs=_grid,
    ),
    _joint(
        "qwen3_vl", "Qwen3VLForConditionalGeneration", (LANGUAGE, PIECES), lambda: _qwen_vl("qwen3_vl"), inputs=_grid
    ),
    _joint(
        "clip",
        "CLIPModel",
        (
            Stack("text_model.encoder.layers.#.self_attn", "causal", "out_proj"),
            Stack("vision_model.encoder.layers.#.self_attn", "bidirectional", "out_proj", axis="own"),
        ),
        lambda: _clip("clip"),
        inputs=pixels,
        situations=ENCODING,
    ),
    _joint(
        "siglip",
        "SiglipModel",
        (
            Stack("text_model.encoder.layers.#.self_attn", "bidirectional", "out_proj"),
            Stack("vision_model.encoder.layers.#.self_attn", "bidirectional", "out_proj", axis="own"),
        ),
        lambda: _clip("siglip"),
        inputs=pixels,
        situations=ENCODING,
    ),
)


def _none(name: str, cls: str, settings: dict[str, Any], family: str = "decoder", **more: Any) -> Entry:
    make = of_class(cls, lambda: config(name, **settings))
    return Entry(name, make, family, (), ALONE, refused="its attention does not go through the interface", **more)


REFUSED = (
    _none(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {**WITHOUT_KV, "num_hidden_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        stock=("eager",),
    ),
    _none(
        "gptj",
        "GPTJForCausalLM",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        stock=("eager",),
    ),
    _none("bloom", "BloomForCausalLM", {**WITHOUT_KV, "n_layer": 2, "n_head": 4}, stock=("eager",)),
    _none(
        "mpt",
        "MptForCausalLM",
        {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        stock=("eager",),
    ),
    _none("falcon", "FalconForCausalLM", {**WITHOUT_KV, "alibi": False}),
    _none("deberta-v2", "DebertaV2Model", WITHOUT_KV, "encoder", stock=("eager",)),
    _none("mpnet", "MPNetModel", WITHOUT_KV, "encoder", stock=("eager",)),
)
