"""The check of a statistic: its streaming form against its textbook form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from llama_attn.engines import torch as engine
from llama_attn.stats.block import HIDDEN_SCORE, Wanted
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Counts
from llama_attn.stats.extents import check_returned
from llama_attn.stats.labelling import finished, mark_padding
from llama_attn.stats.norms import measured_norm
from llama_attn.stats.table import Statistic
from llama_attn.testing.comparing import largest_error, relative_error
from llama_attn.testing.inputs import FEATURES, SITUATIONS, make_inputs

MEASURED: tuple[dict[str, Any], ...] = (
    *SITUATIONS,
    *(situation for situations in FEATURES.values() for situation in situations),
    {"queries": 31, "padding": "left", "stride": 3},
    {"queries": 6, "cached": 15, "window": 7, "dropped": 9},
)
"""What a statistic meets: `SITUATIONS` and those of all `FEATURES`, every third query, and a cache that has dropped keys."""


def assert_statistic_matches(statistic: Statistic, *, bound: float = torch.finfo(torch.float64).eps ** 0.5) -> None:
    """Check the streaming form of a statistic against its textbook form, in all of `MEASURED`, in float64.

    These are `SITUATIONS` and those of a soft-cap, learned sinks, both directions and a window, as
    `assert_matches_reference` lists them, and besides: a window of 7 keys with a cache that has dropped the 9 keys before,
    and every third query with padding. Weights of a query that has a learned sink add up to less than 1.
    The streaming form works in blocks of a few queries, as at long context; the textbook form sees whole matrices.
    Random tokens, segments and kept keys are there for the streaming form that needs them. It also runs once in float32, of
    which only the type is looked at. There is no cross-attention.

    Args:
        statistic: It need not be registered.
        bound: Largest allowed |a − b| / (1 + |b|); by default half of the digits of float64, which another definition
            does not meet by chance. Integer statistics must be equal.

    Raises:
        AssertionError: The forms differ; the message says in which situation, by how much, and where.
        ValueError: The streaming form or ``finish`` returns other axes than ``dims`` says, or another type; the textbook form
            other axes, or no real numbers, of whatever type; or the streaming form takes something of the block that it
            does not say that it needs. A note says in which situation, as of everything else that the forms raise.
    """
    for situation in MEASURED:
        named = f"{statistic.name!r} in {situation}"
        streamed, expected = _noted(statistic, **situation)
        allowed, why = bound if statistic.dtype is None else 0, None
        try:
            error, where = largest_error(streamed[0], expected[0], statistic.dims[1:])
        except AssertionError as difference:
            why = str(difference)
        else:
            if error > allowed:
                why = f"the streaming form is off by {error:.2e}, above {allowed:.2e}, most at {where}"
        if why is not None:
            raise AssertionError(f"{named}: {why}{_hint(statistic, streamed, expected, allowed, situation)}")
    # A type of its own, which float64 hides.
    _noted(statistic, dtype=torch.float32, **MEASURED[1])


def _hint(statistic: Statistic, streamed: Tensor, expected: Tensor, allowed: float, situation: dict[str, Any]) -> str:
    """What the difference comes from, if it is one that many make."""
    # No score of the inputs comes near the square root; means and differences of hidden ones stay far above it.
    if bool(_beyond(streamed).any() and not _beyond(expected).any()):
        return "; the logits of hidden keys mean nothing: use block.visible in the streaming form"
    if "padding" in situation:
        streamed, expected = _both_forms(statistic, **situation, only_real=True)
        if torch.equal(streamed.isnan(), expected.isnan()) and relative_error(streamed, expected) <= allowed:
            hint = "leave them out of the textbook form with reference.real_queries"
            return f"; the difference is of padded rows: {hint}"
    return ""


def _beyond(numbers: Tensor) -> Tensor:
    return numbers.isfinite() & (numbers.abs() > abs(HIDDEN_SCORE) ** 0.5)


def _noted(statistic: Statistic, **situation: Any) -> tuple[Tensor, Tensor]:
    """`_both_forms`; what they raise says in which situation."""
    try:
        return _both_forms(statistic, **situation)
    except Exception as error:
        error.add_note(f"{statistic.name!r} in {situation}")
        raise


def _both_forms(
    statistic: Statistic,
    *,
    stride: int = 1,
    dropped: int = 0,
    only_real: bool = False,
    dtype: torch.dtype = torch.float64,
    **situation: Any,
) -> tuple[Tensor, Tensor]:
    """A statistic of one layer by its streaming and by its textbook form, (1, …), padding marked.

    Every ``stride``-th query counts, behind a cache that has ``dropped`` so many keys. With ``only_real``, queries that are
    padding have no weights in the textbook form either.
    """
    inputs = make_inputs(**situation, dtype=dtype)
    batch, heads, num_queries, channels = inputs.query.shape
    num_keys = inputs.key.shape[2]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, (batch, num_keys), generator=generator)
    segments = torch.randint(-1, 3, (batch, num_keys), generator=generator)
    segments[0, 0] = 2
    config = AttentionStatsConfig(
        sink_tokens=2, window=4, top_k=3, map_size=8, query_stride=stride, segments=segments, rows=slice(None),
        keep=torch.rand(1, *inputs.key.shape[:3], generator=generator) < torch.arange(num_keys).eq(0) + 0.5,
    )  # fmt: skip
    hidden = torch.randn(batch, num_queries, 2 * channels, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(2 * channels, heads * channels, generator=generator, dtype=torch.float64).to(dtype)
    before = torch.randint(5, (batch,), generator=generator) if dropped else None
    whole = replace(inputs.visibility, offset=dropped)
    reference, visibility = inputs.reference(config), whole.measured(stride=stride)
    slots = reference.query_slots
    rows = (slots + dropped) % stride == 0
    reference = replace(
        reference, query=reference.query[:, :, rows], visible=reference.visible[:, :, rows],
        real_queries=reference.real_queries[:, rows], query_slots=slots[rows], rank=reference.rank + dropped,
        offset=dropped, segments=segments, tokens=tokens, token_before=before, keep=config.keep[0],
        hidden=hidden[:, rows], output_weight=weight,
    )  # fmt: skip
    if only_real:
        reference = replace(reference, visible=reference.visible & reference.real_queries[:, None, :, None])
    if statistic.observes == "block":
        given: dict[str, dict[str, Any]] = {
            "segments": {"segments": segments, "num_segments": 3},
            "tokens": {"tokens": tokens, "token_before": before},
            "keep": {"keep": config.keep[0]},
        }
        # No more than a model gives it for certain.
        told = {name: value for need in statistic.needed for name, value in given.get(need, {}).items()}
        wanted = Wanted([statistic], config, **told)
        arguments = (inputs.query[:, :, rows], inputs.key, None, visibility, inputs.scoring, wanted)
        streamed = engine.walk(*arguments, block_rows=5).raw[statistic.name]
    else:
        by_head = rearrange(weight, "hidden (head channel) -> head hidden channel", head=heads)
        observed: dict[str, tuple[Any, ...]] = {
            "key": (inputs.key,),
            "value": (inputs.value,),
            "value_output": (inputs.value, by_head),
            "hidden": (hidden[:, rows],),
            "hidden_real": (hidden[:, rows], visibility.real_queries),
        }
        streamed = measured_norm(statistic, config, *observed[statistic.observes])
    counts = Counts.of(visibility)
    streamed = finished(statistic, streamed[None], counts, config)
    axes = dict(zip(statistic.dims[1:], streamed.shape[1:], strict=True))
    expected = _numbers(statistic, statistic.textbook(reference), axes)
    return mark_padding(statistic, streamed.clone(), counts), mark_padding(statistic, expected[None].clone(), counts)


def _numbers(statistic: Statistic, returned: object, axes: dict[str, int]) -> Tensor:
    """What the textbook form returned, in float64: whole numbers and truth mean the same, and have room for NaN."""
    if isinstance(returned, Tensor) and not returned.is_complex():
        returned = returned.double()
    return check_returned(replace(statistic, dtype=None), "textbook form", returned, axes, torch.float64)
