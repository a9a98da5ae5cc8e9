"""The engine in plain PyTorch: runs on every device, and is where new statistics are born.

A block of query rows, the heads of one KV group stacked so that one matrix product serves the group, meets the run of
keys it may see. The softmax is taken in float32, each wanted statistic takes what it needs, and the block is dropped.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llama_attn.engines._threads import in_threads
from llama_attn.engines._walk import Gradients, Walk, check_call, compute_dtype
from llama_attn.stats.block import HIDDEN_SCORE, Block, NotGivenError, Wanted
from llama_attn.stats.extents import Extents, check_returned
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import BUILT_IN, Statistic
from llama_attn.stats.visibility import Visibility

# Bytes of scores held at once. Small enough that the passes over a block find it in the cache of a CPU, large enough
# that the products stay efficient; measured in benchmarks/.
BLOCK_BYTES = 8 * 2**20
# The same for all blocks that are worked on at once, which many cores would let grow to gigabytes.
ALL_BLOCKS_BYTES = 2**30
LOG2_E = math.log2(math.e)
# Below it the weight of a learned sink is zero; finite, so that its zero weight times it is zero and not NaN.
LEAST_ODDS = -1e4


class _Scores(NamedTuple):
    rows: range
    keys: slice
    scores: Float[Tensor, "batch head row key"]
    queries: Float[Tensor, "groups rows channel"]
    # Of the soft-cap: what a score grows by when the product does.
    slope: Float[Tensor, "batch head row key"] | None


def unavailable() -> str | None:
    """PyTorch is always there."""
    return None


def knows(statistic: Statistic) -> bool:
    """Every statistic has a streaming form for this engine."""
    return True


def refuses(visibility: Visibility, scoring: Scoring) -> str | None:
    """There is no call that this engine cannot do."""
    return None


def walk(
    query: Float[Tensor, "batch head query channel"],
    key: Float[Tensor, "batch kv_head key channel"],
    value: Float[Tensor, "batch kv_head key value_channel"] | None,
    visibility: Visibility,
    scoring: Scoring,
    wanted: Wanted | None = None,
    for_backward: bool = True,
    block_rows: int | None = None,
) -> Walk:
    """Attention output and statistics of one layer, one block of query rows at a time.

    Args:
        query: Queries after RoPE.
        key: Keys after RoPE and cache.
        value: Values, to get the output too (fused); ``None`` to measure only (observed).
        visibility: Who may see whom.
        scoring: How scores are made.
        wanted: What to measure; ``None`` for the output alone.
        for_backward: Whether the logsumexp is needed.
        block_rows: Query rows per block; ``None`` for what fits `BLOCK_BYTES`. The result does not depend on it
            beyond rounding.

    Returns:
        The output in the dtype of ``value``, the logsumexp and the raw statistics in float32 or wider.

    Raises:
        ValueError: The tensors do not fit one another.
    """
    check_call(query, key, value, visibility, scoring)
    batch, heads, num_queries, _ = query.shape
    logsumexp = query.new_empty(batch, heads, num_queries, dtype=compute_dtype(query))
    sees = torch.empty_like(logsumexp, dtype=torch.bool)
    output = None
    if value is not None:
        output = value.new_empty(batch, num_queries, heads, value.shape[-1])
        value = _stacked(value, logsumexp.dtype)
    block_rows = block_rows or _block_rows(query, visibility)
    # Rows of queries, which are shared, and sums over them, which every worker has for himself.
    raw: dict[str, Tensor] = {}
    workers = _workers(query, visibility, block_rows)
    sinks = None if scoring.sinks is None else scoring.sinks.to(logsumexp.dtype)[:, None]

    def work(worker: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        # Without statistics nobody needs the centred scores again.
        scratch = _scratch(query, visibility, block_rows) if wanted else None
        for rows, keys, scores, *_ in _blocks(query, stacked_key, visibility, scoring, block_rows, worker, workers):
            row_max = scores.amax(-1)
            scores.sub_(row_max[..., None])
            exponentials = scores if scratch is None else scratch[: scores.numel()].view_as(scores)
            # Powers of two take half the time of `torch.exp` on a CPU, this pass included.
            torch.mul(scores, LOG2_E, out=exponentials).exp2_()
            row_sum = exponentials.sum(-1)
            span = slice(rows.start, rows.stop)
            seeing = torch.gt(row_max, HIDDEN_SCORE / 2, out=sees[:, :, span])
            share, odds = row_sum.reciprocal(), None
            total = torch.add(row_max, row_sum.log(), out=logsumexp[:, :, span])
            if sinks is not None:
                odds = (sinks - row_max).sub_(row_sum.log()).clamp_(min=LEAST_ODDS)
                share *= torch.sigmoid(-odds)
                torch.logaddexp(total, sinks.expand_as(total), out=total)
            inverse = torch.where(seeing, share, 0)
            if value is not None and output is not None:
                mixed = torch.bmm(exponentials.view(value.shape[0], -1, scores.shape[-1]), value[:, keys])
                mixed = mixed.view(batch, heads, len(rows), -1) * inverse[..., None]
                output[:, span] = rearrange(mixed, "b h q d -> b q h d")
            if wanted:
                real = visibility.real_queries[:, None, span]
                scale = torch.where(real, inverse, 0)
                block = Block(
                    scores, exponentials, row_max, row_sum, total, scale, rows, keys.start, visibility, wanted, odds
                )
                _take(block, raw, sums, num_queries)
        return sums

    stacked_key = _stacked(key, logsumexp.dtype)
    # Added in the order of the workers, so that the result depends on their number only.
    for sums in in_threads(work, workers):
        for name, part in sums.items():
            raw[name] = raw[name] + part if name in raw else part
    if wanted is None:
        return Walk(output, logsumexp if for_backward else None, raw)
    chosen = wanted.rows
    for statistic in wanted.statistics:
        if statistic.name not in raw:
            # There was no block: a sum over nothing, or no rows.
            shape = Extents.of_call(query, visibility, wanted).shape(statistic)
            raw[statistic.name] = logsumexp.new_zeros(shape, dtype=statistic.dtype)
        # A row that sees nothing, or NaN, has no statistics.
        if statistic.per_query:
            taken, none = raw[statistic.name], statistic.none
            # Of padding, keys that its block did not meet would otherwise be zero.
            shown = sees
            if "row" in statistic.dims:
                shown = sees & visibility.real_queries[:, None]
                shown = shown if chosen is None else shown[:, :, list(chosen)]
            taken.masked_fill_(~shown.view(*shown.shape, *[1] * (taken.ndim - shown.ndim)), none)
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
    block_rows: int | None = None,
) -> Gradients:
    """Gradients of all that scores and output are made of.

    The weights of each block are computed again from the logsumexp.

    Raises:
        ValueError: The tensors do not fit one another.

    Source: Dao et al., arXiv 2205.14135, algorithm 4.
    """
    check_call(query, key, value, visibility, scoring)
    dtype = logsumexp.dtype
    grad_query = torch.empty_like(query, dtype=dtype)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    bias, sinks = scoring.position_bias, scoring.sinks
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    stacked_key, stacked_value = _stacked(key, dtype), _stacked(value, dtype)
    # Σ_j A_ij (dO_i · v_j) = dO_i · O_i
    shift = rearrange((grad_output.to(dtype) * output.to(dtype)).sum(-1), "b q h -> b h q")
    block_rows = block_rows or _block_rows(query, visibility)
    for rows, keys, scores, queries, slope in _blocks(query, stacked_key, visibility, scoring, block_rows, slopes=True):
        span, num_keys = slice(rows.start, rows.stop), scores.shape[-1]
        sees = logsumexp[:, :, span] > HIDDEN_SCORE / 2
        weights = scores.sub_(logsumexp[:, :, span, None]).exp_().mul_(sees[..., None])
        grad_rows = rearrange(grad_output[:, span].to(dtype), "b q h d -> b h q d")
        stacked_weights = weights.view(len(stacked_key), -1, num_keys)
        stacked_grad = grad_rows.reshape(len(stacked_key), -1, value.shape[-1])
        grad_value.flatten(0, 1)[:, keys].baddbmm_(stacked_weights.mT, stacked_grad)
        grad_weights = torch.bmm(stacked_grad, stacked_value[:, keys].mT).view_as(weights)
        grad_scores = grad_weights.sub_(shift[:, :, span, None]).mul_(weights)
        if grad_bias is not None:
            place = grad_bias[:, :, span, keys]
            place.copy_(grad_scores.sum_to_size(place.shape))
        if slope is not None:
            grad_scores.mul_(slope)
        stacked_scores = grad_scores.view_as(stacked_weights)
        # ``queries`` already carry the scale.
        grad_key.flatten(0, 1)[:, keys].baddbmm_(stacked_scores.mT, queries)
        grad_query[:, :, span] = torch.bmm(stacked_scores, stacked_key[:, keys]).view(*query.shape[:2], len(rows), -1)
    grad_sinks = None
    if sinks is not None:
        # A sink has no value, so that of its weight's gradient nothing is left but the mean over the row.
        grad_sinks = -((sinks.to(dtype)[:, None] - logsumexp).exp() * shift).sum((0, 2)).to(sinks.dtype)
    return Gradients(
        (grad_query * scoring.scale).to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        grad_sinks,
    )


def _stacked(tensor: Tensor, dtype: torch.dtype) -> Float[Tensor, "groups key channel"]:
    """Keys or values of all rows and KV heads, in the dtype that is computed in."""
    return tensor.to(dtype).contiguous().flatten(0, 1)


def _blocks(
    query: Tensor,
    stacked_key: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    block_rows: int,
    first: int = 0,
    step: int = 1,
    slopes: bool = False,
) -> Iterator[_Scores]:
    """The scores of every ``step``-th block of rows from the ``first`` on, hidden keys at `HIDDEN_SCORE`.

    The scores of a block are overwritten by the next.
    """
    batch, heads, num_queries, channels = query.shape
    groups = len(stacked_key)
    if not groups:
        return
    scratch = _scratch(query, visibility, block_rows)
    for start in range(first * block_rows, num_queries, step * block_rows):
        rows = range(start, min(start + block_rows, num_queries))
        begin, stop = visibility.span_of(rows)
        keys, num_keys = slice(begin, stop), stop - begin
        queries = query[:, :, rows.start : rows.stop].to(stacked_key.dtype) * scoring.scale
        queries = queries.reshape(groups, -1, channels)
        scores = scratch[: batch * heads * len(rows) * num_keys].view(batch, heads, len(rows), num_keys)
        torch.bmm(queries, stacked_key[:, keys].mT, out=scores.view(groups, -1, num_keys))
        slope = None
        if scoring.softcap is not None:
            scores.div_(scoring.softcap).tanh_()
            slope = 1 - scores.square() if slopes else None
            scores.mul_(scoring.softcap)
        if scoring.position_bias is not None:
            scores += scoring.position_bias[:, :, rows.start : rows.stop, keys]
            # Of a bias of −∞, whose zero weight times it would be NaN.
            scores.clamp_(min=HIDDEN_SCORE)
        if (bias := visibility.bias(rows)) is not None:
            scores += bias
        for hidden, first_hidden in visibility.hidden(rows):
            columns = slice(first_hidden - begin, first_hidden - begin + hidden.shape[-1])
            scores[..., columns].masked_fill_(hidden, HIDDEN_SCORE)
        yield _Scores(rows, keys, scores, queries, slope)


def _take(block: Block, raw: dict[str, Tensor], sums: dict[str, Tensor], num_queries: int) -> None:
    """Let each wanted statistic take what it needs from the block: rows of queries, or sums over them."""
    for statistic in block.wanted.statistics:
        of_all, first, chosen = num_queries, block.rows.start, None
        if "rows" in statistic.needed and (wanted := block.wanted.rows) is not None:
            of_all, first = len(wanted), bisect_left(wanted, first)
            if not (chosen := [row - block.rows.start for row in wanted if row in block.rows]):
                continue
        try:
            taken = statistic.stream(block)
        except NotGivenError as error:
            raise error.by(statistic) from None
        if statistic.name not in BUILT_IN:
            axes = Extents.of_block(block).axes(statistic)
            check_returned(statistic, "streaming form", taken, axes, block.scale.dtype)
        if chosen is not None:
            taken = taken[:, :, chosen]
        if statistic.per_query:
            if statistic.name not in raw:
                # Another worker may have been faster.
                raw.setdefault(statistic.name, _of_all_rows(statistic, taken, of_all, block.visibility.num_keys))
            rows = raw[statistic.name][:, :, first : first + taken.shape[2]]
            if statistic.dims[-1] == "key":
                rows = rows[..., block.keys]
            rows.copy_(taken)
        elif statistic.dims[-1] == "key":
            if statistic.name not in sums:
                sums[statistic.name] = taken.new_zeros(*taken.shape[:2], block.visibility.num_keys)
            sums[statistic.name][..., block.keys] += taken
        elif statistic.name in sums:
            sums[statistic.name] += taken
        else:
            sums[statistic.name] = taken


def _of_all_rows(statistic: Statistic, taken: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Room for what all blocks give; keys that no block meets have no weight."""
    if statistic.dims[-1] == "key":
        return taken.new_zeros(*taken.shape[:2], num_queries, num_keys)
    return taken.new_empty(*taken.shape[:2], num_queries, *taken.shape[3:])


