"""Differentiable attention on an engine: the output and the statistics come from the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from llama_attn.engines import ENGINES, default_engine, get_engine
from llama_attn.engines._operator import walk
from llama_attn.engines._walk import Walk, full_precision
from llama_attn.stats.block import Wanted
from llama_attn.stats.recorder import Recorder
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility

# Backends that take a visibility in place of a mask, and read one another's.
STREAMING_BACKENDS = ("streaming", *(f"streaming_{engine}" for engine in ENGINES))


class FusedAttention(torch.autograd.Function):
    """Keeps query, key, value, output and logsumexp, so that training memory grows with T and not with T²."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        engine: ModuleType,
        visibility: Visibility,
        scoring: Scoring,
        wanted: Wanted | None,
        raw: dict[str, Tensor],
    ) -> Tensor | None:
        """Walk once; ``raw`` is filled with the statistics."""
        output, logsumexp, measured = _walk(query, key, value, engine, visibility, scoring, wanted)
        raw.update(measured)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.engine, ctx.visibility, ctx.scoring = engine, visibility, scoring
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Walk again, computing the weights of each block anew."""
        # Read once: under gradient checkpointing a second reading is an error.
        saved = ctx.saved_tensors
        with full_precision(saved[0].device):
            gradients = ctx.engine.backward(grads[0], *saved, ctx.visibility, ctx.scoring)
        return (*gradients[:3], None, None, None, None, None)


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


def attend_with(engine: str | None) -> Callable[..., tuple[Tensor, None]]:
    """An attention function for transformers that runs on ``engine``; None for the default one of the device."""

    def attend(
        module: torch.nn.Module,
        query: Float[Tensor, "batch head query channel"],
        key: Float[Tensor, "batch kv_head key channel"],
        value: Float[Tensor, "batch kv_head key channel"],
        attention_mask: Tensor | None = None,
        *,
        scaling: float,
        dropout: float = 0.0,
        visibility: Visibility | None = None,
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch query head channel"], None]:
        """Attention in blocks; measures from the same blocks what ``recorder`` wants.

        Raises:
            ValueError: The model is not llama_attn's, or attention dropout is on.
        """
        if visibility is None:
            raise ValueError(
                "the streaming backends take padding from llama_attn's LlamaModel, which called them without it; "
                f"use llama_attn.LlamaForCausalLM, not {type(module).__name__} of another model"
            )
        if dropout:
            raise ValueError(f"attention dropout is not supported by streaming backends, got {dropout}; set it to 0")
        visibility = visibility.to(query.device)
        key, value = key[:, :, : visibility.num_keys], value[:, :, : visibility.num_keys]
        layer = getattr(module, "layer_idx", 0)
        name = engine or default_engine(query.device)
        wanted = None
        if recorder is not None:
            wanted = recorder.fused(layer, query.device, name)
            # The same, knowing besides which rows of the batch are measured.
            visibility = recorder.visibility_on(query.device) if wanted else visibility
        scoring = Scoring(scaling)
        if torch.compiler.is_compiling():
            output, _, raw = walk(name, query, key, value, visibility, scoring, wanted)
        elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raw = {}
            output = FusedAttention.apply(query, key, value, get_engine(name), visibility, scoring, wanted, raw)
        else:
            # An autograd function costs as much as a decoding step's attention.
            output, _, raw = _walk(query, key, value, get_engine(name), visibility, scoring, wanted)
        if recorder is not None:
            recorder.records.put(layer, raw)
        return cast(Tensor, output), None

    return attend


def padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask that streaming backends need: the (batch, key) vector of real tokens, nothing of queries × keys."""
    return attention_mask
