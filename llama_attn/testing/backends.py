"""The check of a backend: its output against float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from llama_attn.backends.registry import get_backend
from llama_attn.stats.reference import Reference
from llama_attn.testing.comparing import relative_error
from llama_attn.testing.inputs import FEATURES, SITUATIONS, AttentionInputs, Feature, make_inputs


def assert_matches_reference(
    backend: str,
    *,
    also: Feature | Collection[Feature] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bound: float | None = None,
) -> None:
    """Check the output of a registered backend against float64, masks included, in all of `SITUATIONS`.

    These are what a Llama asks: 1 query alone and behind a cache of 20 keys; 5, 7, 17, 33, 63 and 130 queries; groups of 1,
    2, 3 and 4 query heads per KV head; padding on the left and on the right, and on the left with a cache of 12 keys; 16
    channels with a ``scaling`` of 1 / √16, and 24 with one of 0.5. Other models ask for more, each in a way of its own, which
    ``also`` names:

    - ``"softcap"``: the keyword ``softcap``, as Gemma 2 passes it, here 2.0; with padding, and with a cache of 12 keys.
    - ``"sinks"``: the keyword ``s_aux``, (head), as gpt-oss passes it; with padding, and with a cache of 20 keys.
    - ``"bidirectional"``: ``module.is_causal`` is False, as in BERT, and the mask hides padding alone; 33 queries without
      padding, whose mask may be None, and 23 with padding.
    - ``"window"``: a mask that hides all but the last 7 keys, and the keyword ``sliding_window``, as Mistral has it; with
      padding, and 1 and 6 queries with a cache of 20 and 15 keys.

    Only real queries are compared. What a backend returns for padding is its own affair as long as it is finite: in the next
    layer a real query gives a padded key the weight 0, and 0 · NaN is NaN.

    The function is handed the keywords of a Llama's layers (``position_ids``, ``use_cache``) beside these, and has to take
    others, since other models hand over others.

    Args:
        backend: Its name.
        also: What else it is meant to serve: one of these words, or several.
        dtype: Of query, key, value and sinks.
        device: Where to run it.
        bound: Largest allowed |a − b| / (1 + |b|); by default twice the error that transformers' eager attention
            makes on the same inputs, plus four roundings. Eager attention is that of Gemma 2 where there is a soft-cap,
            and of gpt-oss where there are sinks.

    Raises:
        AssertionError: It is wrong or raises; the message says in which situation and by how much, and which mistake
            gives just this output, if it is a common one.
        ValueError: There is no such backend, or ``also`` has another word.
        ImportError: It does not run here.
    """
    words, known = [also] if isinstance(also, str) else list(also), list(FEATURES)
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"also: expected some of {known}, got {unknown}")
    _check_signature(backend, get_backend(backend).attend)
    asked = (situation for word in known if word in words for situation in FEATURES[word])
    for situation in (*SITUATIONS, *asked):
        inputs, named = make_inputs(**situation, dtype=dtype, device=device), f"{backend!r} in {situation}"
        real = inputs.real_keys[:, inputs.cached :]
        expected = inputs.reference().output.transpose(1, 2)
        output = _output(named, backend, inputs)
        if (output.shape, output.dtype) != (expected.shape, dtype):
            raise AssertionError(
                f"{named}: expected output (batch, query, head, channel) = {tuple(expected.shape)} of "
                f"{dtype}, got {tuple(output.shape)} of {output.dtype}"
            )
        allowed = bound
        if allowed is None:
            eager = relative_error(_call("eager", inputs)[0].cpu()[real], expected[real])
            allowed = 2 * eager + 4 * torch.finfo(dtype).eps
        try:
            error = relative_error(output[real], expected[real])
        except AssertionError as difference:
            raise AssertionError(f"{named}: {difference}{_kind_of_error(inputs, output, allowed)}") from None
        if not error <= allowed:
            kind = _kind_of_error(inputs, output, allowed)
            raise AssertionError(f"{named}: error {error:.2e} is above {allowed:.2e}{kind}")
        _check_padding(named, inputs, output)


def _check_signature(backend: str, attend: Callable[..., Any]) -> None:
    """Refuse a function that would fail in a model whose layers hand over a keyword it has no name for."""
    signature = inspect.signature(attend)
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        raise AssertionError(
            f"{backend!r}: expected a function that ends with **kwargs, got one of {signature}; add **kwargs: layers of "
            f"models hand over other keywords too, such as position_ids, use_cache or sliding_window"
        )


def _check_padding(named: str, inputs: AttentionInputs, output: Tensor) -> None:
    """Refuse padding that is not finite, which the next layer multiplies by 0 and adds to real queries."""
    finite = output.isfinite().all(-1).all(-1)
    if finite.all():
        return
    row, query = (~finite).nonzero()[0].tolist()
    kind = "NaN" if output[row, query].isnan().any() else "infinite"
    if inputs.reference().visible[row, 0, query].any():
        raise AssertionError(
            f"{named}: a row of padding is {kind}, first batch row {row}, query {query}; expected finite output"
        )
    raise AssertionError(
        f"{named}: a row that sees nothing is {kind}, first batch row {row}, query {query}; expected finite output, since the "
        f"next layer adds 0 times it to real queries: hide scores with torch.finfo(scores.dtype).min instead of -inf"
    )


def _kind_of_error(inputs: AttentionInputs, output: Tensor, allowed: float) -> str:
    """What a wrong output is the right one of: attention that leaves out something that it was asked for, or twists it."""
    rows, reference = inputs.real_keys[:, inputs.cached :], inputs.reference()
    output, expected = output[rows], reference.output.transpose(1, 2)[rows]
    for kind, other in _mistakes(inputs, reference):
        its = other.transpose(1, 2)[rows]
        # Where such an error changes nothing, it explains nothing.
        if _distance(output, its) <= 2 * allowed < _distance(its, expected):
            return f"; the error is of {kind}"
    return ""


def _mistakes(inputs: AttentionInputs, reference: Reference) -> Iterator[tuple[str, Tensor]]:
    """Common mistakes and the output that each gives, (batch, head, query, channel)."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    changes: dict[str, dict[str, Any]] = {
        "causality (later keys are not hidden)": {"bidirectional": True},
        "both directions (later keys are hidden)": {"bidirectional": False},
        "padding (it is not hidden)": {"attention_mask": None},
        "causality and padding (nothing is hidden)": {"bidirectional": True, "attention_mask": None},
        "the window (keys before it are not hidden)": {"window": None},
        "the soft-cap (it is not applied)": {"softcap": None},
        "the sinks (they are left out)": {"sinks": None},
        "scaling (it is left out)": {"scaling": 1.0},
        "scaling (it is applied twice)": {"scaling": inputs.scaling**2},
        "scaling (it is 1 / √channel, whatever the keyword says)": {"scaling": inputs.query.shape[-1] ** -0.5},
        "grouped heads (KV heads are repeated by repeat, not by repeat_interleave)": {
            "key": inputs.key.repeat(1, groups, 1, 1),
            "value": inputs.value.repeat(1, groups, 1, 1),
        },
    }
    for kind, change in changes.items():
        yield kind, replace(inputs, **change).reference().output
    visible, real = reference.visible, inputs.real_keys
    from_the_first = torch.ones(visible.shape[-2:], dtype=torch.bool).tril() & real[:, None, None]
    kind = "causality (queries are counted from the first key, not from behind the cache)"
    yield kind, replace(reference, visible=from_the_first).output
    added = replace(reference, visible=torch.ones_like(visible), bias=visible)
    yield "the mask (bool, it is added to the scores: 1 where it is True, and nothing is hidden)", added.output
    inverted = replace(reference, visible=~visible).output
    sees_nothing = ~(~visible).any(-1, keepdim=True)
    uniform = replace(added, scaling=0.0, softcap=None, bias=None).output
    # Where it hides everything, a softmax over -inf is NaN, one over the lowest number is uniform, and sdpa returns 0.
    for of_nothing in (torch.full_like(inverted, torch.nan), uniform, torch.zeros_like(inverted)):
        yield "the mask (it is inverted: True means that a query sees a key)", inverted.where(~sees_nothing, of_nothing)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """`relative_error`, infinite where only one of the two is NaN."""
    return relative_error(actual, expected) if torch.equal(actual.isnan(), expected.isnan()) else math.inf


