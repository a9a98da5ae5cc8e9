"""A Llama that can say what its attention does: transformers' own model, observed.

Every class is a subclass of its namesake in transformers and runs its code. What is added: with
``output_attention_stats`` the attention calls of one forward are observed, as `llama_attn.record` does with any model,
and the model's output carries the statistics. Without it, upstream's forward runs unchanged.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import LlamaConfig, modeling_llama as upstream
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from llama_attn.backends.registry import check_request, get_backend, is_streaming
from llama_attn.observe.architecture import refuse_other_architectures
from llama_attn.observe.forward import Forward, Observed, Stack
from llama_attn.observe.generation import GeneratesAttentionStats
from llama_attn.observe.interface import are_seen, show_states
from llama_attn.observe.outputs import BaseModelOutputWithAttentionStats, CausalLMOutputWithAttentionStats
from llama_attn.observe.pipelining import RefusesInPipelines, refuse_pipeline
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.step import Step

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
"""What is measured: all that a configuration says, the default statistics, or nothing."""
Forwards = TypeVar("Forwards", bound=Callable[..., Any])
# What runs when any module is called.
_CALL = nn.Module.__call__.__code__


def _with_argument(upstreams: Callable[..., Any]) -> Callable[[Forwards], Forwards]:
    """Give a forward the signature of upstream's, which generate and the Trainer read, and one parameter more."""
    signature = inspect.signature(upstreams)
    *named, rest = signature.parameters.values()
    ours = inspect.Parameter(
        "output_attention_stats", rest.POSITIONAL_OR_KEYWORD, default=None, annotation=StatsArgument
    )

    def decorate(forward: Forwards) -> Forwards:
        forward.__signature__ = signature.replace(parameters=[*named, ours, rest])  # type: ignore[attr-defined]
        return forward

    return decorate


class LlamaAttention(upstream.LlamaAttention):
    """Multi-head attention, and what an observer need not find out."""

    @property
    def output_projection(self) -> nn.Module:
        """The layer that takes the attention's output."""
        return self.o_proj


