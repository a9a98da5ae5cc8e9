"""The engine in C++ for CPUs: output and statistics of a tile of query rows while it is in the cache.

The sources are in csrc/. Wheels bring them compiled; `llama-attn build` compiles them for the processor at hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llama_attn.engines import _library as library
from llama_attn.engines._library import OFFSETS, point
from llama_attn.engines._native_numbers import BINNED, PER_QUERY, RECEIVED, Numbers, laid_out
from llama_attn.engines._walk import Gradients, Walk, check_call, compute_dtype
from llama_attn.stats.block import HIDDEN_SCORE, Wanted
from llama_attn.stats.extents import Extents
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

_KNOWN = PER_QUERY | RECEIVED | {"distance_histogram", "row_weights", *BINNED}
# Where the tensors lie that each layer has of its own.
_EACH = ("query", "key", "value", "output")
# More tokens than there are, and few enough that sums with them do not overflow.
_BEYOND = 2**40


def unavailable() -> str | None:
    """Why it does not run here: it has not been built, or the library cannot be used."""
    try:
        library.load(library.path())
    except ImportError as error:
        return str(error)
    return None


def knows(statistic: Statistic) -> bool:
    """Whether the C++ code takes it; what needs more than sums over keys is left to ``torch``."""
    return statistic.name in _KNOWN


def refuses(visibility: Visibility, scoring: Scoring) -> str | None:
    """It takes whatever can be said of who sees whom and of scores."""
    return None


def walk(
    query: Float[Tensor, "batch head query channel"],
    key: Float[Tensor, "batch kv_head key channel"],
    value: Float[Tensor, "batch kv_head key value_channel"] | None,
    visibility: Visibility,
    scoring: Scoring,
    wanted: Wanted | None = None,
    for_backward: bool = True,
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
        for_backward: Whether the logsumexp is needed.
        tile_rows: Query rows, of all heads of a group, that are worked on at once.
        block_keys: Keys that are worked on at once, a multiple of `PANEL_KEYS`. The result depends on neither beyond
            rounding, and not at all on the number of threads.

    Returns:
        The output in the dtype of ``value``, the logsumexp and the raw statistics in float32 or wider.

    Raises:
        ValueError: The tensors do not fit one another or are not on the CPU, or ``block_keys`` is no such multiple.
        MemoryError: There is not enough memory.
    """
    alike = (
        query.shape, query.stride(), query.dtype, query.is_cpu, query.is_neg(),
        key.shape, key.stride(), key.dtype, key.is_cpu, key.is_neg(),
        value is not None and (value.shape, value.stride(), value.dtype, value.is_cpu, value.is_neg()),
        scoring, wanted, for_backward, tile_rows, block_keys, torch.get_num_threads(),
    )  # fmt: skip
    told: _Told | None = visibility.__dict__.get("_told")
    if is_new := told is None or told.alike != alike:
        layers = wanted.layers if told is None and wanted is not None else 1
        told = _Told.of(alike, query, key, value, visibility, scoring, wanted, tile_rows, block_keys, layers)
    try:
        call = told.calls.pop()
    except IndexError:
        call = library.Call.from_buffer_copy(told.call)
    output = logsumexp = None
    tensors = [query, key] if value is None else [query, key, value]
    if not told.as_they_are:
        # A view may say "times −1" beside its numbers; keys behind the last that the visibility knows are nobody's.
        tensors = [query.resolve_neg(), *(_known(tensor, visibility) for tensor in tensors[1:])]
    if value is not None:
        output = value.new_empty(told.extents)
        tensors.append(output)
    for name, tensor in zip(_EACH, tensors, strict=False):
        # What is empty has no address.
        if not is_new and (address := tensor.data_ptr()):
            point(call, OFFSETS[name], address)
        else:
            call.put(name, tensor)
    if for_backward:
        # Small, and of few calls: written anew for each.
        logsumexp = query.new_empty(query.shape[:3], dtype=compute_dtype(query))
        call.put("row_logsumexp", logsumexp)
    if is_new and scoring.plain:
        told = visibility.__dict__["_told"] = told._replace(call=bytes(call))
    raw = {} if told.numbers is None else told.numbers.of_next(call)
    library.run("forward", call)
    told.calls.append(call)
    return Walk(output, logsumexp, raw)


