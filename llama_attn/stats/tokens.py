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
    columns = block.query_slots - 1 - block.first_key
    inside = (columns >= 0) & (columns < block.num_keys)
    columns = torch.where(inside, columns, 0).expand(*block.scale.shape)
    return block.exponentials.gather(-1, columns[..., None]).squeeze(-1) * inside * block.scale


def _earlier(block: Block) -> Bool[Tensor, "row key"]:
    return block.key_slots < block.query_slots[:, None]


def _duplicate_token(block: Block) -> Float[Tensor, "batch head row"]:
    same = block.tokens[:, None] == block.row_tokens[..., None]
    return block.mass(same & _earlier(block))


def _induction(block: Block) -> Float[Tensor, "batch head row"]:
    # A key whose predecessor is padding or of another sequence, or is not there, follows nothing.
    visibility, keys = block.visibility, block.key_slots
    predecessors = (keys - 1).clamp(min=0)
    is_there, tokens = visibility.real_keys[:, predecessors] & (keys > 0), block.tokens_at(predecessors)
    if (before := block.wanted.token_before) is not None:
        # The token in front of the first key, which the cache has dropped.
        is_there = torch.where(keys == 0, (before >= 0)[:, None], is_there)
        tokens = torch.where(keys == 0, before[:, None], tokens)
    follows = (visibility.rank[:, block.keys] > 0) & is_there
    matches = (tokens[:, None] == block.row_tokens[..., None]) & follows[:, None]
    return block.mass(matches & (keys <= block.query_slots[:, None]))


def _textbook(reference: Reference, role: str) -> Tensor:
    """Σ_j A_ij D_ij with D written out pair by pair from the definition."""
    if reference.tokens is None and role != "previous":
        raise ValueError("tokens: the reference has no token ids")
    batch, num_keys = reference.real_queries.shape[0], reference.num_keys
    ids = [[0] * num_keys] * batch if reference.tokens is None else reference.tokens.tolist()
    rank = reference.rank.tolist()
    before = [-1] * batch if reference.token_before is None else reference.token_before.tolist()

    def matches(b: int, i: int, j: int) -> bool:
        if role == "previous":
            return j == i - 1
        if role == "duplicate":
            return j < i and ids[b][j] == ids[b][i]
        # Its predecessor in the row is the one before it in its sequence, and is the query's token.
        if j == 0:
            return rank[b][0] > 0 and before[b] == ids[b][i]
        return 0 < j <= i and 0 < rank[b][j] == rank[b][j - 1] + 1 and ids[b][j - 1] == ids[b][i]

    rows = reference.query_slots.tolist()
    pairs = torch.tensor([[[matches(b, i, j) for j in range(num_keys)] for i in rows] for b in range(batch)])
    return (reference.weights * pairs[:, None]).sum(-1)


STATISTICS = (
    Statistic(
        "previous_token", QUERY_DIMS, "probability", LENS, of_distance=True,
        stream=_previous_token, textbook=lambda reference: _textbook(reference, "previous"),
        meaning="attention mass on the token before the query",
    ),
    Statistic(
        "duplicate_token", QUERY_DIMS, "probability", LENS, needs="tokens", of_distance=True,
        stream=_duplicate_token, textbook=lambda reference: _textbook(reference, "duplicate"),
        meaning="attention mass on earlier copies of the query's token",
    ),
    Statistic(
        "induction", QUERY_DIMS, "probability", f"{LENS}; Olsson et al., arXiv 2209.11895", needs="tokens",
        of_distance=True, stream=_induction, textbook=lambda reference: _textbook(reference, "induction"),
        meaning="attention mass on tokens that followed earlier copies of the query's token",
    ),
)  # fmt: skip
