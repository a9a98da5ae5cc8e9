"""Who sees whom in one attention call: the mask as it arrived, read by the rule of the backend that ran.

Every backend file has a function ``sees(call) -> Visibility`` made of these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llama_attn.backends._masks import MaskRequest
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.visibility import Visibility


@dataclass(eq=False, slots=True)
class AttentionCall:
    """What an attention function was called with.

    Args:
        module: The attention layer.
        query: Queries, (batch, head, query, channel).
        key: Keys as they were attended to, (batch, kv_head, key, channel).
        value: Values, (batch, kv_head, key, value_channel).
        mask: The mask as it arrived, whatever it is.
        options: The other keyword arguments.
        request: The call of a mask function that made ``mask``, if one did.
        cross: Whether the keys are of another sequence than the queries.
        sight: Who sees whom, where that is known already, as in the operators of a compiled graph.
        decides: What `is_decoder` is there.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    request: MaskRequest | None = None
    cross: bool = False
    sight: Visibility | None = None
    decides: bool | None = None

    @property
    def num_queries(self) -> int:
        """Queries of the call."""
        return self.query.shape[2]

    @property
    def num_slots(self) -> int:
        """Slots of keys, filled or not."""
        return self.key.shape[2]

    @property
    def is_causal(self) -> bool:
        """What the call says of a missing mask, else what its layer does."""
        asked = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if asked is None else asked)

    @property
    def is_decoder(self) -> bool:
        """Whether no query is meant to see later keys, as far as the call shows; for a choice among stacks."""
        if self.cross or self.decides is not None:
            return bool(self.decides) and not self.cross
        if self.request is not None:
            return self.request.is_causal
        # Layers that say nothing of it may well be an encoder's.
        return bool(self.options.get("is_causal", getattr(self.module, "is_causal", False)))


def everything(call: AttentionCall) -> Visibility:
    """Every query sees every key; one query alone, where a mask would be causal, is the last token."""
    batch, num_queries, num_keys, device = call.query.shape[0], call.num_queries, call.num_slots, call.key.device
    if call.cross or num_queries > num_keys:
        return Visibility(batch, 0, num_keys, device, causal=False, stop_query=num_queries, aligned=False)
    placed = _placed(call)
    return Visibility(
        batch, num_keys - num_queries, num_keys, device, causal=num_queries == 1 and call.is_causal,
        offset=placed.key_offset if placed else 0,
    )  # fmt: skip


def without_mask(call: AttentionCall) -> Visibility:
    """PyTorch's rule: causal from the upper left if there are several queries and the call or its layer says so."""
    if call.num_queries == 1 or not call.is_causal:
        return everything(call)
    # Keys behind the last query are cut off, as those of a static cache are that is not full.
    num_keys = min(call.num_queries, call.num_slots)
    if not call.cross and num_keys == call.num_queries:
        return Visibility(call.query.shape[0], 0, num_keys, call.key.device)
    stop = torch.arange(1, call.num_queries + 1, device=call.key.device).clamp(max=num_keys)[None].int()
    return Visibility(
        call.query.shape[0], 0, num_keys, call.key.device, causal=False, stop_key=stop, stop_query=call.num_queries,
        aligned=False,
    )  # fmt: skip


def by_request(call: AttentionCall) -> Visibility | None:
    """What the arguments say with which the mask was asked for; None if they are not known or do not fit."""
    request = call.request
    if request is None or not request.fits(call.num_queries, call.num_slots) or request.batch != call.query.shape[0]:
        return None
    mask = call.mask if isinstance(call.mask, Tensor) and call.mask.ndim == 4 else None
    return request.visibility(call.key.device, aligned=not call.cross, mask=mask)


def by_mask(call: AttentionCall) -> Visibility:
    """What a 4-D mask shows that arrived from wherever, read block by block.

    Raises:
        ValueError: It is no such mask.
    """
    if (visibility := by_request(call)) is not None:
        return visibility
    mask = call.mask
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected a tensor (batch, head or 1, query, key) at {type(call.module).__name__}, got {what}"
        )
    fits = all(size in (1, needed) for size, needed in zip(mask.shape[:3], call.query.shape[:3], strict=True))
    if not fits or mask.shape[3] not in (1, call.num_slots):
        raise ValueError(
            f"attention_mask: expected (batch={call.query.shape[0]}, heads or 1, queries={call.num_queries}, "
            f"keys={call.num_slots}), got {tuple(mask.shape)}"
        )
    num_keys = call.num_slots if call.cross else _filled(call, mask)
    mask = mask.expand(-1, -1, call.num_queries, call.num_slots)[..., :num_keys]
    aligned = not call.cross and call.num_queries <= num_keys
    visibility = Visibility.of_mask(mask, batch=call.query.shape[0], device=call.key.device, aligned=aligned)
    return replace(visibility, causal=True) if aligned and _hides_what_comes_later(visibility) else visibility


def _hides_what_comes_later(visibility: Visibility) -> bool:
    """Whether no query sees a later key, looked at block by block."""
    if torch.compiler.is_compiling():
        return False
    positions = visibility.query_slots
    for start in range(0, visibility.num_queries, 256):
        rows = range(start, min(start + 256, visibility.num_queries))
        first, stop = visibility.span_of(rows)
        later = torch.arange(first, stop, device=visibility.device) > positions[rows.start : rows.stop, None]
        if bool((visibility.visible(rows) & later).any()):
            return False
    return True


