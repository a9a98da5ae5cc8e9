"""Statistics of one query: what a row of attention weights looks like."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from llama_attn.stats.block import Block
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import Statistic

QUERY_DIMS = ("layer", "batch", "head", "query")


def _entropy(block: Block) -> Float[Tensor, "batch head row"]:
    # ln Σe^(s−m) − E[s−m]: the textbook lse − E[s] cancels when scores are large.
    of_keys = block.row_sum.log() - torch.einsum("bhrk,bhrk->bhr", block.exponentials, block.centred) / block.row_sum
    odds = block.sink_odds
    if odds is None:
        return of_keys
    # First whether it is the sink or a key, then which key. All terms are above 0.
    keys, sink = torch.sigmoid(-odds), torch.sigmoid(odds)
    return keys * (of_keys + softplus(odds)) + sink * softplus(-odds)


def _entropy_textbook(reference: Reference) -> Tensor:
    outcomes = reference.outcomes
    return -torch.xlogy(outcomes, outcomes).sum(-1)


def _effective_keys(block: Block) -> Float[Tensor, "batch head row"]:
    norm = torch.linalg.vector_norm(block.exponentials, dim=-1)
    of_keys = (block.row_sum / norm).square()
    if block.sink_odds is None:
        return of_keys
    keys, sink = torch.sigmoid(-block.sink_odds), torch.sigmoid(block.sink_odds)
    return 1 / (keys.square() / of_keys + sink.square())


def _learned_sink_mass(block: Block) -> Float[Tensor, "batch head row"]:
    return torch.zeros_like(block.scale) if block.sink_odds is None else torch.sigmoid(block.sink_odds)


def _sink_mass(block: Block) -> Float[Tensor, "batch head row"]:
    visibility, sink_tokens = block.visibility, block.config.sink_tokens
    if visibility.plain:
        return block.exponentials[..., :sink_tokens].sum(-1) * block.scale
    sinks = (visibility.rank[:, block.keys] < sink_tokens) & visibility.real_keys[:, block.keys]
    return block.mean(sinks.to(block.exponentials.dtype))


def _sink_mass_textbook(reference: Reference) -> Tensor:
    sinks = (reference.rank < reference.config.sink_tokens).double()
    return (reference.weights * sinks[:, None, None]).sum(-1)


def _local_mass(block: Block) -> Float[Tensor, "batch head row"]:
    window = block.config.window
    # Only keys near the block can be near a row of it.
    first = max(block.keys.start, block.visibility.queries[block.rows[0]] - window + 1)
    stop = max(first, min(block.keys.stop, block.visibility.queries[block.rows[-1]] + window))
    near = block.distance(first, stop) < window
    return (block.exponentials[..., first - block.first_key : stop - block.first_key] * near).sum(-1) * block.scale


def _mean_distance(block: Block) -> Float[Tensor, "batch head row"]:
    # Keys before the block lie i − j = (i₀ − j) + (i − i₀) behind a query of it, i₀ being its first: two products with
    # vectors. For the others pair by pair; either way all terms are of one sign, so that nothing cancels.
    if len(block.rows) == 1:
        return block.mean(block.distance(block.keys.start, block.keys.stop)[0].to(block.exponentials.dtype))
    first = block.visibility.queries[block.rows[0]]
    before = min(max(0, first - block.first_key), block.num_keys) if block.visibility.causal else 0
    middle, stop = block.first_key + before, block.keys.stop
    total = (block.exponentials[..., before:] * block.distance(middle, stop)).sum(-1)
    if before:
        dtype, device = block.exponentials.dtype, block.exponentials.device
        from_first = torch.arange(first - block.first_key, first - middle, -1, dtype=dtype, device=device)
        beyond_first = (block.query_slots - first).to(dtype)
        earlier = block.exponentials[..., :before]
        total += torch.matmul(earlier, from_first) + beyond_first * earlier.sum(-1)
    return total * block.scale


def _topk_weight(block: Block) -> Float[Tensor, "batch head row rank"]:
    values, _ = block.topk
    return torch.where(values == -torch.inf, torch.nan, values.exp() * block.scale[..., None])


def _topk_position(block: Block) -> Int[Tensor, "batch head row rank"]:
    values, keys = block.topk
    return torch.where(values == -torch.inf, -1, keys + block.visibility.offset).int()


def _topk_textbook(reference: Reference) -> tuple[Tensor, Tensor]:
    scores, keys = reference.scores.sort(dim=-1, descending=True, stable=True)
    weights = reference.weights.gather(-1, keys)
    missing = reference.config.top_k - keys.shape[-1]
    if missing > 0:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        weights, keys = (torch.nn.functional.pad(t, (0, missing)) for t in (weights, keys))
    k = reference.config.top_k
    none = scores[..., :k] == -torch.inf
    return weights[..., :k].masked_fill(none, torch.nan), (keys + reference.offset)[..., :k].masked_fill(none, -1)


def _segment_mass(block: Block) -> Float[Tensor, "batch head row segment"]:
    labels = block.segments
    names = torch.arange(block.wanted.num_segments, device=labels.device)
    columns = (labels[..., None] == names).to(block.exponentials.dtype)
    return torch.matmul(block.exponentials, columns[:, None]) * block.scale[..., None]


def _segment_mass_textbook(reference: Reference) -> Tensor:
    labels = reference.segments
    if labels is None:
        raise ValueError("segment_mass: the reference has no segments")
    masses = [(reference.weights * (labels == s)[:, None, None]).sum(-1) for s in range(int(labels.max()) + 1)]
    return torch.stack(masses, dim=-1)


def _kept_mass(block: Block) -> Float[Tensor, "batch head row"]:
    columns = block.keep.to(block.exponentials.dtype)
    by_group = block.exponentials.unflatten(1, (columns.shape[1], -1))
    return torch.matmul(by_group, columns[:, :, None, :, None]).squeeze(-1).flatten(1, 2) * block.scale


def _kept_mass_textbook(reference: Reference) -> Tensor:
    keep = reference.keep
    if keep is None:
        raise ValueError("kept_mass: the reference has no mask of kept keys")
    keep = keep.repeat_interleave(reference.query.shape[1] // keep.shape[1], dim=1)
    return (reference.weights * keep[:, :, None]).sum(-1)


def _beyond_visible(reference: Reference) -> Tensor:
    """Scores with hidden keys at −inf, where a row that sees nothing gives 0 and not NaN."""
    return torch.where(reference.scores.isinf().all(-1, keepdim=True), 0, reference.scores)


def _logsumexp_textbook(reference: Reference) -> Tensor:
    outcomes = _beyond_visible(reference)
    if reference.sinks is not None:
        outcomes = torch.cat([outcomes, reference.sink_scores], dim=-1)
    return outcomes.logsumexp(-1)


STATISTICS = (
    Statistic(
        "entropy", QUERY_DIMS, "nat", "Shannon (1948); used for collapse by Zhai et al., arXiv 2303.06296",
        stream=_entropy, textbook=_entropy_textbook, default=True, meaning="entropy of the attention weights",
    ),
    Statistic(
        "logsumexp", QUERY_DIMS, "logit", "Dao et al., arXiv 2205.14135",
        stream=lambda block: block.logsumexp, textbook=_logsumexp_textbook,
        default=True, meaning="log of the sum of exponentiated scores",
    ),
    Statistic(
        "max_logit", QUERY_DIMS, "logit", "Kimi K2, arXiv 2507.20534 (QK-Clip)",
        stream=lambda block: block.row_max, textbook=lambda reference: _beyond_visible(reference).amax(-1),
        default=True, meaning="largest scaled score",
    ),
    Statistic(
        "max_weight", QUERY_DIMS, "probability", "largest attention weight",
        stream=lambda block: block.scale.clone(), textbook=lambda reference: reference.weights.amax(-1),
        default=True, meaning="largest attention weight",
    ),
    Statistic(
        "effective_keys", QUERY_DIMS, "keys", "inverse participation ratio, exp of the Rényi-2 entropy",
        stream=_effective_keys, textbook=lambda reference: 1 / reference.outcomes.square().sum(-1),
        meaning="effective number of attended keys",
    ),
    Statistic(
        "learned_sink_mass", QUERY_DIMS, "probability", "gpt-oss, arXiv 2508.10925 (learned attention sinks)",
        stream=_learned_sink_mass, textbook=lambda reference: reference.sink_weight,
        meaning="share that goes to a learned sink, which is no key",
    ),
    Statistic(
        "sink_mass", QUERY_DIMS, "probability", "Xiao et al., arXiv 2309.17453 (StreamingLLM)",
        stream=_sink_mass, textbook=_sink_mass_textbook, default=True,
        meaning="attention mass on the first tokens of the query's own sequence",
    ),
    Statistic(
        "local_mass", QUERY_DIMS, "probability", "attention within a window, cf. Beltagy et al., arXiv 2004.05150",
        stream=_local_mass, default=True, of_distance=True, meaning="attention mass on the nearest keys",
        textbook=lambda reference: (reference.weights * (reference.distance < reference.config.window)).sum(-1),
    ),
    Statistic(
        "mean_distance", QUERY_DIMS, "tokens", "Vig & Belinkov (2019), arXiv 1906.04284",
        stream=_mean_distance, default=True, of_distance=True,
        meaning="mean distance from the query to the attended keys",
        textbook=lambda reference: (reference.weights * reference.distance).sum(-1),
    ),
    Statistic(
        "topk_weight", (*QUERY_DIMS, "rank"), "probability", "largest attention weights, sorted",
        stream=_topk_weight, textbook=lambda reference: _topk_textbook(reference)[0],
        meaning="weights of the most attended keys",
    ),
    Statistic(
        "topk_position", (*QUERY_DIMS, "rank"), "token", "keys of the largest attention weights, sorted",
        stream=_topk_position, textbook=lambda reference: _topk_textbook(reference)[1], dtype=torch.int32,
        meaning="positions of the most attended keys",
    ),
    Statistic(
        "segment_mass", (*QUERY_DIMS, "segment"), "probability", "attention mass per span of the prompt",
        stream=_segment_mass, textbook=_segment_mass_textbook, needs="segments",
        meaning="attention mass on each segment",
    ),
    Statistic(
        "kept_mass", QUERY_DIMS, "probability", "mass that a smaller cache keeps, cf. Zhang et al., arXiv 2306.14048 (H2O)",
        stream=_kept_mass, textbook=_kept_mass_textbook, needs="keep", meaning="attention mass on the kept keys",
    ),
    Statistic(
        "row_weights", ("layer", "batch", "head", "row", "key"), "probability", "attention weights of single queries",
        stream=lambda block: block.weights, needs="rows", meaning="attention weights of the chosen queries",
        textbook=lambda reference: reference.weights.masked_fill(
            ~reference.real_queries[:, None, :, None], torch.nan
        ),
    ),
)  # fmt: skip
