"""What the zoo is made of: entries, stacks, and the settings of tiny models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

WINDOW, CHUNK = 5, 4

# What most text configurations take. With a wide initial range attention is far from uniform.
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHOUT_KV = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
WITHOUT_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
IMAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12,
    "patch_size": 4, "num_channels": 3, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, **EXPERTS,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_d_conv": 4}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = {"sliding_window": WINDOW, "layer_types": [SLIDING, SLIDING, FULL]}


@dataclass(frozen=True)
class Stack:
    """One attention stack.

    Args:
        path: With # for numbers.
        direction: ``"causal"``, ``"bidirectional"`` or ``"cross"``.
        output: Path from the attention module to the linear map that its output goes to ("../" is the parent); None
            if there is none for each head.
        layers: Number of every layer that has attention in its list, where it is not 0, 1, 2 …
        length: How many layers the list holds, attention or not; None for as many as have attention.
        axis: What its sequence is: the ids of the model, of its encoder, or something of its own (patches, frames).
        shared: Whether one module is called for several layers (albert), which its path cannot number.
        layer: Path of the layer that holds it, by default that of the last number.
        inside: Whether its masks are made in the layer itself, so that nobody else knows what is padding.
    """

    path: str
    direction: str = "causal"
    output: str | None = "o_proj"
    layers: tuple[int, ...] | None = None
    length: int | None = None
    axis: str = "ids"
    shared: bool = False
    layer: str | None = None
    inside: bool = False

    @property
    def cross(self) -> bool:
        return self.direction == "cross"


@dataclass(frozen=True)
class Entry:
    """One type of model.

    Args:
        name: Its ``model_type``, or a name for a variant.
        make: Builds it in float32, on the backend that is named.
        family: ``"decoder"``, ``"encoder"``, ``"vision"``, ``"audio"``, ``"pair"`` (encoder and decoder) or ``"joint"``
            (vision and text).
        stacks: Its attention stacks, the one that ``record`` takes by default first; none if it never asks.
        situations: Names of the situations it is tested in.
        stock: The backends of transformers that it runs on here.
        inputs: What is fed besides ids: a function of the batch size.
        refused: Why ``record`` refuses it.
    """

    name: str
    make: Callable[[str], PreTrainedModel]
    family: str
    stacks: tuple[Stack, ...]
    situations: tuple[str, ...]
    stock: tuple[str, ...] = ("eager", "sdpa")
    inputs: Callable[[int], dict[str, Any]] | None = None
    refused: str | None = None

    def build(self, backend: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """A random model, the same for every backend and dtype."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # Some warn of kernels that are not installed.
            warnings.simplefilter("ignore")
            model = self.make(backend)
        return _spread(model).to(dtype).eval()


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Give biases and learned sinks values, and matrices of attention some size where the configuration does not."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.split(".")[-1]
            if last in ("sinks", "sink", "attention_sink_bias"):
                parameter.normal_(0, 1, generator=generator)
            elif not parameter.any() and (last == "bias" or "relative_position" in last):
                parameter.normal_(0, 0.3, generator=generator)
            elif parameter.ndim == 2 and last == "weight" and 0 < parameter.std() < 0.1:
                parameter.mul_(0.25 / parameter.std())
    return model


def config(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **settings)


def of_class(name: str, settings: Any) -> Callable[[str], PreTrainedModel]:
    """Build class ``name`` of transformers from a configuration or from what makes one."""

    def make(backend: str) -> PreTrainedModel:
        made = settings() if callable(settings) else settings
        # The other way to multiply with experts is not for float64.
        return getattr(transformers, name)._from_config(
            made, attn_implementation=backend, experts_implementation="eager"
        )

    return make


# Situations, see ``zoo_situations``.
DECODING = ("plain", "left", "right", "packed", "cached", "cached_left", "static", "chunked", "generated")
NO_STATIC = tuple(name for name in DECODING if name != "static")
NO_PACKED = tuple(name for name in DECODING if name != "packed")
RECURRENT = ("plain", "left", "cached_one", "generated")
ENCODING = ("plain", "left", "right")
PAIRED = ("plain", "left", "cached", "generated")
ALONE = ("plain",)

# Where BERT and its like keep the output projection: beside the attention module.
BERT_OUTPUT = "../output.dense"
