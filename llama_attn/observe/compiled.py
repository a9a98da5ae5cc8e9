"""Observing a compiled model from outside its graph.

What is recorded differs from call to call, so that a graph in which it happened would be compiled anew each time. To
`torch.compile` an observed call is one operator without a result, which it does not look into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llama_attn.backends._rules import AttentionCall
from llama_attn.engines._operator import extent_of, scoring_of, visibility_of
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.spans import VECTORS
from llama_attn.stats.visibility import Visibility

# Operators that change nothing are left out of a graph: these are said to write to it.
_token = torch.zeros(1)
# Who is told when a graph runs: of a "call", of hidden "states", and that a layer whose calls are changed is "called".
receivers: dict[str, Callable[..., None]] = {}
# Layers by identity, which is what an operator can be told.
modules: dict[int, nn.Module] = {}


def observe(
    call: AttentionCall, name: str, visibility: Visibility, scores: Scoring, output: Tensor, prefer: str | None
) -> None:
    """Have the observers of the layer told of a call when the graph runs."""
    torch.ops.llama_attn.observe(
        _token,
        call.query.detach(),
        call.key.detach(),
        call.value.detach(),
        output.detach(),
        None if scores.position_bias is None else scores.position_bias.detach(),
        None if scores.sinks is None else scores.sinks.detach(),
        [getattr(visibility, vector) for vector in VECTORS],
        extent_of(visibility),
        [scores.scale, scores.softcap or 0.0],
        name,
        prefer or "",
        id(call.module),
        call.is_decoder,
        call.cross,
    )


def show_states(module: nn.Module, states: Tensor, *, entering: bool) -> None:
    """Have the observers of a layer shown its input or output when the graph runs."""
    torch.ops.llama_attn.show_states(_token, states.detach(), id(module), entering)


def called(module: nn.Module, who: object) -> None:
    """Have ``who`` changes the calls of a layer told that it is called when the graph runs."""
    torch.ops.llama_attn.called(_token, id(module), id(who))


@torch.library.custom_op(
    "llama_attn::observe",
    mutates_args=("token",),
    schema="(Tensor(a!) token, Tensor query, Tensor key, Tensor value, Tensor output, Tensor? position_bias, Tensor? sinks, "
    "Tensor?[] vectors, SymInt[] extent, float[] scores, str name, str prefer, int module, bool is_decoder, bool cross) -> ()",
)
def _observe(
    token: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    vectors: Sequence[Tensor | None],
    extent: Sequence[int],
    scores: Sequence[float],
    name: str,
    prefer: str,
    module: int,
    is_decoder: bool,
    cross: bool,
) -> None:
    visibility = visibility_of(query, vectors, extent)
    call = AttentionCall(
        modules[module], query, key, value, None, {}, cross=cross, sight=visibility, decides=is_decoder
    )
    receivers["call"](call, name, scoring_of(scores, position_bias, sinks), output, prefer or None)


@_observe.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op(
    "llama_attn::show_states",
    mutates_args=("token",),
    schema="(Tensor(a!) token, Tensor states, int module, bool entering) -> ()",
)
def _show_states(token: Tensor, states: Tensor, module: int, entering: bool) -> None:
    receivers["states"](modules[module], states, entering)


@_show_states.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op(
    "llama_attn::called", mutates_args=("token",), schema="(Tensor(a!) token, int module, int who) -> ()"
)
def _called(token: Tensor, module: int, who: int) -> None:
    receivers["called"](modules[module], who)


@_called.register_fake
def _(*arguments: Any) -> None:
    return None
