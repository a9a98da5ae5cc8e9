"""The place of one forward in a run of several, and what is known of its tokens because of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.keep import Keep, with_later
from llama_attn.stats.segments import add_generated
from llama_attn.stats.visibility import Visibility


@dataclass(frozen=True, eq=False)
class Step:
    """The place of one forward in a run of several.

    Args:
        first: Queries and keys before this position have been measured [token].
        rows: Rows of the batch that are still being generated; None for all.
        prompt: Length of the prompt, whose segments are known [token]; None if the whole row is the prompt.
        tokens: Token ids of the row, (batch, key), or those of this forward; None if they are not known.
        earlier_tokens: Token ids of what came before, if this forward goes on with it.
    """

    first: int = 0
    rows: Tensor | None = None
    prompt: int | None = None
    tokens: Tensor | None = None
    earlier_tokens: Tensor | None = None

    def known_tokens(self, visibility: Visibility) -> Tensor | None:
        """Token ids of the whole row, (batch, token); those of keys that come from a cache may not be known."""
        now, before, length = self.tokens, self.earlier_tokens, visibility.length
        if now is None or not visibility.aligned:
            return None
        if before is not None and now.shape[1] < length == now.shape[1] + before.shape[1]:
            now = torch.cat([before.to(now.device), now], dim=1)
        now = now[:, :length]
        return now if tuple(now.shape) == (visibility.batch, length) else None

    def segments(
        self, config: AttentionStatsConfig, visibility: Visibility
    ) -> tuple[Tensor | None, tuple[str, ...] | None]:
        """Segment of every key, (batch, key), and their names; None if none were given.

        Raises:
            ValueError: They are of another shape than the prompt.
        """
        prompt, length = self._described(config.labelled, visibility), visibility.offset + visibility.num_keys
        segments, names = config.segments_of((visibility.batch, prompt), visibility.device)
        if segments is None or names is None:
            return None, None
        if self.prompt is not None or prompt < length:
            segments, names = add_generated(segments, names, length)
        return segments[:, visibility.offset :], names

    def keep(self, config: AttentionStatsConfig, visibility: Visibility) -> Keep | None:
        """Which keys are kept, (layer or 1, batch, kv_head or 1, key); None if nobody asked.

        Raises:
            ValueError: The mask is of another shape than the prompt.
        """
        keep = config.kept
        if keep is None:
            return None
        prompt = self._described(keep.shape[-1], visibility)
        if (keep.shape[1], keep.shape[3]) != (visibility.batch, prompt):
            raise ValueError(
                f"keep: expected batch {visibility.batch} and {prompt} keys, got batch {keep.shape[1]} and "
                f"{keep.shape[3]} keys"
            )
        keep = with_later(keep, visibility.offset + visibility.num_keys)
        return keep[..., visibility.offset :].to(visibility.device)

    def _described(self, given: int | None, visibility: Visibility) -> int:
        """How many tokens of the row a user has to describe, who has described ``given``."""
        if self.prompt is not None:
            return self.prompt
        # A forward that goes on from a cache may have more tokens than were described.
        length = visibility.offset + visibility.num_keys
        goes_on = visibility.first_query + visibility.offset > 0
        return min(length, given or length) if goes_on else length


def token_before(tokens: Tensor, visibility: Visibility) -> Tensor | None:
    """Token id in front of the first slot, (batch,); None if there is none, −1 for padding."""
    if not visibility.offset:
        return None
    before = tokens[:, visibility.offset - 1].to(visibility.device)
    return before if visibility.dropped is None else torch.where(visibility.dropped > 0, before, -1)
