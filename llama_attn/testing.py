"""Checks for attention backends and statistics, also for those written elsewhere.

Examples:
    >>> from llama_attn import register_backend, register_statistic
    >>> from llama_attn.testing import assert_matches_reference, assert_statistic_matches
    >>> register_backend("mine", my_attention)
    >>> assert_matches_reference("mine")
    >>> assert_statistic_matches(register_statistic(my_statistic))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from llama_attn.backends.registry import attention_function, get_backend
from llama_attn.engines import torch as engine
from llama_attn.stats.block import Wanted
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Counts
from llama_attn.stats.labelling import finished, mark_padding
from llama_attn.stats.norms import measured_norm
from llama_attn.stats.reference import Reference
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.table import Statistic
from llama_attn.stats.visibility import Visibility

Padding = Literal["none", "left", "right"]
"""Where rows that are shorter are filled."""

# What attention meets, as arguments of `make_inputs`: odd sizes, groups of 1, 2, 3 and 4 heads, padding on both sides,
# and a cache that is already filled.
SITUATIONS: tuple[dict[str, Any], ...] = (
    {"queries": 1},
    {"queries": 7, "heads": 4, "kv_heads": 4},
    {"queries": 63, "heads": 4, "kv_heads": 2},
    {"queries": 130, "heads": 9, "kv_heads": 3, "batch": 1},
    {"queries": 33, "heads": 4, "kv_heads": 1, "padding": "left"},
    {"queries": 33, "padding": "right"},
    {"queries": 1, "cached": 20},
    {"queries": 5, "cached": 12, "padding": "left"},
    {"queries": 17, "head_dim": 24},
)

# Besides these, what a statistic meets and a backend of one's own does not: windows, both directions, every third query.
MEASURED: tuple[dict[str, Any], ...] = (
    *SITUATIONS,
    {"queries": 33, "padding": "left", "window": 7},
    {"queries": 6, "cached": 15, "window": 7},
    {"queries": 23, "padding": "right", "bidirectional": True},
    {"queries": 31, "padding": "left", "stride": 3},
)


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Tensors as they reach an attention function, and what they mean.

    Args:
        query: (batch, head, query, channel).
        key: (batch, kv_head, key, channel).
        value: (batch, kv_head, key, channel).
        attention_mask: (batch, key), 1 for real tokens; None without padding.
        cached: How many of the keys come from a cache.
        scaling: What scores are multiplied with.
    """

    query: Float[Tensor, "batch head query channel"]
    key: Float[Tensor, "batch kv_head key channel"]
    value: Float[Tensor, "batch kv_head key channel"]
    attention_mask: Int[Tensor, "batch key"] | None
    cached: int
    scaling: float

    @property
    def real_keys(self) -> Bool[Tensor, "batch key"]:
        """Whether each key is a real token."""
        if self.attention_mask is None:
            return torch.ones(self.key.shape[0], self.key.shape[2], dtype=torch.bool)
        return self.attention_mask.bool().cpu()

    @property
    def scoring(self) -> Scoring:
        """How their scores are made, in the form that llama_attn's engines take."""
        return Scoring(self.scaling)

    @property
    def visibility(self) -> Visibility:
        """The same in the form that llama_attn's engines take."""
        real = None if self.attention_mask is None else self.attention_mask.bool()
        return Visibility(self.query.shape[0], self.cached, self.key.shape[2], self.query.device, real=real)

    def reference(self, config: AttentionStatsConfig | None = None) -> Reference:
        """Attention over these inputs written out in float64 on the CPU."""
        real = self.real_keys
        positions = torch.arange(self.cached, self.key.shape[2])
        causal = torch.arange(self.key.shape[2]) <= positions[:, None]
        config = config or AttentionStatsConfig()
        rank = torch.where(real, real.long().cumsum(-1) - 1, config.sink_tokens)
        return Reference(
            query=self.query.double().cpu(),
            key=self.key.double().cpu(),
            value=self.value.double().cpu(),
            scaling=self.scaling,
            visible=(causal & real[:, None])[:, None],
            real_queries=real[:, self.cached :],
            rank=rank,
            query_positions=positions,
            config=config,
        )


