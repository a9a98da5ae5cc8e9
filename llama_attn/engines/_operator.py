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
from llama_attn.stats.config import AttentionStatsConfig, bin_width
from llama_attn.stats.maps import num_distance_bins
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import Statistic, statistics_table
from llama_attn.stats.visibility import Visibility


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
        return get_engine(engine).walk(query, key, value, visibility, scoring, wanted)
    config = AttentionStatsConfig() if wanted is None else wanted.config
    output, logsumexp, *raw = _walk(
        query,
        key,
        value,
        [
            visibility.real,
            visibility.sequence,
            visibility.mask,
            visibility.rows,
            visibility.sees,
            None if wanted is None else wanted.segments,
            None if wanted is None else wanted.tokens,
        ],
        [visibility.first_query, visibility.num_keys, visibility.stride, int(visibility.causal)],
        [
            0 if wanted is None else wanted.num_segments,
            config.sink_tokens,
            config.window,
            config.top_k,
            config.map_size,
            config.query_stride,
        ],
        scoring.scale,
        engine,
        "" if wanted is None else ",".join([statistic.name for statistic in wanted.statistics]),
    )
    names = [] if wanted is None else [statistic.name for statistic in wanted.statistics]
    return Walk(None if value is None else output, logsumexp, dict(zip(names, raw, strict=True)))


@torch.library.custom_op(
    "llama_attn::walk",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor? value, Tensor?[] vectors, SymInt[] extent, SymInt[] parameters, "
    "float scaling, str engine, str names) -> Tensor[]",
)
def _walk(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    vectors: Sequence[Tensor | None],
    extent: Sequence[int],
    parameters: Sequence[int],
    scaling: float,
    engine: str,
    names: str,
) -> list[Tensor]:
    wanted = None
    if statistics := _statistics(names):
        wanted = Wanted(statistics, _config(parameters), vectors[5], parameters[0], vectors[6])
    visibility = _visibility(query, vectors[:5], extent)
    with full_precision(query.device):
        result = get_engine(engine).walk(query, key, value, visibility, Scoring(scaling), wanted)
    output = query.new_empty(0) if result.output is None else result.output
    # Results of an operator share no memory, and are laid out like those of the fake below, which the graph relies on.
    raw = [torch.clone(result.raw[s.name], memory_format=torch.contiguous_format) for s in statistics]
    return [output.contiguous(), result.logsumexp.contiguous(), *raw]


@_walk.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    vectors: Sequence[Tensor | None],
    extent: Sequence[int],
    parameters: Sequence[int],
    scaling: float,
    engine: str,
    names: str,
) -> list[Tensor]:
    batch, heads, num_queries, _ = query.shape
    num_keys, dtype = extent[1], compute_dtype(query)
    num_segments, _, _, top_k, map_size, _ = parameters
    statistics = _statistics(names)
    sizes = {"query": num_queries, "key": num_keys, "rank": top_k, "segment": num_segments}
    dims = {dim for statistic in statistics for dim in statistic.dims}
    # Only where they are needed: the length of a static cache is a number that the graph does not know.
    if "key_bin" in dims:
        sizes["query_bin"] = sizes["key_bin"] = -(-num_keys // bin_width(num_keys, map_size))
    if "distance_bin" in dims:
        sizes["distance_bin"] = num_distance_bins(num_keys)
    output = query.new_empty(0)
    if value is not None:
        output = value.new_empty(batch, num_queries, heads, value.shape[-1])
    results = [output, query.new_empty(batch, heads, num_queries, dtype=dtype)]
    for statistic in statistics:
        shape = (batch, heads, *statistic.parts, *(sizes[dim] for dim in statistic.dims[3:]))
        results.append(query.new_empty(shape, dtype=statistic.dtype or dtype))
    return results


@torch.library.custom_op(
    "llama_attn::walk_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
    "Tensor?[] vectors, SymInt[] extent, float scaling, str engine) -> (Tensor, Tensor, Tensor)",
)
def _walk_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    vectors: Sequence[Tensor | None],
    extent: Sequence[int],
    scaling: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    visibility = _visibility(query, vectors, extent)
    with full_precision(query.device):
        gradients = get_engine(engine).backward(
            grad_output, query, key, value, output, logsumexp, visibility, Scoring(scaling)
        )
    grad_query, grad_key, grad_value = (gradient.contiguous() for gradient in gradients[:3])
    return grad_query, grad_key, grad_value


@_walk_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    query, key, value, vectors, extent, _, scaling, engine, _ = inputs
    ctx.save_for_backward(query, key, value, *output[:2], *vectors[:5])
    ctx.extent, ctx.scaling, ctx.engine = extent, scaling, engine


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tensors, vectors = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    gradients = _walk_backward(grads[0], *tensors, vectors, ctx.extent, ctx.scaling, ctx.engine)
    return (*gradients, *[None] * 6)


_walk.register_autograd(_backward, setup_context=_setup_context)


def _statistics(names: str) -> list[Statistic]:
    table = statistics_table()
    return [table[name] for name in names.split(",") if name]


def _visibility(query: Tensor, vectors: Sequence[Tensor | None], extent: Sequence[int]) -> Visibility:
    first_query, num_keys, stride, causal = extent
    real, sequence, mask, rows, sees = vectors
    return Visibility(
        query.shape[0], first_query, num_keys, query.device, bool(causal), real, sequence, mask, rows, sees, stride
    )


def _config(parameters: Sequence[int]) -> AttentionStatsConfig:
    _, sink_tokens, window, top_k, map_size, query_stride = parameters
    return AttentionStatsConfig(
        sink_tokens=sink_tokens, window=window, top_k=top_k, map_size=map_size, query_stride=query_stride
    )