class _Told(NamedTuple):
    """What the calls of several layers say alike.

    The layers of a model make the same call over and over, and to describe it takes as long as a token's attention. The
    visibility keeps it: one object for all layers with the same mask.

    Args:
        alike: What must be equal for that.
        extents: Of the output, (batch, query, head, value_channel).
        call: The call; the tensors of a layer lie elsewhere in each.
        calls: Copies of it that nobody makes at the moment; two threads may make one each.
        held: Tensors of all layers, which must outlive the calls.
        as_they_are: Whether query, key and value are read as they were given.
        numbers: Where the statistics go; None if none were asked for.
    """

    alike: tuple[Any, ...]
    extents: tuple[int, ...]
    call: bytes
    calls: list[library.Call]
    held: list[Tensor]
    as_they_are: bool
    numbers: Numbers | None

    @classmethod
    def of(
        cls,
        alike: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        visibility: Visibility,
        scoring: Scoring,
        wanted: Wanted | None,
        tile_rows: int,
        block_keys: int,
        layers: int,
    ) -> _Told:
        """What such a call says, and ``layers`` more like it.

        Raises:
            ValueError: As `walk`.
        """
        check_call(query, key, value, visibility, scoring)
        call, held = _call(query, key, value, visibility, scoring, tile_rows, block_keys)
        given = [tensor for tensor in (query, key, value) if tensor is not None]
        as_they_are = key.shape[2] == visibility.num_keys and not any(tensor.is_neg() for tensor in given)
        extents = query.shape[0], query.shape[2], query.shape[1], 0 if value is None else value.shape[3]
        if wanted is None:
            return cls(alike, extents, bytes(call), [], held, as_they_are, None)
        names = [statistic.name for statistic in wanted.statistics]
        chosen = range(query.shape[2]) if wanted.rows is None else wanted.rows
        for at, name in enumerate(filter(PER_QUERY.__contains__, names), start=1):
            setattr(call, name, at)
        layout = laid_out(wanted.statistics, Extents.of_call(query, visibility, wanted))
        numbers = Numbers(call, layout, compute_dtype(query), layers)
        if "row_weights" in names:
            held.append(torch.full((query.shape[2],), -1))
            held[-1][list(chosen)] = torch.arange(len(chosen))
            call.put("row_places", held[-1])
        if "kept_mass" in names:
            if wanted.keep is None:
                raise ValueError("'kept_mass' needs `keep` in the AttentionStatsConfig")
            held.append(wanted.keep.expand(query.shape[0], key.shape[1], -1).contiguous())
            call.put("kept", held[-1])
        call.sink_tokens = min(wanted.config.sink_tokens, _BEYOND)
        call.window = min(wanted.config.window, _BEYOND)
        if "sink_mass" in names and not visibility.plain:
            held.append(visibility.rank.contiguous())
            call.put("rank", held[-1])
        return cls(alike, extents, bytes(call), [], held, as_they_are, numbers)


def _known(tensor: Tensor, visibility: Visibility) -> Tensor:
    tensor = tensor if tensor.shape[2] == visibility.num_keys else tensor[:, :, : visibility.num_keys]
    return tensor.resolve_neg()


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
) -> Gradients:
    """Gradients of all that scores and output are made of; the weights of each block are computed again.

    Raises:
        ValueError: As `walk`.
        MemoryError: There is not enough memory.

    Source: Dao et al., arXiv 2205.14135, algorithm 4.
    """
    check_call(query, key, value, visibility, scoring)
    call, held = _call(query, key, value, visibility, scoring, tile_rows, block_keys)
    held += [query.resolve_neg(), _known(key, visibility), _known(value, visibility), logsumexp.contiguous()]
    for name, tensor in zip(("query", "key", "value", "row_logsumexp"), held[-4:], strict=True):
        call.put(name, tensor)
    # Σ_j A_ij (dO_i · v_j) = dO_i · O_i
    products = (grad_output.to(logsumexp.dtype) * output.to(logsumexp.dtype)).sum(-1)
    shift = rearrange(products, "b q h -> b h q").contiguous()
    # Keys behind the last that the visibility knows get none.
    make = torch.empty_like if key.shape[2] == visibility.num_keys else torch.zeros_like
    gradients = Gradients(torch.empty_like(query), make(key), make(value))
    held.append(grad_output.resolve_neg())
    call.put("shift", shift)
    call.put("grad_output", held[-1])
    call.put("grad_query", gradients.query)
    call.put("grad_key", gradients.key[:, :, : visibility.num_keys])
    call.put("grad_value", gradients.value[:, :, : visibility.num_keys])
    if scoring.position_bias is not None:
        # One tile meets all pairs of its own head once, so nothing is added: what is shared is summed afterwards.
        held.append(logsumexp.new_zeros(*query.shape[:3], visibility.num_keys))
        call.put("grad_position_bias", held[-1])
    library.run("backward", call)
    if scoring.position_bias is not None:
        grad_bias = held[-1].sum_to_size(scoring.position_bias.shape).to(scoring.position_bias.dtype)
        gradients = gradients._replace(position_bias=grad_bias)
    if scoring.sinks is not None:
        # The sink's weight times what its weight would have to give, zero, less the row's mean.
        weights = (scoring.sinks.to(logsumexp.dtype)[:, None] - logsumexp).exp()
        gradients = gradients._replace(sinks=-(weights * shift).sum((0, 2)).to(scoring.sinks.dtype))
    return gradients


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    visibility: Visibility,
    scoring: Scoring,
    tile_rows: int,
    block_keys: int,
) -> tuple[library.Call, list[Tensor]]:
    """What forward and backward are told alike, but for the tensors of the layer; and what must outlive the call."""
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
        value_channels=0 if value is None else value.shape[-1],
        first_query=visibility.first_query,
        query_step=visibility.stride,
        causal=visibility.causal,
        threads=torch.get_num_threads(),
        tile_rows=tile_rows,
        block_keys=block_keys,
        scaling=scoring.scale,
        softcap=scoring.softcap or 0.0,
        hidden_score=HIDDEN_SCORE,
    )
    tensors: dict[str, Tensor] = {}
    if visibility.real is not None:
        tensors["real_keys"] = visibility.real.contiguous()
    if not (visibility.real is visibility.sees is visibility.rows is None):
        tensors["real_queries"] = visibility.real_queries.contiguous()
    if visibility.has_spans:
        tensors["first_key"], tensors["stop_key"] = visibility.key_spans
    if scoring.sinks is not None:
        tensors["sinks"] = scoring.sinks.to(compute_dtype(query)).contiguous()
    for name, pairs in (("mask", visibility.mask), ("position_bias", scoring.position_bias)):
        if pairs is not None:
            tensors[name] = pairs.resolve_neg().expand(batch, heads, -1, -1)
    for name, tensor in tensors.items():
        call.put(name, tensor)
    if visibility.mask is not None and visibility.mask.dtype != torch.bool:
        # As torch compares: in the dtype of the mask.
        call.unseen_bias = torch.tensor(UNSEEN_BIAS, dtype=visibility.mask.dtype).item()
    return call, list(tensors.values())