def _workers(query: Tensor, visibility: Visibility, block_rows: int) -> int:
    """How many blocks are worked on at once."""
    if query.device.type != "cpu":
        return 1
    blocks = -(-query.shape[2] // block_rows)
    block_bytes = block_rows * _row_bytes(query, _block_keys(query, visibility, block_rows))
    return max(1, min(blocks, torch.get_num_threads(), ALL_BLOCKS_BYTES // block_bytes))


def _scratch(query: Tensor, visibility: Visibility, block_rows: int) -> Tensor:
    """Memory for one block that the next uses again, since fresh pages cost more than the arithmetic."""
    batch, heads, num_queries, _ = query.shape
    size = batch * heads * min(block_rows, num_queries) * _block_keys(query, visibility, block_rows)
    return query.new_empty(size, dtype=compute_dtype(query))


def _block_rows(query: Tensor, visibility: Visibility) -> int:
    # No more rows than a row has keys: in a narrow window more would mostly meet keys that they do not see.
    widest = visibility.widest_span
    return max(16, min(256, widest, BLOCK_BYTES // _row_bytes(query, widest)))


def _block_keys(query: Tensor, visibility: Visibility, block_rows: int) -> int:
    """Most keys that a block meets."""
    if not visibility.has_spans:
        return visibility.num_keys
    spans = (
        visibility.span_of(range(start, min(start + block_rows, query.shape[2])))
        for start in range(0, query.shape[2], block_rows)
    )
    return max((stop - first for first, stop in spans), default=0)


def _row_bytes(query: Tensor, num_keys: int) -> int:
    """Of the scores of one query and ``num_keys`` keys in all rows of the batch and all heads."""
    return max(1, query.shape[0] * query.shape[1] * num_keys * compute_dtype(query).itemsize)
