"""How a streaming backend runs an attention call: what layers that make the same call share."""

from __future__ import annotations

from typing import NamedTuple

from llama_attn.backends._rules import AttentionCall, scoring
from llama_attn.backends.registry import Backend
from llama_attn.engines import choose_engine
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.sight import Share
from llama_attn.stats.visibility import Visibility


class Plan(NamedTuple):
    """How a streaming backend runs a call.

    Args:
        visibility: Who sees whom.
        scores: How scores are made.
        engine: Name of the engine.
        share: What is measured in its blocks; None for nothing.
    """

    visibility: Visibility
    scores: Scoring
    engine: str
    share: Share | None = None

    @classmethod
    def of(cls, call: AttentionCall, backend: Backend, visibility: Visibility) -> Plan:
        """How a call is run that nobody measures."""
        scores = scoring(call, visibility.num_keys)
        return cls(visibility, scores, choose_engine(backend.engine, visibility, scores, call.query.device))
