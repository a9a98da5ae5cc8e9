"""Statistics of one query: what a row of attention weights looks like."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_attn.stats.block import Block
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import Statistic

QUERY_DIMS = ("layer", "batch", "head", "query")


def _entropy(block: Block) -> Float[Tensor, "batch head row"]:
    # ln Σe^(s−m) − E[s−m]: the textbook lse − E[s] cancels when scores are large.
    return block.row_sum.log() - torch.einsum("bhrk,bhrk->bhr", block.exponentials, block.centred) * block.scale


def _entropy_textbook(reference: Reference) -> Tensor:
    return -torch.xlogy(reference.weights, reference.weights).sum(-1)


def _effective_keys(block: Block) -> Float[Tensor, "batch head row"]:
    norm = torch.linalg.vector_norm(block.exponentials, dim=-1)
    return (block.row_sum / norm).square()


def _sink_mass(block: Block) -> Float[Tensor, "batch head row"]:
    visibility, sink_tokens = block.visibility, block.config.sink_tokens
    if visibility.plain:
        return block.exponentials[..., :sink_tokens].sum(-1) * block.scale
    sinks = (visibility.rank < sink_tokens) & visibility.real_keys
    return block.mean(sinks[:, : block.num_keys].to(block.exponentials.dtype))


def _sink_mass_textbook(reference: Reference) -> Tensor:
    sinks = (reference.rank < reference.config.sink_tokens).double()
    return (reference.weights * sinks[:, None, None]).sum(-1)


def _local_mass(block: Block) -> Float[Tensor, "batch head row"]:
    window = block.config.window
    # Only keys near the block can be near a row of it.
    first = max(0, int(block.visibility.queries[block.rows[0]]) - window + 1)
    last = min(block.num_keys, int(block.visibility.queries[block.rows[-1]]) + window)
    near = block.distance(first, last) < window
    return (block.exponentials[..., first:last] * near).sum(-1) * block.scale


def _mean_distance(block: Block) -> Float[Tensor, "batch head row"]:
    if not block.visibility.causal:
        return (block.exponentials * block.distance(0, block.num_keys)).sum(-1) * block.scale
    # Σ A (i − j) = Σ A (i₀ − j) + (i − i₀) Σ A with i₀ the block's first query: one product with a vector, and
    # no cancellation of large positions.
    first, stride = block.visibility.queries[block.rows[0]], block.visibility.stride
    dtype, device = block.exponentials.dtype, block.exponentials.device
    from_first = torch.arange(first, first - block.num_keys, -1, dtype=dtype, device=device)
    beyond_first = torch.arange(0, stride * len(block.rows), stride, dtype=dtype, device=device)
    return block.mean(from_first) + beyond_first * (block.row_sum * block.scale)


def _topk_weight(block: Block) -> Float[Tensor, "batch head row rank"]:
    values, _ = block.topk
    return torch.where(values == -torch.inf, torch.nan, values.exp() * block.scale[..., None])


def _topk_position(block: Block) -> Int[Tensor, "batch head row rank"]:
    values, keys = block.topk
    return torch.where(values == -torch.inf, -1, keys).int()


def _topk_textbook(reference: Reference) -> tuple[Tensor, Tensor]:
    scores, keys = reference.scores.sort(dim=-1, descending=True, stable=True)
    weights = reference.weights.gather(-1, keys)
    missing = reference.config.top_k - keys.shape[-1]
    if missing > 0:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        weights, keys = (torch.nn.functional.pad(t, (0, missing)) for t in (weights, keys))
    k = reference.config.top_k
    none = scores[..., :k] == -torch.inf
    return weights[..., :k].masked_fill(none, torch.nan), keys[..., :k].masked_fill(none, -1)


def _segment_mass(block: Block) -> Float[Tensor, "batch head row segment"]:
    labels = block.wanted.segments
    if labels is None:
        raise ValueError("segment_mass: needs `segments` in the AttentionStatsConfig")
    names = torch.arange(block.wanted.num_segments, device=labels.device)
    columns = (labels[:, : block.num_keys, None] == names).to(block.exponentials.dtype)
    return torch.matmul(block.exponentials, columns[:, None]) * block.scale[..., None]


def _segment_mass_textbook(reference: Reference) -> Tensor:
    labels = reference.segments
    if labels is None:
        raise ValueError("segment_mass: the reference has no segments")
    masses = [(reference.weights * (labels == s)[:, None, None]).sum(-1) for s in range(int(labels.max()) + 1)]
    return torch.stack(masses, dim=-1)


def _beyond_visible(reference: Reference) -> Tensor:
    """Scores with hidden keys at −inf, where a row that sees nothing gives 0 and not NaN."""
    return torch.where(reference.scores.isinf().all(-1, keepdim=True), 0, reference.scores)


STATISTICS = (
    Statistic(
        "entropy", QUERY_DIMS, "nat", "Shannon (1948); used for collapse by Zhai et al., arXiv 2303.06296",
        stream=_entropy, textbook=_entropy_textbook, default=True, meaning="entropy of the attention weights",
    ),
    Statistic(
        "logsumexp", QUERY_DIMS, "logit", "Dao et al., arXiv 2205.14135",
        stream=lambda block: block.row_max + block.row_sum.log(),
        textbook=lambda reference: _beyond_visible(reference).logsumexp(-1),
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
        stream=_effective_keys, textbook=lambda reference: 1 / reference.weights.square().sum(-1),
        meaning="effective number of attended keys",
    ),
    Statistic(
        "sink_mass", QUERY_DIMS, "probability", "Xiao et al., arXiv 2309.17453 (StreamingLLM)",
        stream=_sink_mass, textbook=_sink_mass_textbook, default=True,
        meaning="attention mass on the first tokens of the query's own sequence",
    ),
    Statistic(
        "local_mass", QUERY_DIMS, "probability", "attention within a window, cf. Beltagy et al., arXiv 2004.05150",
        stream=_local_mass, default=True, meaning="attention mass on the nearest keys",
        textbook=lambda reference: (reference.weights * (reference.distance < reference.config.window)).sum(-1),
    ),
    Statistic(
        "mean_distance", QUERY_DIMS, "tokens", "Vig & Belinkov (2019), arXiv 1906.04284",
        stream=_mean_distance, default=True, meaning="mean distance from the query to the attended keys",
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
)  # fmt: skip
