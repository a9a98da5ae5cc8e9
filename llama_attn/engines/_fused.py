"""Differentiable attention on an engine: the output and the statistics come from the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llama_attn.engines import ENGINES, default_engine, get_engine
from llama_attn.engines._operator import ONCE, walk
from llama_attn.engines._walk import Gradients, Walk, full_precision
from llama_attn.stats.block import Wanted
from llama_attn.stats.recorder import Recorder
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.spans import UNSEEN_BIAS
from llama_attn.stats.visibility import Visibility

# Backends that take a visibility in place of a mask, and read one another's.
STREAMING_BACKENDS = ("streaming", *(f"streaming_{engine}" for engine in ENGINES))
# Keyword arguments by which models choose keys, or hold them, in ways that only upstream's own functions know.
FOREIGN = ("indices", "block_indices", "cache")


class FusedAttention(torch.autograd.Function):
    """Keeps query, key, value, output and logsumexp, so that training memory grows with T and not with T²."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_bias: Tensor | None,
        sinks: Tensor | None,
        engine: ModuleType,
        visibility: Visibility,
        scoring: Scoring,
        wanted: Wanted | None,
        raw: dict[str, Tensor],
    ) -> Tensor | None:
        """Walk once; ``raw`` is filled with the statistics."""
        output, logsumexp, measured = _walk(query, key, value, engine, visibility, scoring, wanted)
        raw.update(measured)
        ctx.save_for_backward(query, key, value, output, logsumexp, position_bias, sinks)
        ctx.engine, ctx.visibility = engine, visibility
        ctx.scoring = replace(scoring, position_bias=None, sinks=None)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Walk again, computing the weights of each block anew.

        Raises:
            RuntimeError: Somebody wants to differentiate these gradients once more.
        """
        # Autograd records a backward only if told to; what is recorded here would take the weights for constants.
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        # Read once: under gradient checkpointing a second reading is an error.
        *saved, position_bias, sinks = ctx.saved_tensors
        scoring = replace(ctx.scoring, position_bias=position_bias, sinks=sinks)
        with full_precision(saved[0].device):
            gradients: Gradients = ctx.engine.backward(grads[0], *saved, ctx.visibility, scoring)
        return (*gradients, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Refuse forward mode.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(ONCE)


def _walk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    engine: ModuleType,
    visibility: Visibility,
    scoring: Scoring,
    wanted: Wanted | None,
) -> Walk:
    with full_precision(query.device):
        result: Walk = engine.walk(query, key, value, visibility, scoring, wanted)
    return result


def engine_for(named: str | None, device: torch.device, visibility: Visibility, scoring: Scoring) -> str:
    """The engine that makes such a call: ``named``, or the default one of the device, or ``torch`` where that refuses.

    Raises:
        ValueError: ``named`` refuses.
    """
    name = named or default_engine(device)
    reason = get_engine(name).refuses(visibility, scoring)
    if reason is None:
        return name
    if named is not None:
        raise ValueError(reason)
    return "torch"


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    engine: str | None,
    wanted: Wanted | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention in blocks, and statistics from the same blocks.

    Args:
        query: (batch, head, query, channel).
        key: (batch, kv_head, key, channel); those behind the last that ``visibility`` knows are not looked at.
        value: (batch, kv_head, key, value channel).
        visibility: Who may see whom, on the device of the tensors.
        scoring: How scores are made.
        engine: Name of the engine; None for the default one.
        wanted: What to measure; None for the output alone.

    Returns:
        The output, (batch, query, head, value channel), differentiable once by all tensors, and the raw statistics.

    Raises:
        ValueError: The tensors do not fit one another, or the named engine refuses such a call.
    """
    name, num_keys = engine_for(engine, query.device, visibility, scoring), visibility.num_keys
    compiling = torch.compiler.is_compiling()
    # In a graph the length of a static cache is a number that is not known.
    if compiling or key.shape[2] != num_keys:
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
        if scoring.position_bias is not None:
            scoring = replace(scoring, position_bias=scoring.position_bias[..., :num_keys])
    if compiling:
        output, _, raw = walk(name, query, key, value, visibility, scoring, wanted)
        return cast(Tensor, output), raw
    leaves = (query, key, value, scoring.position_bias, scoring.sinks)
    if _differentiated(leaves):
        raw = {}
        output = FusedAttention.apply(*leaves, get_engine(name), visibility, scoring, wanted, raw)
    else:
        # An autograd function costs as much as a decoding step's attention.
        output, _, raw = _walk(query, key, value, get_engine(name), visibility, scoring, wanted)
    return cast(Tensor, output), raw


