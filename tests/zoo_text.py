"""Models of text: decoders, hybrids with layers that have no attention, encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zoo_base import (
    BERT_OUTPUT,
    CHUNK,
    DECODING,
    ENCODING,
    EXPERTS,
    FULL,
    LINEAR,
    MAMBA,
    MIXED,
    MLA,
    RECURRENT,
    SLIDING,
    TEXT,
    WINDOW,
    WITHOUT_HEAD_DIM,
    WITHOUT_KV,
    Entry,
    Stack,
    config,
    of_class,
)

SELF = "model.layers.#.self_attn"


def _decoder(
    name: str,
    cls: str,
    settings: dict[str, Any] | None = None,
    *,
    base: dict[str, Any] | None = None,
    stack: Stack | str = SELF,
    output: str | None = "o_proj",
    situations: tuple[str, ...] = DECODING,
    model_type: str | None = None,
    **more: Any,
) -> Entry:
    settings = (TEXT if base is None else base) | (settings or {})
    stack = Stack(stack, output=output) if isinstance(stack, str) else stack
    make = of_class(cls, lambda: config(model_type or name, **settings))
    return Entry(name, make, "decoder", (stack,), situations, **more)


def _gpt(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 97,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **more,
    }


DECODERS = (
    _decoder("llama", "LlamaForCausalLM"),
    _decoder("qwen2", "Qwen2ForCausalLM", {"use_sliding_window": True, **MIXED}),
    _decoder("qwen3", "Qwen3ForCausalLM"),
    _decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "decoder_sparse_step": 2, "norm_topk_prob": True, **EXPERTS},
    ),
    _decoder("olmo2", "Olmo2ForCausalLM", base=WITHOUT_HEAD_DIM),
    _decoder("granite", "GraniteForCausalLM", {"attention_multiplier": 0.3}, base=WITHOUT_HEAD_DIM),
    _decoder("gpt_neox", "GPTNeoXForCausalLM", base=WITHOUT_KV, stack="gpt_neox.layers.#.attention", output="dense"),
    _decoder(
        "opt",
        "OPTForCausalLM",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
        base=WITHOUT_KV,
        stack="model.decoder.layers.#.self_attn",
        output="out_proj",
    ),
    _decoder("gpt2", "GPT2LMHeadModel", base=_gpt(), stack="transformer.h.#.attn", output="c_proj"),
    _decoder("phi", "PhiForCausalLM", base=WITHOUT_HEAD_DIM, output="dense"),
    _decoder(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        base=_gpt(multi_query=True),
        stack="transformer.h.#.attn",
        output="c_proj",
    ),
    _decoder(
        "biogpt",
        "BioGptForCausalLM",
        base=WITHOUT_KV,
        stack="biogpt.layers.#.self_attn",
        output="out_proj",
    ),
    _decoder("mistral", "MistralForCausalLM", {"sliding_window": WINDOW}),
    _decoder("mixtral", "MixtralForCausalLM", {"sliding_window": WINDOW, "num_local_experts": 4}),
    _decoder("phi3", "Phi3ForCausalLM", {"sliding_window": WINDOW}, base=WITHOUT_HEAD_DIM),
    _decoder("starcoder2", "Starcoder2ForCausalLM", {"sliding_window": WINDOW}, base=WITHOUT_HEAD_DIM),
    _decoder(
        "gemma2",
        "Gemma2ForCausalLM",
        {**MIXED, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        stock=("eager",),
    ),
    _decoder("gemma3_text", "Gemma3ForCausalLM", {**MIXED, "query_pre_attn_scalar": 8}),
    _decoder("cohere2", "Cohere2ForCausalLM", MIXED),
    _decoder(
        "gpt_oss", "GptOssForCausalLM", {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}, stock=("eager",)
    ),
    _decoder("exaone4", "Exaone4ForCausalLM", MIXED),
    _decoder(
        "smollm3",
        "SmolLM3ForCausalLM",
        {"use_sliding_window": True, "no_rope_layers": [1, 1, 0], **MIXED},
        base=WITHOUT_HEAD_DIM,
    ),
    _decoder("granite_swa", "GraniteSWAForCausalLM", MIXED, base=WITHOUT_HEAD_DIM, stock=("eager",)),
    _decoder(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {**MIXED, **EXPERTS, "v_head_dim": 6, "n_routed_experts": 4},
        stock=("eager",),
    ),
    _decoder(
        "llama4_text",
        "Llama4ForCausalLM",
        {
            "attention_chunk_size": CHUNK,
            "num_local_experts": 2,
            "no_rope_layers": [1, 1, 0],
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "chunked_attention", FULL],
            "floor_scale": 4,
        },
    ),
    _decoder("deepseek_v3", "DeepseekV3ForCausalLM", MLA, base=WITHOUT_HEAD_DIM),
    _decoder(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        {**MLA, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
        base=WITHOUT_HEAD_DIM,
        stack=Stack(SELF, inside=True),
    ),
    _decoder(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        {**MLA, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
        base=WITHOUT_HEAD_DIM,
        stack=Stack(SELF, inside=True),
    ),
    _decoder(
        "gemma4_text",
        "Gemma4ForCausalLM",
        {**MIXED, "vocab_size_per_layer_input": 97, "global_head_dim": 16, "hidden_size_per_layer_input": 8},
    ),
    _decoder(
        "doge",
        "DogeForCausalLM",
        {"keep_window_size": 4},
        base=WITHOUT_HEAD_DIM,
        stack=Stack(SELF, inside=True),
    ),
)


def _hybrid(name: str, cls: str, settings: dict[str, Any], layers: tuple[int, ...], **more: Any) -> Entry:
    stack = Stack(more.pop("stack", SELF), output=more.pop("output", "o_proj"), layers=layers, length=4)
    base = more.pop("base", WITHOUT_HEAD_DIM) | {"num_hidden_layers": 4}
    situations = more.pop("situations", RECURRENT)
    return replace(
        _decoder(name, cls, settings, base=base, stack=stack, situations=situations, **more), family="hybrid"
    )


HYBRIDS = (
    _hybrid(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **LINEAR,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", FULL, "linear_attention", FULL],
        },
        (1, 3),
        output=None,
        base=TEXT,
    ),
    _hybrid(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        {**LINEAR, "layer_types": ["linear_attention", FULL, "linear_attention", FULL]},
        (1, 3),
        output=None,
        base=TEXT,
    ),
    _hybrid(
        "jamba",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        (1, 3),
    ),
    _hybrid("bamba", "BambaForCausalLM", {**MAMBA, "attn_layer_indices": [0, 3]}, (0, 3)),
    _hybrid("lfm2", "Lfm2ForCausalLM", {"layer_types": ["conv", FULL, "conv", FULL]}, (1, 3), output="out_proj"),
    _hybrid(
        "minimax",
        "MiniMaxForCausalLM",
        {"num_local_experts": 2, "block_size": 4, "layer_types": ["linear_attention", FULL, "linear_attention", FULL]},
        (1, 3),
        base=TEXT,
        # When it decodes, its masks are of the wrong tokens: padding is seen, and real tokens see nothing.
        situations=("plain", "left"),
    ),
    _hybrid("falcon_h1", "FalconH1ForCausalLM", {**MAMBA, "mamba_d_ssm": 64}, (0, 1, 2, 3)),
    _hybrid(
        "zamba2",
        "Zamba2ForCausalLM",
        {
            "hybrid_layer_ids": [1, 3],
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
        },
        (1, 3),
        stack="model.layers.#.shared_transformer.self_attn",
    ),
)


def _encoder(name: str, cls: str, stack: Stack, settings: dict[str, Any] | None = None, **more: Any) -> Entry:
    settings = {
        **WITHOUT_KV,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **(settings or {}),
    }
    make = of_class(cls, lambda: config(more.pop("model_type", name), **settings))
    return Entry(name, make, "encoder", (replace(stack, direction="bidirectional"),), ENCODING, **more)


ENCODERS = (
    _encoder("bert", "BertModel", Stack("encoder.layer.#.attention.self", output=BERT_OUTPUT)),
    _encoder("roberta", "RobertaModel", Stack("encoder.layer.#.attention.self", output=BERT_OUTPUT)),
    _encoder(
        "electra", "ElectraModel", Stack("encoder.layer.#.attention.self", output=BERT_OUTPUT), {"embedding_size": 16}
    ),
    _encoder(
        "esm",
        "EsmModel",
        Stack("encoder.layer.#.attention.self", output=BERT_OUTPUT),
        {"position_embedding_type": "rotary", "mask_token_id": 3},
    ),
    _encoder(
        "distilbert",
        "DistilBertModel",
        Stack("transformer.layer.#.attention", output="out_lin"),
        {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    _encoder(
        "albert",
        "AlbertModel",
        Stack("encoder.albert_layer_groups.#.albert_layers.#.attention", output="dense", shared=True, layers=(0, 1, 2)),
        {"embedding_size": 16},
    ),
    _encoder(
        "modernbert",
        "ModernBertModel",
        Stack("layers.#.attn", output="Wo"),
        {"local_attention": 6, "layer_types": [FULL, SLIDING, SLIDING], "cls_token_id": 1, "sep_token_id": 2},
    ),
)
