"""Statistics that compare tokens: what heads of known roles attend to."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama_attn.stats.block import Block
from llama_attn.stats.reference import Reference
from llama_attn.stats.rows import QUERY_DIMS
from llama_attn.stats.table import Statistic

LENS = "TransformerLens, head_detector"


def _previous_token(block: Block) -> Float[Tensor, "batch head row"]:
    keys = block.query_positions - 1
    weights = block.exponentials.gather(-1, keys.clamp(min=0).expand(*block.scale.shape)[..., None]).squeeze(-1)
    return weights * (keys >= 0) * block.scale


def _earlier(block: Block) -> Bool[Tensor, "row key"]:
    return torch.arange(block.num_keys, device=block.scale.device) < block.query_positions[:, None]


def _duplicate_token(block: Block) -> Float[Tensor, "batch head row"]:
    same = block.tokens[:, None] == block.row_tokens[..., None]
    return block.mass(same & _earlier(block))


def _induction(block: Block) -> Float[Tensor, "batch head row"]:
    # A key whose predecessor is padding or of another sequence follows nothing.
    visibility = block.visibility
    follows = (visibility.rank > 0) & visibility.real_keys.roll(1, dims=-1)
    predecessor = block.tokens.roll(1, dims=-1)
    matches = (predecessor[:, None] == block.row_tokens[..., None]) & follows[:, None, : block.num_keys]
    last = torch.arange(block.num_keys, device=block.scale.device) == block.query_positions[:, None]
    return block.mass(matches & (_earlier(block) | last))


def _textbook(reference: Reference, role: str) -> Tensor:
    """Σ_j A_ij D_ij with D written out pair by pair from the definition."""
    if reference.tokens is None and role != "previous":
        raise ValueError("tokens: the reference has no token ids")
    batch, num_keys = reference.real_queries.shape[0], reference.num_keys
    ids = [[0] * num_keys] * batch if reference.tokens is None else reference.tokens.tolist()
    rank = reference.rank.tolist()

    def matches(b: int, i: int, j: int) -> bool:
        if role == "previous":
            return j == i - 1
        if role == "duplicate":
            return j < i and ids[b][j] == ids[b][i]
        # Its predecessor in the row is the one before it in its sequence, and is the query's token.
        return 0 < j <= i and 0 < rank[b][j] == rank[b][j - 1] + 1 and ids[b][j - 1] == ids[b][i]

    rows = reference.query_positions.tolist()
    pairs = torch.tensor([[[matches(b, i, j) for j in range(num_keys)] for i in rows] for b in range(batch)])
    return (reference.weights * pairs[:, None]).sum(-1)


STATISTICS = (
    Statistic(
        "previous_token", QUERY_DIMS, "probability", LENS,
        stream=_previous_token, textbook=lambda reference: _textbook(reference, "previous"),
        meaning="attention mass on the token before the query",
    ),
    Statistic(
        "duplicate_token", QUERY_DIMS, "probability", LENS, needs="tokens",
        stream=_duplicate_token, textbook=lambda reference: _textbook(reference, "duplicate"),
        meaning="attention mass on earlier copies of the query's token",
    ),
    Statistic(
        "induction", QUERY_DIMS, "probability", f"{LENS}; Olsson et al., arXiv 2209.11895", needs="tokens",
        stream=_induction, textbook=lambda reference: _textbook(reference, "induction"),
        meaning="attention mass on tokens that followed earlier copies of the query's token",
    ),
)  # fmt: skip
