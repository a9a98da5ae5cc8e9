"""What the streaming backends share: a mask that is no matrix, and the call of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask

from llama_attn.backends._masks import MaskRequest
from llama_attn.backends._rules import (
    AttentionCall,
    by_mask,
    by_request,
    is_paged,
    scoring,
    unknown_ways,
    without_mask,
)
from llama_attn.engines import ENGINES, choose_engine
from llama_attn.engines._fused import fused
from llama_attn.stats.spans import UNSEEN_BIAS
from llama_attn.stats.visibility import Visibility

# Backends that read one another's masks.
STREAMING_BACKENDS = ("streaming", *(f"streaming_{engine}" for engine in ENGINES))
_BY_NAME = "it makes the masks of its layers for eager and sdpa only, and hides nothing under other names"
_READS_MASK = "it computes with the mask itself, which is no matrix here"
# Models that are refused when they are loaded, by type, and why.
NOT_SERVED = {
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4", "minimax_m3", "mistral_large4"), _BY_NAME
    ),
    **dict.fromkeys(("beit", "data2vec-vision", "doge"), _READS_MASK),
    "minimax": "it tells the length of its cache wrongly when it decodes, so that the mask is of another one",
}


def mask(**kwargs: Any) -> MaskRequest:
    """Who sees whom as it was asked for; of queries × keys only what cannot be said in vectors.

    Raises:
        ValueError: A vector of real tokens of the wrong shape.
    """
    if isinstance(made := kwargs.get("attention_mask"), MaskRequest):
        return made
    request = MaskRequest(**kwargs)
    request.check()
    if request.pattern is None:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        request.mask = sdpa_mask(**{**kwargs, **skips})
    return request


def sees(call: AttentionCall) -> Visibility:
    """As the mask was asked for; a tensor as it is; without any, PyTorch's rule.

    Raises:
        ValueError: The mask was made for keys of another length.
    """
    if call.mask is None:
        return without_mask(call)
    if not isinstance(call.mask, MaskRequest):
        return by_mask(call)
    if (visibility := by_request(call)) is not None:
        return visibility
    if call.mask.is_plain:
        # A cache whose layers hold different numbers of keys: each is seen whole, as without a mask.
        return without_mask(call)
    raise ValueError(
        f"attention_mask: it was made for {call.mask.batch} rows, {call.mask.num_queries} queries and "
        f"{call.mask.num_slots} keys, and this layer has {call.query.shape[0]}, {call.num_queries} and {call.num_slots}"
    )


def attend_with(engine: str | None) -> Callable[..., tuple[Tensor, None]]:
    """An attention function for transformers that runs on ``engine``; None for the default one of the device."""

    def attend(
        module: nn.Module,
        query: Float[Tensor, "batch head query channel"],
        key: Float[Tensor, "batch kv_head key channel"],
        value: Float[Tensor, "batch kv_head key value_channel"],
        attention_mask: MaskRequest | Tensor | None = None,
        *,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch query head value_channel"], None]:
        """Attention in blocks.

        Raises:
            ValueError: Attention dropout, or a mask that does not fit.
        """
        call = streaming_call(module, query, key, value, attention_mask, {"dropout": dropout, **kwargs})
        visibility = sees(call)
        scores = scoring(call, visibility.num_keys)
        output, _ = fused(
            query, key, value, visibility, scores, choose_engine(engine, visibility, scores, query.device)
        )
        return output, None

    return attend


def streaming_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    options: dict[str, Any],
    cross: bool = False,
) -> AttentionCall:
    """The call of a streaming backend, which takes ``options`` as its own.

    Raises:
        ValueError: Attention dropout, or who sees whom said in a way that it does not know.
    """
    if dropout := options.pop("dropout", 0.0):
        raise ValueError(f"attention dropout is not supported by streaming backends, got {dropout}; set it to 0")
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: streaming backends never hold the weights; use "
            'attn_implementation="eager", or output_attention_stats with the statistic "weights_map"'
        )
    if is_paged(options):
        raise ValueError(
            "attn_implementation: continuous batching keeps keys in a paged cache, which the streaming backends do not "
            'know; use "sdpa" or "eager"'
        )
    if unknown := unknown_ways(options):
        raise ValueError(
            f"attn_implementation: {type(module).__name__} says who sees whom in {unknown}, which the streaming backends "
            'do not know; use "sdpa" or "eager"'
        )
    if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point() and attention_mask.requires_grad:
        # A mask that learns is a bias.
        seen, own = attention_mask > UNSEEN_BIAS, options.get("position_bias")
        bias = attention_mask.masked_fill(~seen, 0.0)
        options["position_bias"], attention_mask = bias if own is None else own + bias, seen
    request = attention_mask if isinstance(attention_mask, MaskRequest) else None
    return AttentionCall(module, query, key, value, attention_mask, options, request, cross)


def refuse_model(model_type: str) -> None:
    """Refuse a model that cannot run here exactly, before it does.

    Raises:
        ValueError: It says why, and what to use instead.
    """
    if (reason := NOT_SERVED.get(model_type)) is not None:
        raise ValueError(
            f'attn_implementation: the streaming backends do not serve {model_type!r}: {reason}; use "sdpa" or '
            '"eager", and llama_attn.record for statistics'
        )