class _PinnedAttention(LlamaAttention):
    """Ignores the configuration's backend for one of its own."""

    pinned_backend: ClassVar[str]

    @property
    def config(self) -> Any:
        """The configuration, with the backend that is pinned."""
        return _Pinned(self.__dict__["config"], get_backend(self.pinned_backend).name)

    @config.setter
    def config(self, config: LlamaConfig) -> None:
        self.__dict__["config"] = config

    def forward(
        self,
        hidden_states: Float[Tensor, "batch query hidden"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch query hidden"], Tensor | None]:
        """Upstream's forward on the pinned backend.

        Raises:
            ValueError: The mask was made for another backend.
            ImportError: The pinned backend does not run here.
        """
        origin = self.__dict__["config"]._attn_implementation or "sdpa"
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
        num_queries = hidden_states.shape[1]
        num_keys = num_queries + (0 if cache is None else int(cache.get_seq_length(self.layer_idx)))
        get_backend(self.pinned_backend).check_mask(origin, attention_mask, num_queries, num_keys)
        return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)


class _Pinned:
    """A configuration with another backend."""

    def __init__(self, config: LlamaConfig, backend: str) -> None:
        self._config, self._attn_implementation = config, backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class LlamaSdpaAttention(_PinnedAttention):
    """`LlamaAttention` pinned to ``sdpa``."""

    pinned_backend = "sdpa"


class LlamaFlashAttention2(_PinnedAttention):
    """`LlamaAttention` pinned to ``flash_attention_2``."""

    pinned_backend = "flash_attention_2"


class LlamaDecoderLayer(upstream.LlamaDecoderLayer):
    """A decoder layer that shows the residual stream to whoever observes its attention."""

    # So that nobody puts hooks on it besides.
    is_observed = True

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn.__class__ = LlamaAttention

    def forward(
        self, hidden_states: Float[Tensor, "batch query hidden"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "batch query hidden"]:
        """Upstream's forward; an observer is shown the layer's input and output."""
        if not are_seen():
            return super().forward(hidden_states, *args, **kwargs)
        show_states(self.self_attn, hidden_states, entering=True)
        output: Tensor = super().forward(hidden_states, *args, **kwargs)
        show_states(self.self_attn, output, entering=False)
        return output


class _ChecksBackend:
    """Answers for a backend that does not run here before transformers does, with what to install."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation is not None:
            check_request(attn_implementation)
        adjust = super()._check_and_adjust_attn_implementation  # type: ignore[misc]
        return adjust(attn_implementation, *args, **kwargs)


class LlamaModel(_ChecksBackend, upstream.LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: LlamaConfig) -> None:
        refuse_other_architectures(config)
        super().__init__(config)
        # Swapped, not built again: a second set of weights would move the random state of the first.
        for layer in self.layers:
            layer.__class__ = LlamaDecoderLayer
            layer.self_attn.__class__ = LlamaAttention

    @_with_argument(upstream.LlamaModel.forward)
    def forward(
        self, *args: Any, output_attention_stats: StatsArgument | Forward = None, **kwargs: Any
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Upstream's forward with all its arguments, and statistics of every head on request.

        Args:
            *args: Passed on to upstream.
            output_attention_stats: True or a configuration adds ``attention_stats`` to the output; the observer of a
                model around this one takes them itself.
            **kwargs: Passed on to upstream.

        Raises:
            ValueError: A request that this call cannot serve.
        """
        if is_streaming(self.config._attn_implementation) and kwargs.get(
            "output_attentions", getattr(self.config, "output_attentions", False)
        ):
            raise ValueError(
                "output_attentions=True: streaming backends never hold the weights; use "
                'attn_implementation="eager", or output_attention_stats with the statistic "weights_map"'
            )
        if isinstance(output_attention_stats, Forward):
            return self._observed(output_attention_stats, *args, **kwargs)
        config = AttentionStatsConfig.from_argument(output_attention_stats)
        if config is None:
            return super().forward(*args, **kwargs)
        refuse_inside(self)
        tokens = args[0] if args else kwargs.get("input_ids")
        return_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        forward = self.observe(config, Step(tokens=tokens))
        outputs = self._observed(forward, *args, **kwargs, return_dict=True)
        stats = forward.finish(outputs[0].device)
        outputs = BaseModelOutputWithAttentionStats(**outputs, attention_stats=stats)
        return outputs if return_dict else outputs.to_tuple()

    def _observed(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Upstream's forward, and what ``forward`` sees of it."""
        with Observed(forward):
            outputs = super().forward(*args, **kwargs)
        # At once: behind the weights of an output layer nothing that it needs is in the cache any more, which is a
        # hundredth of the time of a token.
        forward.finish(outputs[0].device)
        return outputs

    def observe(self, config: AttentionStatsConfig, step: Step, prefix: str = "") -> Forward:
        """An observer of the next forward.

        Args:
            config: What to measure.
            step: Its place in a run of several, and its token ids.
            prefix: Where this model stands in a larger one.

        Raises:
            ValueError: A layer that the model does not have.
        """
        try:
            # A module's own `__getattr__` takes several times as long, and every token asks every layer.
            attentions = [layer._modules["self_attn"] for layer in self.layers]
        except KeyError:
            attentions = [layer.self_attn for layer in self.layers]
        layers = {module: (index, f"{prefix}layers.{index}.self_attn") for index, module in enumerate(attentions)}
        stack = Stack(f"{prefix}layers.#.self_attn", layers, len(attentions))
        stack.check(config)
        return Forward(config, stack, self.config._name_or_path, step, must_be_complete=True)


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
    @_with_argument(upstream.LlamaForCausalLM.forward)
    def forward(
        self, *args: Any, output_attention_stats: StatsArgument = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Upstream's forward with all its arguments, and statistics of every head on request.

        Args:
            *args: Passed on to upstream.
            output_attention_stats: True or an `AttentionStatsConfig` adds ``attention_stats`` to the output.
            **kwargs: Passed on to upstream.

        Raises:
            ValueError: A request that this call cannot serve.

        Examples:
            >>> outputs = model(**inputs, output_attention_stats=True)
            >>> outputs.attention_stats["entropy"].shape  # layer, batch, head, query
        """
        config = AttentionStatsConfig.from_argument(output_attention_stats)
        if config is None:
            return super().forward(*args, **kwargs)
        refuse_pipeline(self)
        refuse_inside(self)
        tokens = args[0] if args else kwargs.get("input_ids")
        forward, kwargs = self.observe(config, Step(tokens=tokens)), {**kwargs, "return_dict": True}
        if _runs_as_it_is(self.model):
            outputs = super().forward(*args, **kwargs, output_attention_stats=forward)
        else:
            with Observed(forward):
                outputs = super().forward(*args, **kwargs)
        return CausalLMOutputWithAttentionStats(**outputs, attention_stats=forward.finish(outputs.logits.device))

    def observe(self, config: AttentionStatsConfig, step: Step) -> Forward:
        """An observer of the next forward, see `LlamaModel.observe`."""
        return self.model.observe(config, step, prefix="model.")


def _runs_as_it_is(model: nn.Module) -> bool:
    """Whether a call of ``model`` comes to its own forward, and not to a graph of it or to what somebody put around it."""
    return isinstance(model, LlamaModel) and model._compiled_call_impl is None and "forward" not in vars(model)


def refuse_inside(model: nn.Module) -> None:
    """Refuse statistics in the output of a model that another model runs as a part of itself, which would drop them.

    Raises:
        ValueError: It names `record`, which serves any model.
    """
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        # To make the locals of a frame takes long, and whoever would drop them was called, or its forward was.
        if frame.f_code is not _CALL and frame.f_code.co_name != "forward":
            continue
        caller = frame.f_locals.get("self")
        if (
            isinstance(caller, PreTrainedModel)
            and caller is not model
            and any(part is model for part in caller.modules())
        ):
            raise ValueError(
                f"output_attention_stats: {type(caller).__name__}, which runs {type(model).__name__} as a part of itself, has "
                "no place for them in its output; use `with llama_attn.record(model) as recording:`"
            )
