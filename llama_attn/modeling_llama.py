"""A Llama that can say what its attention does: transformers' own model, observed.

Every class is a subclass of its namesake in transformers and runs its code. What is added: with
``output_attention_stats`` a recorder travels through the keyword arguments of the forward, every layer measures its
own queries and keys, and the model's output carries the statistics. Without it, upstream's forward runs unchanged.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import find_first_full_attention_index, find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import LlamaConfig, modeling_llama as upstream
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from llama_attn.backends.registry import all_backends, attention_function, check_request, get_backend, is_streaming
from llama_attn.engines import assign, get_engine
from llama_attn.engines._operator import walk
from llama_attn.observe.architecture import refuse_other_architectures
from llama_attn.observe.generation import GeneratesAttentionStats
from llama_attn.observe.outputs import BaseModelOutputWithAttentionStats, CausalLMOutputWithAttentionStats
from llama_attn.observe.pipelining import RefusesInPipelines, refuse_pipeline
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.parallel import HeadShard
from llama_attn.stats.recorder import Recorder, Step
from llama_attn.stats.visibility import Visibility

__all__ = [
    "LlamaAttention",
    "LlamaDecoderLayer",
    "LlamaFlashAttention2",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LlamaModel",
    "LlamaRMSNorm",
    "LlamaRotaryEmbedding",
    "LlamaSdpaAttention",
]

StatsArgument = AttentionStatsConfig | bool | None


class LlamaAttention(upstream.LlamaAttention):
    """Multi-head attention that shows its queries and keys to a recorder."""

    # A subclass that sets it ignores the configuration's backend.
    pinned_backend: ClassVar[str | None] = None

    def forward(
        self,
        hidden_states: Float[Tensor, "batch query hidden"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch query hidden"], Tensor | None]:
        """Upstream's forward; with a recorder or a pinned backend the same operations, one by one.

        Raises:
            ValueError: The backend is pinned and the mask was made for another.
            ImportError: The pinned backend does not run here.
        """
        measuring = recorder is not None and recorder.wants(self.layer_idx)
        if not measuring and self.pinned_backend is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        if position_embeddings is None:
            raise ValueError("position_embeddings: expected (cos, sin) from LlamaRotaryEmbedding, got None")
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        name = self.config._attn_implementation
        if self.pinned_backend is not None:
            name = get_backend(self.pinned_backend).name
            origin = self.config._attn_implementation or "sdpa"
            get_backend(name).check_mask(origin, attention_mask, query.shape[2], key.shape[2])
        if is_streaming(name):
            kwargs["recorder"] = recorder
        else:
            kwargs.pop("visibility", None)
        output, weights = attention_function(name)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if recorder is not None:
            recorder.observe(self.layer_idx, query, key, value, self.scaling, self._output_weight)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _output_weight(self, device: torch.device) -> Float[Tensor, "head hidden channel"]:
        """What ``o_proj``, which runs on ``device``, does to the channels of each head, whatever layer it is."""
        if type(self.o_proj) is nn.Linear and not self.o_proj.weight.is_meta:
            weight = self.o_proj.weight
            # Under tensor parallelism the part of it that belongs to the heads held here.
            weight = getattr(weight, "to_local", lambda: weight)()
        else:
            # Quantised, adapted or offloaded: ask the layer itself, one unit vector per channel.
            channels, like = self.o_proj.in_features, next(self.o_proj.parameters())
            dtype = like.dtype if like.is_floating_point() else torch.float32
            units = torch.eye(channels, device=device, dtype=dtype)
            weight = (self.o_proj(units) - self.o_proj(torch.zeros_like(units[:1]))).T
        return rearrange(weight, "hidden (head channel) -> head hidden channel", channel=self.head_dim)


class LlamaSdpaAttention(LlamaAttention):
    """`LlamaAttention` pinned to ``sdpa``."""

    pinned_backend = "sdpa"


class LlamaFlashAttention2(LlamaAttention):
    """`LlamaAttention` pinned to ``flash_attention_2``."""

    pinned_backend = "flash_attention_2"


class LlamaDecoderLayer(upstream.LlamaDecoderLayer):
    """A decoder layer that shows the residual stream to a recorder."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn.__class__ = LlamaAttention

    def forward(
        self, hidden_states: Float[Tensor, "batch query hidden"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "batch query hidden"]:
        """Upstream's forward; with a recorder, the layer's input and the last layer's output are measured."""
        recorder: Recorder | None = kwargs.get("recorder")
        output: Tensor
        if recorder is None:
            output = super().forward(hidden_states, *args, **kwargs)
            return output
        layer = self.self_attn.layer_idx
        recorder.record_hidden(layer, hidden_states.detach())
        output = super().forward(hidden_states, *args, **kwargs)
        if layer == recorder.num_layers - 1:
            recorder.record_hidden(layer + 1, output.detach())
        return output


class _ChecksBackend:
    """Answers for a backend that does not run here before transformers does, with what to install."""

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        if attn_implementation is not None:
            check_request(attn_implementation)
        adjust = super()._check_and_adjust_attn_implementation  # type: ignore[misc]
        return adjust(attn_implementation, is_init_check, allow_all_kernels)


class LlamaModel(_ChecksBackend, upstream.LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: LlamaConfig) -> None:
        refuse_other_architectures(config)
        super().__init__(config)
        # Swapped, not built again: a second set of weights would move the random state of the first.
        for layer in self.layers:
            layer.__class__ = LlamaDecoderLayer
            layer.self_attn.__class__ = LlamaAttention

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Int[Tensor, "batch query"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch query hidden"] | None = None,
        use_cache: bool | None = None,
        output_attention_stats: StatsArgument = None,
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Upstream's forward, and statistics of every head on request.

        Args:
            input_ids: Token ids.
            attention_mask: (batch, key) with 1 for real tokens, or a 4-D mask, which is honoured as given.
            position_ids: Positions for RoPE.
            past_key_values: Cache of keys and values.
            inputs_embeds: Embeddings in place of ids.
            use_cache: Whether to return a cache.
            output_attention_stats: True or a configuration adds ``attention_stats`` to the output.
            recorder: Where to put them instead, for models that contain this one.
            **kwargs: Passed on to upstream.

        Raises:
            ValueError: A request that this call cannot serve.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        own = None
        if recorder is None and (config := AttentionStatsConfig.from_argument(output_attention_stats)) is not None:
            recorder = own = new_recorder(config, self)
        streaming = is_streaming(self.config._attn_implementation)
        if recorder is None and not streaming:
            return super().forward(**inputs, **kwargs)
        if streaming and kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError(
                "output_attentions=True: streaming backends never hold the weights; use "
                'attn_implementation="eager", or output_attention_stats with the statistic "weights_map"'
            )
        visibility = self._visibility(**inputs, is_causal=kwargs.get("is_causal"))
        if streaming:
            kwargs["visibility"] = visibility
        if recorder is not None:
            recorder.start(visibility, input_ids)
            kwargs["recorder"] = recorder
        if own is None:
            return super().forward(**inputs, **kwargs)
        return_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        outputs = super().forward(**inputs, **kwargs, return_dict=True)
        stats = own.finish(outputs.last_hidden_state.device)
        outputs = BaseModelOutputWithAttentionStats(**outputs, attention_stats=stats)
        return outputs if return_dict else outputs.to_tuple()

    def _visibility(
        self,
        input_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        is_causal: bool | None,
    ) -> Visibility:
        """Who sees whom in this forward, as the backend will have it."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise ValueError(
                f"attention_mask: streaming and statistics need a tensor, (batch, key) or 4-D, got {type(attention_mask).__name__}"
            )
        batch, num_queries = tokens.shape[:2]
        offset, static = 0, False
        if past_key_values is not None:
            layer = find_first_full_attention_index(past_key_values)
            offset = int(past_key_values.get_query_offset(layer))
            static = past_key_values.get_mask_sizes(num_queries, layer)[0] != offset + num_queries
            # In this order: a compiled graph does not know the filled length, on which `static` depends.
            if "flash" in (self.config._attn_implementation or "") and static:
                raise ValueError(
                    "past_key_values: FlashAttention has no mask that hides the unfilled slots of a static cache, so "
                    "there is no attention to measure; use a DynamicCache, or another attn_implementation"
                )
        causal = True if is_causal is None else is_causal
        if causal and not all(layer.self_attn.is_causal for layer in self.layers):
            raise ValueError(
                "is_causal: layers say False and the model says True, which backends read differently; "
                "pass is_causal=False or set config.is_causal"
            )
        own_bool_mask = attention_mask is not None and attention_mask.ndim == 4 and attention_mask.dtype == torch.bool
        if own_bool_mask and self.config._attn_implementation == "eager":
            raise ValueError(
                "attention_mask: eager attention adds a 4-D mask to the scores, so that a bool one masks nothing; "
                "give it as floats, 0 where a key may be seen and torch.finfo(dtype).min where not"
            )
        sequence = None
        if position_ids is not None and attention_mask is None and causal:
            # The rule of upstream's FlashAttention differs from that of its masks.
            if "flash" in (self.config._attn_implementation or ""):
                packed = offset == 0 and bool(_is_packed_sequence(position_ids, batch))
            else:
                packed = past_key_values is None and not use_cache
            sequence = find_packed_sequence_indices(position_ids.expand(batch, -1)) if packed else None
        return Visibility.of_inputs(
            batch=batch,
            num_queries=num_queries,
            offset=offset,
            device=tokens.device,
            attention_mask=attention_mask,
            sequence=sequence,
            causal=causal,
            static=static,
        )


class LlamaForCausalLM(_ChecksBackend, GeneratesAttentionStats, RefusesInPipelines, upstream.LlamaForCausalLM):
    """transformers' ``LlamaForCausalLM`` with ``output_attention_stats``."""

    def __init__(self, config: LlamaConfig) -> None:
        # Not upstream's __init__, which would build its own LlamaModel first.
        super(upstream.LlamaForCausalLM, self).__init__(config)
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch query"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch query hidden"] | None = None,
        labels: Int[Tensor, "batch query"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attention_stats: StatsArgument = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Upstream's forward, and statistics of every head on request.

        Args:
            input_ids: Token ids.
            attention_mask: (batch, key) with 1 for real tokens, or a 4-D mask, which is honoured as given.
            position_ids: Positions for RoPE.
            past_key_values: Cache of keys and values.
            inputs_embeds: Embeddings in place of ids.
            labels: Ids to compute the loss for, −100 to ignore.
            use_cache: Whether to return a cache.
            logits_to_keep: Compute logits for the last so many tokens only; 0 for all.
            output_attention_stats: True or an `AttentionStatsConfig` adds ``attention_stats`` to the output.
            **kwargs: Passed on to upstream.

        Raises:
            ValueError: A request that this call cannot serve.

        Example:
            >>> outputs = model(**inputs, output_attention_stats=True)
            >>> outputs.attention_stats["entropy"].shape  # layer, batch, head, query
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        config = AttentionStatsConfig.from_argument(output_attention_stats)
        if config is None:
            return super().forward(**inputs, **kwargs)
        recorder = self._new_recorder(config)
        outputs = super().forward(**inputs, **kwargs, recorder=recorder, return_dict=True)
        stats = recorder.finish(outputs.logits.device)
        return CausalLMOutputWithAttentionStats(**outputs, attention_stats=stats)

    def _new_recorder(self, config: AttentionStatsConfig, step: Step | None = None) -> Recorder:
        refuse_pipeline(self)
        return new_recorder(config, self.model, step)


def new_recorder(stats_config: AttentionStatsConfig, model: LlamaModel, step: Step | None = None) -> Recorder:
    """A recorder for one forward of ``model``."""
    config = model.config
    backend = all_backends().get(config._attn_implementation or "sdpa")
    engine = stats_config.engine or (backend.engine if backend else None)
    if engine is not None:
        get_engine(engine)
    return Recorder(
        stats_config,
        assign=partial(assign, engine=engine),
        walk=walk,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        backend=config._attn_implementation or "sdpa",
        model=config._name_or_path,
        step=step,
        shard=HeadShard.of_attention(model.layers[0].self_attn),
    )