def make_inputs(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 7,
    cached: int = 0,
    head_dim: int = 16,
    padding: Padding = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Random attention inputs whose scores are spread as widely as those of a trained model.

    Args:
        batch: Rows. With padding, the first row has it and the others do not.
        heads: Query heads.
        kv_heads: Key and value heads; must divide ``heads``.
        queries: Tokens of this call.
        cached: Tokens before them.
        head_dim: Channels per head.
        padding: On which side the first row is padded, by a third of its length.
        dtype: Of query, key and value.
        device: Where.
        seed: Of the random numbers.

    Raises:
        ValueError: ``kv_heads`` does not divide ``heads``, or ``padding`` is unknown.
    """
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
    if padding not in ("none", "left", "right"):
        raise ValueError(f'padding: expected "none", "left" or "right", got {padding!r}')
    generator = torch.Generator().manual_seed(seed)
    keys = cached + queries

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    mask = None
    if padding != "none":
        mask = torch.ones(batch, keys, dtype=torch.long)
        mask[0, slice(0, keys // 3) if padding == "left" else slice(keys - keys // 3, keys)] = 0
    return AttentionInputs(
        query=2 * draw(batch, heads, queries, head_dim),
        key=draw(batch, kv_heads, keys, head_dim),
        value=draw(batch, kv_heads, keys, head_dim),
        attention_mask=None if mask is None else mask.to(device),
        cached=cached,
        scaling=head_dim**-0.5,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |a − b| / (1 + |b|), the measure of the error budget.

    Raises:
        AssertionError: The shapes differ, or one is NaN or infinite where the other is not.
    """
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    finite = actual.isfinite() & expected.isfinite()
    if bool((differs := ~finite & (actual != expected) & ~(actual.isnan() & expected.isnan())).any()):
        at = differs.nonzero()[0].tolist()
        raise AssertionError(f"not finite on one side only, first at {at}: expected {expected[*at]}, got {actual[*at]}")
    errors = ((actual - expected).abs() / (1 + expected.abs())).nan_to_num(0.0)
    return float(errors.max()) if errors.numel() else 0.0


def assert_matches_reference(
    backend: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", bound: float | None = None
) -> None:
    """Check the output of a registered backend against float64, masks included, in all of `SITUATIONS`.

    These are: 1 query alone and behind a cache of 20 keys; 5, 7, 17, 33, 63 and 130 queries; groups of 1, 2, 3 and 4 query
    heads per KV head; padding on the left and on the right, and on the left with a cache of 12 keys; 16 and 24 channels.
    Only real queries are compared: what a backend returns for padding is its own affair.

    Args:
        backend: Its name.
        dtype: Of query, key and value.
        device: Where to run it.
        bound: Largest allowed |a − b| / (1 + |b|); by default twice the error that transformers' eager attention
            makes on the same inputs, plus four roundings.

    Raises:
        AssertionError: It is wrong; the message says in which situation and by how much.
        ValueError: There is no such backend.
        ImportError: It does not run here.
    """
    get_backend(backend)
    for situation in SITUATIONS:
        inputs = make_inputs(**situation, dtype=dtype, device=device)
        real = inputs.real_keys[:, inputs.cached :]
        expected = inputs.reference().output.transpose(1, 2)
        output = _run(backend, inputs)
        if (output.shape, output.dtype) != (expected.shape, dtype):
            raise AssertionError(
                f"{backend!r} in {situation}: expected output (batch, query, head, channel) = {tuple(expected.shape)} of "
                f"{dtype}, got {tuple(output.shape)} of {output.dtype}"
            )
        allowed = bound
        if allowed is None:
            eager = relative_error(_run("eager", inputs)[real], expected[real])
            allowed = 2 * eager + 4 * torch.finfo(dtype).eps
        try:
            error = relative_error(output[real], expected[real])
        except AssertionError as difference:
            raise AssertionError(f"{backend!r} in {situation}: {difference}") from None
        if not error <= allowed:
            raise AssertionError(
                f"{backend!r} in {situation}: error {error:.2e} is above {allowed:.2e}"
                f"{_kind_of_error(inputs, output, allowed)}"
            )


def assert_statistic_matches(statistic: Statistic, *, bound: float = torch.finfo(torch.float64).eps ** 0.5) -> None:
    """Check the streaming form of a statistic against its textbook form, in all of `MEASURED`, in float64.

    These are `SITUATIONS`, as `assert_matches_reference` lists them, and besides: windows of 7 keys with padding and
    with a cache, attention in both directions with padding, and every third query with padding.
    The streaming form works in blocks of a few queries, as at long context; the textbook form sees whole matrices.
    Random tokens and segments are there for those that need them.

    Args:
        statistic: It need not be registered.
        bound: Largest allowed |a − b| / (1 + |b|); by default half of the digits of float64, which another definition
            does not meet by chance. Integer statistics must be equal.

    Raises:
        AssertionError: The forms differ; the message says in which situation, and by how much.
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
            error = relative_error(streamed, expected)
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
            raise AssertionError(f"{named}: the streaming form is off by {error:.2e}, above {bound:.2e}{why}")


def _both_forms(
    statistic: Statistic,
    *,
    window: int | None = None,
    bidirectional: bool = False,
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
    reference, visibility = inputs.reference(config), replace(inputs.visibility, causal=not bidirectional)
    positions = reference.query_positions
    if window is not None:
        first = (positions - window + 1).clamp(min=0)
        visibility = replace(visibility, first_key=first[None])
        reference = replace(reference, visible=reference.visible & (torch.arange(num_keys) >= first[:, None]))
    if bidirectional:
        reference = replace(reference, visible=inputs.real_keys[:, None, None].expand(-1, 1, num_queries, -1))
    visibility = visibility.measured(stride=stride)
    rows = positions % stride == 0
    reference = replace(
        reference, query=reference.query[:, :, rows], visible=reference.visible[:, :, rows],
        real_queries=reference.real_queries[:, rows], query_positions=positions[rows], bidirectional=bidirectional,
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


def _kind_of_error(inputs: AttentionInputs, output: Tensor, allowed: float) -> str:
    """What a wrong output is the right one of: attention that does not hide what it should."""
    reference, real = inputs.reference(), inputs.real_keys
    num_queries, num_keys = reference.visible.shape[-2:]
    nothing = torch.ones(len(real), 1, num_queries, num_keys, dtype=torch.bool)
    causal = nothing.tril(num_keys - num_queries)
    padding = nothing & real[:, None, None]
    kinds = {
        "causality (later keys are not hidden)": padding,
        "causality (queries are counted from the first key, not from behind the cache)": padding & nothing.tril(),
        "padding (it is not hidden)": causal,
        "causality and padding (nothing is hidden)": nothing,
    }
    rows = real[:, inputs.cached :]
    for kind, visible in kinds.items():
        other = replace(reference, visible=visible).output.transpose(1, 2)
        difference = (output.double() - other).abs() / (1 + other.abs())
        if bool((difference[rows] <= 2 * allowed).all()):
            return f"; the error is of {kind}"
    return ""


@torch.no_grad()
def _run(backend: str, inputs: AttentionInputs) -> Tensor:
    """The output of ``backend``, called as a Llama layer calls it."""
    heads, kv_heads, head_dim = inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[-1]
    module: Any = nn.Module()
    module.config = LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    module.config._attn_implementation_internal = backend
    module.layer_idx, module.is_causal, module.num_key_value_groups = 0, True, heads // kv_heads
    # By place: transformers 5.24 has renamed the cache.
    mask = create_causal_mask(
        module.config, inputs.query[:, 0], inputs.attention_mask, _FilledCache(inputs.cached), layer_idx=0
    )
    extra = {"visibility": inputs.visibility} if get_backend(backend).is_streaming else {}
    match attention_function(backend)(
        module.eval(), inputs.query, inputs.key, inputs.value, mask, scaling=inputs.scaling, dropout=0.0, **extra
    ):
        case (Tensor() as output, _):  # a tensor alone would be unpacked along its batch
            return output.cpu()
        case other:
            raise AssertionError(f"{backend!r}: expected (output, weights or None), got {type(other).__name__}")


class _FilledCache:
    """As much of a cache as mask functions ask for."""

    is_compileable = False

    def __init__(self, cached: int) -> None:
        self._cached = cached

    def get_query_offset(self, layer: int) -> int:
        return self._cached

    def get_mask_sizes(self, num_queries: int, layer: int) -> tuple[int, int]:
        return self._cached + num_queries, 0
