"""The check of a statistic: its streaming form against its textbook form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from llama_attn.engines import torch as engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Counts
from llama_attn.stats.labelling import finished, mark_padding
from llama_attn.stats.norms import measured_norm
from llama_attn.stats.table import Statistic
from llama_attn.testing.comparing import largest_error, relative_error
from llama_attn.testing.inputs import FEATURES, SITUATIONS, make_inputs

MEASURED: tuple[dict[str, Any], ...] = (
    *SITUATIONS,
    *FEATURES["bidirectional"],
    *FEATURES["window"],
    {"queries": 31, "padding": "left", "stride": 3},
)
"""What a statistic meets: `SITUATIONS`, and windows, both directions, every third query."""


def assert_statistic_matches(statistic: Statistic, *, bound: float = torch.finfo(torch.float64).eps ** 0.5) -> None:
    """Check the streaming form of a statistic against its textbook form, in all of `MEASURED`, in float64.

    These are `SITUATIONS`, as `assert_matches_reference` lists them, and besides: windows of 7 keys with padding and
    with a cache, attention in both directions with padding and without, and every third query with padding.
    The streaming form works in blocks of a few queries, as at long context; the textbook form sees whole matrices.
    Random tokens and segments are there for those that need them.

    Args:
        statistic: It need not be registered.
        bound: Largest allowed |a − b| / (1 + |b|); by default half of the digits of float64, which another definition
            does not meet by chance. Integer statistics must be equal.

    Raises:
        AssertionError: The forms differ; the message says in which situation, by how much, and where.
        ValueError: The streaming form or ``finish`` returns other axes than ``dims`` says, or another type.
    """
    for situation in MEASURED:
        streamed, expected = _both_forms(statistic, **situation)
        named = f"{statistic.name!r} in {situation}"
        if expected.ndim != len(statistic.dims):
            raise AssertionError(
                f"{named}: expected the textbook form to have the axes {statistic.dims[1:]}, got {tuple(expected.shape[1:])}"
            )
        try:
            error, where = largest_error(streamed[0], expected[0], statistic.dims[1:])
        except AssertionError as difference:
            raise AssertionError(f"{named}: {difference}") from None
        allowed = bound if statistic.dtype is None else 0
        if error > allowed:
            why = ""
            if "padding" in situation:
                streamed, expected = _both_forms(statistic, **situation, only_real=True)
                if torch.equal(streamed.isnan(), expected.isnan()) and relative_error(streamed, expected) <= allowed:
                    hint = "leave them out of the textbook form with reference.real_queries"
                    why = f"; the difference is of padded rows: {hint}"
            off = f"the streaming form is off by {error:.2e}, above {allowed:.2e}, most at {where}"
            raise AssertionError(f"{named}: {off}{why}")


def _both_forms(
    statistic: Statistic,
    *,
    stride: int = 1,
    only_real: bool = False,
    **situation: Any,
) -> tuple[Tensor, Tensor]:
    """A statistic of one layer by its streaming and by its textbook form, (1, …), padding marked.

    With ``only_real``, queries that are padding have no weights in the textbook form either.
    """
    inputs = make_inputs(**situation, dtype=torch.float64)
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
    hidden = torch.randn(batch, num_queries, 2 * channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(2 * channels, heads * channels, generator=generator, dtype=torch.float64)
    reference, visibility = inputs.reference(config), inputs.visibility.measured(stride=stride)
    positions = reference.query_slots
    rows = positions % stride == 0
    reference = replace(
        reference, query=reference.query[:, :, rows], visible=reference.visible[:, :, rows],
        real_queries=reference.real_queries[:, rows], query_slots=positions[rows],
        segments=segments, tokens=tokens, keep=config.keep[0], hidden=hidden[:, rows], output_weight=weight,
    )  # fmt: skip
    if only_real:
        reference = replace(reference, visible=reference.visible & reference.real_queries[:, None, :, None])
    wanted = Wanted([statistic], config, segments, 3, tokens, keep=config.keep[0])
    if statistic.observes == "block":
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
    forms = (streamed.clone(), statistic.textbook(reference)[None].clone())
    if any(form.ndim != len(statistic.dims) for form in forms):
        return forms
    return mark_padding(statistic, forms[0], counts), mark_padding(statistic, forms[1], counts)
