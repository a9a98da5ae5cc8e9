"""The engine for CUDA, in Triton: output and statistics of a layer in one kernel, gradients in two.

One kernel goes through the keys with an online softmax that carries the statistics along. What every key receives
needs finished rows, so a second kernel goes through the queries of each key with the logsumexp that the first saved.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_attn.engines._walk import Gradients, Walk, check_call
from llama_attn.stats.block import Wanted
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import Statistic
from llama_attn.stats.visibility import Visibility

LOG2_E = math.log2(math.e)
HEAD_DIMS = (64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ELSEWHERE = "use attn_implementation='streaming_torch', or engine='torch' in AttentionStatsConfig"

# Statistics of a query, in the order in which the kernel writes them.
ROW_STATISTICS = (
    "logsumexp", "max_logit", "max_weight", "entropy", "effective_keys", "sink_mass", "local_mass", "mean_distance",
)  # fmt: skip
KEY_STATISTICS = ("received", "received_total")


def unavailable() -> str | None:
    """It needs the package triton and a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)."""
    package = "the package triton is not installed: pip install 'llama_attn[triton]' (Linux)"
    device = "it needs a CUDA device; without one TRITON_INTERPRET=1 interprets the kernels, slowly"
    lacks = [package] * (importlib.util.find_spec("triton") is None)
    lacks += [device] * (not _interpreted() and not torch.cuda.is_available())
    return "; ".join(lacks) or None


def knows(statistic: Statistic) -> bool:
    """The default set, ``effective_keys`` and ``received_total``."""
    return statistic.name in ROW_STATISTICS + KEY_STATISTICS


def refuses(visibility: Visibility, scoring: Scoring) -> str | None:
    """It takes padding, packing, windows and chunks, and plain scores."""
    if visibility.mask is not None:
        return (
            f"attention_mask: the triton engine takes padding, packing, windows and chunks, got a 4-D mask of shape "
            f"{tuple(visibility.mask.shape)}; {ELSEWHERE}"
        )
    for name in ("softcap", "position_bias", "sinks"):
        if getattr(scoring, name) is not None:
            return f"{name}: the triton engine takes scores without; {ELSEWHERE}"
    return None


def walk(
    query: Float[Tensor, "batch head query channel"],
    key: Float[Tensor, "batch kv_head key channel"],
    value: Float[Tensor, "batch kv_head key value_channel"] | None,
    visibility: Visibility,
    scoring: Scoring,
    wanted: Wanted | None = None,
    for_backward: bool = True,
) -> Walk:
    """Attention output and statistics of one layer.

    Args:
        query: Queries after RoPE.
        key: Keys after RoPE and cache.
        value: Values, to get the output too (fused); ``None`` to measure only (observed).
        visibility: Who may see whom.
        scoring: How scores are made.
        wanted: What to measure; ``None`` for the output alone.
        for_backward: Whether the logsumexp is needed.

    Returns:
        The output in the dtype of ``value``, the logsumexp and the raw statistics in float32.

    Raises:
        ValueError: A head size, dtype, device, mask or way to score that the kernels are not made for.
    """
    _check(query, key, value, visibility, scoring)
    query, key, value = _dense(query), _dense(key), None if value is None else _dense(value)
    batch, heads, num_queries, head_dim = query.shape
    names = [statistic.name for statistic in wanted.statistics] if wanted else []
    logsumexp = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    measure = any(name in ROW_STATISTICS for name in names)
    rows = logsumexp.new_empty(len(ROW_STATISTICS), *logsumexp.shape) if measure else None
    output = None if value is None else value.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    _launch(
        "attention_forward", query, heads, over="queries",
        query_ptr=query, key_ptr=key, value_ptr=value, output_ptr=output, logsumexp_ptr=logsumexp, statistics_ptr=rows,
        first_key_ptr=visibility.key_spans[0], stop_key_ptr=visibility.key_spans[1],
        stop_sink_ptr=_stop_sink(visibility, wanted.config.sink_tokens if wanted else 0),
        real_ptr=_real(visibility),
        query_strides=_strides(query), key_strides=_strides(key), value_strides=_strides(value),
        output_strides=_strides(output), num_queries=num_queries, num_keys=visibility.num_keys,
        group_size=heads // key.shape[1], first_position=visibility.first_query,
        position_step=visibility.stride, window=min(wanted.config.window, visibility.length) if wanted else 0,
        score_scale=scoring.scale * LOG2_E, HAS_VALUE=value is not None, MEASURE=measure,
    )  # fmt: skip
    # Each in memory of its own: an operator of torch may not return tensors that share theirs.
    raw = {
        name: rows[ROW_STATISTICS.index(name)].clone() for name in names if rows is not None and name in ROW_STATISTICS
    }
    if any(name in KEY_STATISTICS for name in names):
        received = _received(query, key, logsumexp, visibility, scoring.scale)
        raw |= {name: received.clone() for name in names if name in KEY_STATISTICS}
    output = None if output is None else output.transpose(1, 2)
    return Walk(output, logsumexp if for_backward else None, raw)


def backward(
    grad_output: Float[Tensor, "batch query head value_channel"],
    query: Float[Tensor, "batch head query channel"],
    key: Float[Tensor, "batch kv_head key channel"],
    value: Float[Tensor, "batch kv_head key value_channel"],
    output: Float[Tensor, "batch query head value_channel"],
    logsumexp: Float[Tensor, "batch head query"],
    visibility: Visibility,
    scoring: Scoring,
) -> Gradients:
    """Gradients of query, key and value; the weights are computed again from the logsumexp.

    Raises:
        ValueError: A head size, dtype, device, mask or way to score that the kernels are not made for.

    Source: Dao et al., arXiv 2205.14135, algorithm 4; Dao, arXiv 2307.08691 for the order of the loops.
    """
    _check(query, key, value, visibility, scoring)
    query, key, value = _dense(query), _dense(key), _dense(value)
    grad_rows = _dense(grad_output.to(query.dtype).transpose(1, 2))
    # Σ_j A_ij (dO_i · v_j) = dO_i · O_i
    shift = (grad_rows.float() * output.transpose(1, 2).float()).sum(-1)
    num_queries, num_keys = query.shape[2], visibility.num_keys
    # Keys behind the last that the visibility knows get none.
    make = torch.empty_like if key.shape[2] == num_keys else torch.zeros_like
    grad_query, grad_key, grad_value = (
        make(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
    )
    shared: dict[str, Any] = {
        "query_ptr": query, "key_ptr": key, "value_ptr": value, "grad_output_ptr": grad_rows,
        "logsumexp_ptr": logsumexp, "shift_ptr": shift,
        "query_strides": _strides(query), "key_strides": _strides(key), "value_strides": _strides(value),
        "grad_output_strides": _strides(grad_rows), "num_queries": num_queries, "num_keys": num_keys,
        "group_size": query.shape[1] // key.shape[1], "scaling": scoring.scale, "score_scale": scoring.scale * LOG2_E,
    }  # fmt: skip
    _launch(
        "attention_backward_query", query, query.shape[1], over="queries", **shared,
        grad_query_ptr=grad_query, grad_query_strides=_strides(grad_query),
        first_key_ptr=visibility.key_spans[0], stop_key_ptr=visibility.key_spans[1],
        real_ptr=_real(visibility),
    )  # fmt: skip
    _launch(
        "attention_backward_key_value", query, key.shape[1], over="keys", **shared,
        grad_key_ptr=grad_key, grad_key_strides=_strides(grad_key),
        grad_value_ptr=grad_value, grad_value_strides=_strides(grad_value),
        first_query_ptr=visibility.query_spans[0], stop_query_ptr=visibility.query_spans[1],
    )  # fmt: skip
    return Gradients(grad_query, grad_key, grad_value, None, None)


def _received(
    query: Tensor, key: Tensor, logsumexp: Float[Tensor, "batch head query"], visibility: Visibility, scaling: float
) -> Float[Tensor, "batch head key"]:
    """Σ_i A_ij over the real queries."""
    batch, heads, num_queries, _ = query.shape
    num_keys = visibility.num_keys
    received = logsumexp.new_empty(batch, heads, num_keys)
    # exp(s − ∞) = 0: padding gives nothing.
    counted = torch.where(visibility.real_queries[:, None], logsumexp, torch.inf)
    _launch(
        "attention_received", query, heads, over="keys",
        query_ptr=query, key_ptr=key, logsumexp_ptr=counted, received_ptr=received,
        first_query_ptr=visibility.query_spans[0], stop_query_ptr=visibility.query_spans[1],
        query_strides=_strides(query), key_strides=_strides(key), num_queries=num_queries, num_keys=num_keys,
        group_size=heads // key.shape[1], score_scale=scaling * LOG2_E,
    )  # fmt: skip
    return received


def _launch(kernel: str, query: Tensor, heads: int, *, over: str, **arguments: Any) -> None:
    """Run a kernel with one program for each block of "queries" or "keys", head and row of the batch."""
    # Triton is imported by the first launch, not with llama_attn.
    from llama_attn.engines import _triton_kernels as kernels

    has_value = arguments.get("value_ptr", query) is not None
    options = kernels.options(kernel, query.shape[-1], query.element_size(), has_value)
    blocks = math.ceil(arguments[f"num_{over}"] / options[f"BLOCK_{over.upper()}"])
    # Triton launches on the current device, whichever that is.
    with torch.cuda.device_of(query):
        getattr(kernels, kernel)[blocks, heads, query.shape[0]](**arguments, **options)


def _check(query: Tensor, key: Tensor, value: Tensor | None, visibility: Visibility, scoring: Scoring) -> None:
    """Refuse what the kernels are not made for.

    Raises:
        ValueError: It says what to use instead.
    """
    if reason := refuses(visibility, scoring):
        raise ValueError(reason)
    check_call(query, key, value, visibility, scoring)
    head_dim = query.shape[-1]
    if head_dim not in HEAD_DIMS or (value is not None and value.shape[-1] != head_dim):
        raise ValueError(
            f"head_dim: the triton engine takes {list(HEAD_DIMS)}, the same for query, key and value, got {head_dim} "
            f"and {None if value is None else value.shape[-1]}; {ELSEWHERE}"
        )
    dtypes = {tensor.dtype for tensor in (query, key, value) if tensor is not None}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        raise ValueError(
            f"dtype: the triton engine takes one of {list(DTYPES)}, the same for query, key and value, "
            f"got {sorted(map(str, dtypes))}; {ELSEWHERE}"
        )
    if query.device.type != "cuda" and not _interpreted():
        raise ValueError(f"device: the triton engine takes CUDA tensors, got {query.device}; {ELSEWHERE}")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _dense(tensor: Tensor) -> Tensor:
    """The same with its channels next to each other, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Strides of batch, head and row [element]."""
    return None if tensor is None else tensor.stride()[:3]


def _real(visibility: Visibility) -> Int[Tensor, "batch key"] | None:
    """Which keys are real, in bytes; ``None`` if all are."""
    return None if visibility.real is None else visibility.real.contiguous().view(torch.int8)


def _stop_sink(visibility: Visibility, sink_tokens: int) -> Int[Tensor, "batch query"]:
    """The first key behind the sinks of each query's own sequence."""
    # The keys that are sinks and seen are those before the last sink that stands before the query's last key.
    stop_key = visibility.key_spans[1]
    sinks = visibility.real_keys & (visibility.rank < sink_tokens)
    places = torch.arange(1, visibility.num_keys + 1, device=sinks.device)
    stops = torch.nn.functional.pad(torch.where(sinks, places, 0).cummax(-1).values, (1, 0))
    return stops.gather(1, stop_key.long()).int()
