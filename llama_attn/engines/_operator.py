"""An engine's walk, by its name; to `torch.compile` it is one operator of the graph, which it does not look into.

An operator takes tensors and numbers only, so what a `Visibility` and a `Wanted` hold is passed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_attn.engines import get_engine
from llama_attn.engines._walk import Walk, compute_dtype, full_precision
from llama_attn.stats.block import Wanted
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.extents import Extents
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.spans import VECTORS
from llama_attn.stats.table import Statistic, statistics_table
from llama_attn.stats.visibility import Visibility

ONCE = (
    "streaming attention can be differentiated once, in backward mode; for second derivatives (create_graph=True, "
    "autograd.functional.hvp, a gradient penalty) and for forward mode use attn_implementation='eager' or 'sdpa'"
)


def walk(
    engine: str,
    query: Float[Tensor, "batch head query channel"],
    key: Float[Tensor, "batch kv_head key channel"],
    value: Float[Tensor, "batch kv_head key value_channel"] | None,
    visibility: Visibility,
    scoring: Scoring,
    wanted: Wanted | None,
) -> Walk:
    """The walk of ``engine``; in a graph that is being compiled it is differentiable."""
    if not torch.compiler.is_compiling():
        # Nobody differentiates what is only measured.
        return get_engine(engine).walk(query, key, value, visibility, scoring, wanted, value is not None)
    config = AttentionStatsConfig() if wanted is None else wanted.config
    output, logsumexp, *raw = _walk(
        query,
        key,
        value,
        scoring.position_bias,
        scoring.sinks,
        [
            *[getattr(visibility, name) for name in VECTORS],
            None if wanted is None else wanted.segments,
            None if wanted is None else wanted.tokens,
            None if wanted is None else wanted.keep,
        ],
        extent_of(visibility),
        [
            0 if wanted is None else wanted.num_segments,
            config.sink_tokens,
            config.window,
            config.top_k,
            config.map_size,
            config.query_stride,
        ],
        [scoring.scale, scoring.softcap or 0.0],
        engine,
        "" if wanted is None else ",".join([statistic.name for statistic in wanted.statistics]),
    )
    names = [] if wanted is None else [statistic.name for statistic in wanted.statistics]
    return Walk(None if value is None else output, logsumexp, dict(zip(names, raw, strict=True)))


@torch.library.custom_op(
    "llama_attn::walk",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor? value, Tensor? position_bias, Tensor? sinks, Tensor?[] vectors, "
    "SymInt[] extent, SymInt[] parameters, float[] scores, str engine, str names) -> Tensor[]",
)
def _walk(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    vectors: Sequence[Tensor | None],
    extent: Sequence[int],
    parameters: Sequence[int],
    scores: Sequence[float],
    engine: str,
    names: str,
) -> list[Tensor]:
    wanted = None
    if statistics := _statistics(names):
        segments, tokens, keep = vectors[len(VECTORS) :]
        wanted = Wanted(statistics, _config(parameters), segments, parameters[0], tokens, keep=keep)
    visibility, scoring = visibility_of(query, vectors, extent), scoring_of(scores, position_bias, sinks)
    with full_precision(query.device):
        result = get_engine(engine).walk(query, key, value, visibility, scoring, wanted)
    output = query.new_empty(0) if result.output is None else result.output
    # Results of an operator share no memory, and are laid out like those of the fake below, which the graph relies on.
    raw = [torch.clone(result.raw[s.name], memory_format=torch.contiguous_format) for s in statistics]
    return [output.contiguous(), result.logsumexp.contiguous(), *raw]


@_walk.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    vectors: Sequence[Tensor | None],
    extent: Sequence[int],
    parameters: Sequence[int],
    scores: Sequence[float],
    engine: str,
    names: str,
) -> list[Tensor]:
    batch, heads, num_queries, _ = query.shape
    num_keys, dtype = extent[1], compute_dtype(query)
    num_segments, _, _, top_k, map_size, _ = parameters
    extents = Extents(
        batch=batch, heads=heads, queries=num_queries, rows=num_queries, keys=num_keys, length=extent[5] + num_keys,
        segments=num_segments, top_k=top_k, map_size=map_size,
    )  # fmt: skip
    output = query.new_empty(0)
    if value is not None:
        output = value.new_empty(batch, num_queries, heads, value.shape[-1])
    results = [output, query.new_empty(batch, heads, num_queries, dtype=dtype)]
    for statistic in _statistics(names):
        results.append(query.new_empty(extents.shape(statistic), dtype=statistic.dtype or dtype))
    return results


@torch.library.custom_op(
    "llama_attn::walk_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
    "Tensor? position_bias, Tensor? sinks, Tensor?[] vectors, SymInt[] extent, float[] scores, str engine) -> Tensor[]",
)
def _walk_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    vectors: Sequence[Tensor | None],
    extent: Sequence[int],
    scores: Sequence[float],
    engine: str,
) -> list[Tensor]:
    visibility, scoring = visibility_of(query, vectors, extent), scoring_of(scores, position_bias, sinks)
    with full_precision(query.device):
        gradients = get_engine(engine).backward(grad_output, query, key, value, output, logsumexp, visibility, scoring)
    # There is no list of optional tensors that an operator could give back.
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


@_walk_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    inputs = (query, key, value, position_bias, sinks)
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    query, key, value, position_bias, sinks, vectors, extent, _, scores, engine, _ = inputs
    ctx.save_for_backward(query, key, value, *output[:2], position_bias, sinks, *vectors[: len(VECTORS)])
    ctx.extent, ctx.scores, ctx.engine = extent, scores, engine


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    tensors, vectors = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    gradients = iter(_walk_backward(grads[0], *tensors, vectors, ctx.extent, ctx.scores, ctx.engine))
    query, key, value = next(gradients), next(gradients), next(gradients)
    position_bias, sinks = (None if tensor is None else next(gradients) for tensor in tensors[5:])
    return (query, key, value, position_bias, sinks, *[None] * 6)


_walk.register_autograd(_backward, setup_context=_setup_context)


def _statistics(names: str) -> list[Statistic]:
    table = statistics_table()
    return [table[name] for name in names.split(",") if name]


def extent_of(visibility: Visibility) -> list[int]:
    """What a visibility holds in numbers, for an operator."""
    return [
        visibility.first_query,
        visibility.num_keys,
        visibility.stride,
        int(visibility.causal),
        -1 if visibility.stop_query is None else visibility.stop_query,
        visibility.offset,
        int(visibility.aligned),
    ]


def visibility_of(query: Tensor, vectors: Sequence[Tensor | None], extent: Sequence[int]) -> Visibility:
    """The visibility that an operator was told in vectors and numbers."""
    first_query, num_keys, stride, causal, stop_query, offset, aligned = extent
    return Visibility(
        batch=query.shape[0],
        first_query=first_query,
        num_keys=num_keys,
        device=query.device,
        causal=bool(causal),
        stride=stride,
        stop_query=None if stop_query < 0 else stop_query,
        offset=offset,
        aligned=bool(aligned),
        **dict(zip(VECTORS, vectors, strict=False)),
    )


def scoring_of(scores: Sequence[float], position_bias: Tensor | None, sinks: Tensor | None) -> Scoring:
    """The scoring that an operator was told."""
    scale, softcap = scores
    return Scoring(scale, softcap or None, position_bias, sinks)


def _config(parameters: Sequence[int]) -> AttentionStatsConfig:
    _, sink_tokens, window, top_k, map_size, query_stride = parameters
    return AttentionStatsConfig(
        sink_tokens=sink_tokens, window=window, top_k=top_k, map_size=map_size, query_stride=query_stride
    )
