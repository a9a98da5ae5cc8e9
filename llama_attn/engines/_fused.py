"""Differentiable attention on an engine: the output and the statistics come from the same blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from llama_attn.engines import get_engine
from llama_attn.engines._operator import ONCE, walk
from llama_attn.engines._walk import Gradients, Walk, full_precision
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility


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
        output, logsumexp, measured = _walk(query, key, value, engine, visibility, scoring, wanted, True)
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
    for_backward: bool,
) -> Walk:
    with full_precision(query.device):
        result: Walk = engine.walk(query, key, value, visibility, scoring, wanted, for_backward)
    return result


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    engine: str,
    wanted: Wanted | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Attention in blocks, and statistics from the same blocks.

    Args:
        query: (batch, head, query, channel).
        key: (batch, kv_head, key, channel); those behind the last that ``visibility`` knows are not looked at.
        value: (batch, kv_head, key, value channel).
        visibility: Who may see whom, on the device of the tensors.
        scoring: How scores are made.
        engine: Name of the engine, see `llama_attn.engines.choose_engine`.
        wanted: What to measure; None for the output alone.

    Returns:
        The output, (batch, query, head, value channel), differentiable once by all tensors, and the raw statistics.

    Raises:
        ValueError: The tensors do not fit one another.
    """
    num_keys = visibility.num_keys
    compiling = torch.compiler.is_compiling()
    # In a graph the length of a static cache is a number that is not known.
    if compiling or key.shape[2] != num_keys:
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
        if scoring.position_bias is not None:
            scoring = replace(scoring, position_bias=scoring.position_bias[..., :num_keys])
    if compiling:
        output, _, raw = walk(engine, query, key, value, visibility, scoring, wanted)
        return cast(Tensor, output), raw
    # Tensors of forward mode need no gradient: they are let in, to be refused and not to be taken for constants.
    leaves = (query, key, value, scoring.position_bias, scoring.sinks)
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _learn(leaves)):
        measured: dict[str, Tensor] = {}
        output = FusedAttention.apply(*leaves, get_engine(engine), visibility, scoring, wanted, measured)
        raw = measured
    else:
        # An autograd function costs as much as a decoding step's attention.
        output, _, raw = _walk(query, key, value, get_engine(engine), visibility, scoring, wanted, False)
    return cast(Tensor, output), raw


def _learn(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