def attend_with(engine: str | None) -> Callable[..., tuple[Tensor, None]]:
    """An attention function for transformers that runs on ``engine``; None for the default one of the device."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Visibility | Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        visibility: Visibility | None = None,
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention in blocks; measures from the same blocks what ``recorder`` wants.

        Args:
            module: The attention module.
            query: (batch, head, query, channel).
            key: (batch, kv_head, key, channel).
            value: (batch, kv_head, key, value channel).
            attention_mask: Who sees whom; or (1 or batch, 1 or head, query, key), bool or additive; or None, which
                means what it means to sdpa.
            scaling: What scores are multiplied with; 1 / √channel by default.
            dropout: Must be 0.
            is_causal: What None as a mask means; by default ``module.is_causal``, and causal without that.
            visibility: Who sees whom, in place of the mask.
            recorder: What is measured; None for nothing.
            **kwargs: ``softcap``, ``s_aux`` or ``sinks``, and ``position_bias`` as models of transformers pass them.

        Returns:
            The output, (batch, query, head, value channel), and no weights.

        Raises:
            ValueError: Attention dropout is on, the tensors do not fit one another, or an argument that only upstream's
                functions know.
        """
        if dropout:
            raise ValueError(f"attention dropout is not supported by streaming backends, got {dropout}; set it to 0")
        scoring = scoring_of(query, scaling, kwargs)
        if visibility is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            visibility, scoring = _visibility_of(attention_mask, query, key, causal, scoring)
        visibility = visibility.to(query.device)
        layer, wanted = getattr(module, "layer_idx", 0), None
        name = engine_for(engine, query.device, visibility, scoring)
        if recorder is not None:
            wanted = recorder.fused(layer, query.device, name)
            # The same, knowing besides which rows of the batch are measured.
            visibility = recorder.visibility_on(query.device) if wanted else visibility
        output, raw = fused(query, key, value, visibility, scoring, name, wanted)
        if recorder is not None:
            recorder.records.put(layer, raw)
        return output, None

    return attend


def scoring_of(query: Tensor, scaling: float | None, kwargs: Mapping[str, Any]) -> Scoring:
    """How a call of transformers' interface makes scores.

    Args:
        query: (batch, head, query, channel).
        scaling: What scores are multiplied with; None for 1 / √channel.
        kwargs: The keyword arguments of the call.

    Raises:
        ValueError: An argument that only upstream's functions know.
    """
    for name in FOREIGN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: the streaming backends do not know how this model chooses or holds its keys; use "
                "attn_implementation='eager' or 'sdpa'"
            )
    sinks = kwargs.get("s_aux")
    return Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        position_bias=kwargs.get("position_bias"),
        sinks=kwargs.get("sinks") if sinks is None else sinks,
    )


def _visibility_of(
    mask: Visibility | Tensor | None, query: Tensor, key: Tensor, causal: bool, scoring: Scoring
) -> tuple[Visibility, Scoring]:
    """Who sees whom by a mask as a model hands it over; a mask that learns becomes a bias."""
    if isinstance(mask, Visibility):
        return mask, scoring
    if mask is None:
        return _of_no_mask(query, key, causal), scoring
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask: expected a Visibility, (1 or batch, 1 or head, query, key) or None, got {tuple(mask.shape)}"
        )
    if mask.is_floating_point() and mask.requires_grad:
        seen = mask > UNSEEN_BIAS
        bias = mask.masked_fill(~seen, 0.0)
        own = scoring.position_bias
        mask, scoring = seen, replace(scoring, position_bias=bias if own is None else own + bias)
    return Visibility.of_mask(mask, batch=query.shape[0], device=query.device), scoring


def _of_no_mask(query: Tensor, key: Tensor, causal: bool) -> Visibility:
    """What sdpa does without a mask: query i sees the keys up to i, or everybody sees everything."""
    batch, num_queries, num_keys, device = query.shape[0], query.shape[2], key.shape[2], query.device
    causal = causal and num_queries > 1
    if causal and num_queries <= num_keys:
        return Visibility(batch, 0, num_queries, device)
    if num_queries == num_keys:
        return Visibility(batch, 0, num_keys, device, causal=False)
    stop_key = None
    if causal:
        stop_key = torch.arange(1, num_queries + 1, device=device).clamp(max=num_keys)[None]
    return Visibility(
        batch, 0, num_keys, device, causal=False, stop_query=num_queries, stop_key=stop_key, aligned=False
    )


def _differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    # Tensors of forward mode need no gradient: they are let in, to be refused and not to be taken for constants.
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask that streaming backends need: the (batch, key) vector of real tokens, nothing of queries × keys."""
    return attention_mask