def by_mask_function(call: AttentionCall, function: Callable[..., Tensor]) -> Visibility:
    """What a function of indices says, which a block mask was made of."""
    batch, heads, device = call.query.shape[0], call.query.shape[1], call.key.device
    row, head, query, key = (
        torch.arange(size, device=device).view([-1 if axis == at else 1 for axis in range(4)])
        for at, size in enumerate((batch, heads, call.num_queries, call.num_slots))
    )
    mask = function(row, head, query, key).broadcast_to(batch, -1, call.num_queries, call.num_slots)
    return by_mask(replace(call, mask=mask))


def by_vector(call: AttentionCall) -> Visibility:
    """FlashAttention's rule: aligned at the end, with a vector of real keys, documents and a window of the call's.

    Raises:
        ValueError: A static cache, whose empty slots it does not hide.
    """
    num_queries, num_keys, options = call.num_queries, call.num_slots, call.options
    batch, device, mask = call.query.shape[0], call.key.device, call.mask
    if (mask is not None and (mask.ndim != 2 or mask.shape[1] != num_keys)) or _has_empty_slots(call):
        raise ValueError(
            "past_key_values: FlashAttention has no mask that hides the unfilled slots of a static cache, so "
            "there is no attention to measure; use a DynamicCache, or another attn_implementation"
        )
    position = torch.arange(num_keys - num_queries, num_keys, device=device)[None]
    first = stop = None
    if (window := options.get("sliding_window")) is not None and num_keys > window:
        first = (position - window + 1).int()
        stop = None if call.is_causal else (position + window).int()
    placed = _placed(call)
    return Visibility(
        batch, num_keys - num_queries, num_keys, device, causal=call.is_causal and not call.cross,
        real=None if mask is None or bool(mask.all()) else mask.bool(), sequence=_documents(call),
        first_key=first, stop_key=stop, offset=placed.key_offset if placed else 0, aligned=not call.cross,
    )  # fmt: skip


def _documents(call: AttentionCall) -> Tensor | None:
    """Packed sequence of every key, as FlashAttention takes it from what it was given."""
    if call.mask is not None or call.num_queries != call.num_slots or call.query.shape[0] != 1:
        return None
    lengths, positions = call.options.get("cu_seq_lens_k"), call.options.get("position_ids")
    if lengths is not None:
        slots = torch.arange(call.num_slots, device=call.key.device)
        return torch.bucketize(slots, lengths.to(slots)[1:], right=True)[None]
    if positions is None or positions.ndim != 2:
        return None
    sequence = torch.nn.functional.pad((positions.diff(dim=-1) != 1).long().cumsum(-1), (1, 0))
    return sequence if bool(sequence.any()) else None


def _has_empty_slots(call: AttentionCall) -> bool:
    placed = _placed(call)
    return placed is not None and not call.cross and placed.filled < call.num_slots


def _placed(call: AttentionCall) -> MaskRequest | None:
    """The request, if it says where the queries and keys of the call stand."""
    request = call.request
    return request if request is not None and request.fits(call.num_queries, call.num_slots) else None


def _filled(call: AttentionCall, mask: Tensor) -> int:
    """Slots that hold a token: those at the end of a static cache that nobody sees and nothing was written to do not."""
    if call.num_slots <= call.num_queries or torch.compiler.is_compiling():
        return call.num_slots
    written = (call.key != 0).any(-1).any(1).any(0) | (call.value != 0).any(-1).any(1).any(0)
    last = int(written.nonzero().max()) + 1 if bool(written.any()) else call.num_slots
    hidden = mask.expand(-1, -1, -1, call.num_slots)[..., last:]
    unseen = ~hidden if hidden.dtype == torch.bool else hidden < 0
    return max(last, call.num_queries) if bool(unseen.all()) else call.num_slots


def scoring(call: AttentionCall, num_keys: int, ignores: Collection[str] = ()) -> Scoring:
    """How the scores of the call are made.

    Args:
        call: The call.
        num_keys: Filled slots.
        ignores: Arguments that the backend knows nothing of.
    """
    options = {name: value for name, value in call.options.items() if name not in ignores} if ignores else call.options
    scale, softcap, (bias, sinks) = options.get("scaling"), options.get("softcap"), _own_scores(options)
    if scale is None:
        scale = call.query.shape[-1] ** -0.5
    if bias is None and sinks is None and softcap is None and not torch.compiler.is_compiling():
        return _plain(float(scale))
    return Scoring(
        scale=scale,
        softcap=softcap,
        position_bias=None if bias is None else bias[..., :num_keys],
        sinks=sinks,
    )


def _own_scores(options: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """A position bias, and learned sinks under either of their names."""
    sinks = options.get("s_aux")
    return options.get("position_bias"), options.get("sinks") if sinks is None else sinks


def has_own_scores(options: Mapping[str, Any]) -> bool:
    """Whether a layer has a part in the scores that no other may share."""
    bias, sinks = _own_scores(options)
    return bias is not None or sinks is not None


def is_paged(options: Mapping[str, Any]) -> bool:
    """Whether a call hands over new keys alone, and the others are in the cache of continuous batching."""
    # Other caches may come by the same name, of which the keys already are.
    if type(options.get("cache")).__name__ == "PagedAttentionCache":
        return True
    return options.get("read_index") is not None or options.get("block_table") is not None


def unknown_ways(options: Mapping[str, Any]) -> list[str]:
    """Arguments in which a layer says who sees whom to backends that it does not know, or holds back keys."""
    return [name for name in ("indices", "block_indices") if options.get(name) is not None]


@cache
def _plain(scale: float) -> Scoring:
    """The scoring of most layers, made once."""
    return Scoring(scale)
