"""How the scores of an attention call are made, besides who sees whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scoring:
    """S = c tanh(scale · q kᵀ / c) + position_bias + additive mask, then a softmax over the keys and the sink.

    Args:
        scale: What scores are multiplied with, 1 / √channel in most models.
        softcap: Largest score c before biases [logit] (Gemma 2, arXiv 2408.00118); ``None`` for no limit.
        position_bias: Added to the scores behind the soft-cap, (1 or batch, 1 or head, query, key) [logit], as in T5;
            its queries are the measured ones.
        sinks: Score of one more outcome that has no key and no value, for each head [logit] (gpt-oss,
            arXiv 2508.10925); it is never masked and never scaled.

    Raises:
        ValueError: A number or a tensor that cannot be this.
    """

    scale: float
    softcap: float | None = None
    position_bias: Float[Tensor, "_ _ query key"] | None = None
    sinks: Float[Tensor, " head"] | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not math.isfinite(self.scale):
            raise ValueError(f"scale: expected a finite number, got {self.scale}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap: expected None or a number above 0, got {self.softcap}")
        for name, tensor, dims in (("position_bias", self.position_bias, 4), ("sinks", self.sinks, 1)):
            if tensor is not None and (tensor.ndim != dims or not tensor.is_floating_point()):
                raise ValueError(
                    f"{name}: expected floats with {dims} dimensions, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )

    @property
    def plain(self) -> bool:
        """Whether scores are products times a number, and nothing else."""
        return self.softcap is None and self.position_bias is None and self.sinks is None

    def to(self, device: torch.device | str | int) -> Scoring:
        """The same, with its tensors on ``device``."""
        bias, sinks = (None if tensor is None else tensor.to(device) for tensor in (self.position_bias, self.sinks))
        return replace(self, position_bias=bias, sinks=sinks)

    def detach(self) -> Scoring:
        """The same, of which nothing is learned."""
        bias, sinks = (None if tensor is None else tensor.detach() for tensor in (self.position_bias, self.sinks))
        return replace(self, position_bias=bias, sinks=sinks)

    def of_heads(self, heads: Sequence[int]) -> Scoring:
        """The same, for some query heads only."""
        bias, sinks = self.position_bias, self.sinks
        if bias is not None and bias.shape[1] > 1:
            bias = bias[:, list(heads)]
        return replace(self, position_bias=bias, sinks=None if sinks is None else sinks[list(heads)])

    def of_queries(self, queries: slice | Tensor) -> Scoring:
        """The same, for some queries of the call only, counted from its first."""
        bias = self.position_bias
        return self if bias is None else replace(self, position_bias=bias[:, :, queries])
