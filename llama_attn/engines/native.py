"""The engine in C++ for CPUs: output and statistics of a tile of query rows while it is in the cache.

The sources are in csrc/; `llama-attn build` compiles them, once per machine.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llama_attn.engines import _library as library
from llama_attn.engines._walk import Walk, compute_dtype
from llama_attn.stats.block import HIDDEN_SCORE, Wanted
from llama_attn.stats.maps import num_distance_bins
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.spans import UNSEEN_BIAS
from llama_attn.stats.table import Statistic
from llama_attn.stats.visibility import Visibility

# Query rows of all heads of a group in one tile, and keys in one block: their scores take 96 KiB in float32, which with
# the keys and values they meet fits the L2 cache of any processor of today. Time changes little around them, see
# docs/performance.md.
TILE_ROWS = 48
BLOCK_KEYS = 512
# What a panel of keys holds at most: blocks begin with one.
PANEL_KEYS = 64

# Names are also those of the fields of the C++ call.
_PER_QUERY = frozenset(
    {"entropy", "logsumexp", "max_logit", "max_weight", "effective_keys", "sink_mass", "local_mass", "mean_distance"}
)
_RECEIVED = frozenset({"received", "received_total"})
_KNOWN = _PER_QUERY | _RECEIVED | {"distance_histogram"}
_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}


def unavailable() -> str | None:
    """Why it does not run here: it has not been built."""
    return None if library.path().exists() else library.HOW_TO_BUILD


def knows(statistic: Statistic) -> bool:
    """Whether the C++ code takes it; what needs more than sums over keys is left to ``torch``."""
    return statistic.name in _KNOWN


def walk(
    query: Float[Tensor, "batch head query channel"],
    key: Float[Tensor, "batch kv_head key channel"],
    value: Float[Tensor, "batch kv_head key value_channel"] | None,
    visibility: Visibility,
    scoring: Scoring,
    wanted: Wanted | None = None,
    tile_rows: int = TILE_ROWS,
    block_keys: int = BLOCK_KEYS,
) -> Walk:
    """Attention output and statistics of one layer.

    Args:
        query: Queries after RoPE.
        key: Keys after RoPE and cache.
        value: Values, to get the output too (fused); ``None`` to measure only (observed).
        visibility: Who may see whom.
        scoring: How scores are made.
        wanted: What to measure; ``None`` for the output alone.
        tile_rows: Query rows, of all heads of a group, that are worked on at once.
        block_keys: Keys that are worked on at once, a multiple of `PANEL_KEYS`. The result depends on neither beyond
            rounding, and not at all on the number of threads.

    Returns:
        The output in the dtype of ``value``, the logsumexp and the raw statistics in float32 or wider.

    Raises:
        ValueError: The tensors are not on the CPU, or ``block_keys`` is no such multiple.
        MemoryError: There is not enough memory.
    """
    batch, heads, num_queries, _ = query.shape
    logsumexp = query.new_empty(batch, heads, num_queries, dtype=compute_dtype(query))
    call, held = _call(query, key, value, visibility, scoring.scale, logsumexp, tile_rows, block_keys)
    output = None
    if value is not None:
        output = value.new_empty(batch, num_queries, heads, value.shape[-1])
        call.output = _described(output)
    raw: dict[str, Tensor] = {}
    if wanted:
        names = [statistic.name for statistic in wanted.statistics]
        per_query = [name for name in names if name in _PER_QUERY]
        if per_query:
            rows = logsumexp.new_empty(len(per_query), *logsumexp.shape)
            raw.update(zip(per_query, rows.unbind(), strict=True))
        if received := _RECEIVED.intersection(names):
            totals = logsumexp.new_empty(batch, heads, visibility.num_keys)
            call.received = totals.data_ptr()
            raw.update(dict.fromkeys(received, totals))
        if "distance_histogram" in names:
            bins = num_distance_bins(visibility.num_keys)
            raw["distance_histogram"] = logsumexp.new_empty(batch, heads, bins)
            call.distance_histogram, call.distance_bins = raw["distance_histogram"].data_ptr(), bins
        for name in per_query:
            setattr(call, name, raw[name].data_ptr())
        call.sink_tokens = min(wanted.config.sink_tokens, visibility.num_keys)
        call.window = min(wanted.config.window, visibility.num_keys)
        if "sink_mass" in raw and not visibility.plain:
            rank = visibility.rank.contiguous()
            held.append(rank)
            call.rank = rank.data_ptr()
    _run(library.load(library.path()).llama_attn_forward, call)
    return Walk(output, logsumexp, raw)


def backward(
    grad_output: Float[Tensor, "batch query head value_channel"],
    query: Float[Tensor, "batch head query channel"],
    key: Float[Tensor, "batch kv_head key channel"],
    value: Float[Tensor, "batch kv_head key value_channel"],
    output: Float[Tensor, "batch query head value_channel"],
    logsumexp: Float[Tensor, "batch head query"],
    visibility: Visibility,
    scoring: Scoring,
    tile_rows: int = TILE_ROWS,
    block_keys: int = BLOCK_KEYS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the weights of each block are computed again from the logsumexp.

    Source: Dao et al., arXiv 2205.14135, algorithm 4.
    """
    call, _held = _call(query, key, value, visibility, scoring.scale, logsumexp, tile_rows, block_keys)
    # Σ_j A_ij (dO_i · v_j) = dO_i · O_i
    products = (grad_output.to(logsumexp.dtype) * output.to(logsumexp.dtype)).sum(-1)
    shift = rearrange(products, "b q h -> b h q").contiguous()
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    call.shift, call.grad_output = shift.data_ptr(), _described(grad_output)
    call.grad_query, call.grad_key, call.grad_value = (_described(gradient) for gradient in gradients)
    _run(library.load(library.path()).llama_attn_backward, call)
    return gradients


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    visibility: Visibility,
    scaling: float,
    logsumexp: Tensor,
    tile_rows: int,
    block_keys: int,
) -> tuple[library.Call, list[Tensor]]:
    """What forward and backward are told alike, and the tensors that must outlive the call."""
    if query.device.type != "cpu":
        raise ValueError(f"query: the native engine works on the CPU, got a tensor on {query.device}")
    if block_keys < 1 or block_keys % PANEL_KEYS:
        raise ValueError(f"block_keys: expected a multiple of {PANEL_KEYS}, got {block_keys}")
    batch, heads, num_queries, channels = query.shape
    call = library.Call(
        batch=batch,
        heads=heads,
        kv_heads=key.shape[1],
        num_queries=num_queries,
        num_keys=visibility.num_keys,
        channels=channels,
        first_query=visibility.queries.start,
        query_step=visibility.queries.step,
        causal=visibility.causal,
        threads=torch.get_num_threads(),
        tile_rows=tile_rows,
        block_keys=block_keys,
        scaling=scaling,
        hidden_score=HIDDEN_SCORE,
        query=_described(query),
        key=_described(key),
        row_logsumexp=logsumexp.data_ptr(),
    )
    held: list[Tensor] = []
    if value is not None:
        call.value_channels, call.value = value.shape[-1], _described(value)
    vectors = {"real_keys": visibility.real, "sequence": visibility.sequence}
    if not (visibility.real is visibility.sees is visibility.rows is None):
        vectors["real_queries"] = visibility.real_queries
    for name, vector in vectors.items():
        if vector is not None:
            held.append(vector.long().contiguous() if name == "sequence" else vector.contiguous())
            setattr(call, name, held[-1].data_ptr())
    if visibility.mask is not None:
        mask = visibility.mask.expand(batch, heads, -1, -1)
        held.append(mask)
        call.mask = _described(mask)
        if mask.dtype != torch.bool:
            # As torch compares: in the dtype of the mask.
            call.unseen_bias = torch.tensor(UNSEEN_BIAS, dtype=mask.dtype).item()
    return call, held


def _described(tensor: Tensor) -> library.Tensor:
    return library.Tensor(tensor.data_ptr(), _TYPES[tensor.dtype], tensor.stride())


def _run(function: library.Function, call: library.Call) -> None:
    if message := function(call):
        raise MemoryError(message.decode())