def _output(named: str, backend: str, inputs: AttentionInputs) -> Tensor:
    """The output of ``backend``, (batch, query, head, channel), on the CPU."""
    try:
        returned = _call(backend, inputs)
    except Exception as error:
        grouped = (
            "; the error is of grouped heads (there are fewer KV heads than query heads, and it takes only as many)"
        )
        hint = grouped if _runs_without_groups(backend, inputs) else ""
        raise AssertionError(f"{named}: {type(error).__name__}: {error}{hint}") from error
    match returned:
        case (Tensor() as output, _):  # a tensor alone would be unpacked along its batch
            return output.cpu()
        case other:
            raise AssertionError(f"{named}: expected (output, weights or None), got {type(other).__name__}")


def _runs_without_groups(backend: str, inputs: AttentionInputs) -> bool:
    """Whether a function that raises where KV heads are shared runs where each query head has its own."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    if groups == 1:
        return False
    own = {name: getattr(inputs, name).repeat_interleave(groups, 1) for name in ("key", "value")}
    try:
        _call(backend, replace(inputs, **own))
    except Exception:
        # It may fail in any way of its own, whose first error is the one that is told; groups are not what it fails at.
        return False
    return True


@torch.no_grad()
def _call(backend: str, inputs: AttentionInputs) -> Any:
    """What ``backend`` returns, called as the layers of a model call it that asks for such attention."""
    heads, kv_heads, head_dim = inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[-1]
    module: Any = nn.Module()
    module.config = LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    module.config._attn_implementation_internal = backend
    module.config.sliding_window = inputs.window
    module.layer_idx, module.is_causal, module.num_key_value_groups = 0, not inputs.bidirectional, heads // kv_heads
    module.sinks = inputs.sinks
    asked = (module.config, inputs.query[:, 0], inputs.attention_mask)
    if inputs.bidirectional:
        mask = create_bidirectional_mask(*asked)
    else:
        create = create_causal_mask if inputs.window is None else create_sliding_window_causal_mask
        # By place: transformers 5.24 has renamed the cache.
        mask = create(*asked, _FilledCache(inputs.cached), layer_idx=0)
    # A layer passes what its model has, and what models hand down to all of their layers.
    own = {"sliding_window": inputs.window, "softcap": inputs.softcap, "s_aux": inputs.sinks}
    positions = torch.arange(inputs.cached, inputs.key.shape[2], device=inputs.query.device)[None]
    return ALL_ATTENTION_FUNCTIONS.get_interface(backend, _eager(inputs))(
        module.eval(), inputs.query, inputs.key, inputs.value, mask, scaling=inputs.scaling, dropout=0.0,
        position_ids=positions, use_cache=True, **{name: value for name, value in own.items() if value is not None},
    )  # fmt: skip


def _eager(inputs: AttentionInputs) -> Callable[..., tuple[Tensor, Tensor]]:
    """Eager attention of a model that knows what these inputs ask for: every model of transformers has its own."""
    if inputs.sinks is not None:
        return modeling_gpt_oss.eager_attention_forward
    return (modeling_llama if inputs.softcap is None else modeling_gemma2).eager_attention_forward


class _FilledCache:
    """As much of a cache as mask functions ask for."""

    is_compileable = False

    def __init__(self, cached: int) -> None:
        self._cached = cached

    def get_query_offset(self, layer: int) -> int:
        return self._cached

    def get_mask_sizes(self, num_queries: int, layer: int) -> tuple[int, int]:
        return self._cached + num_queries, 0
