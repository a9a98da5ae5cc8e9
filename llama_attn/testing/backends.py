"""The check of a backend: its output against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from llama_attn.backends.registry import attention_function, get_backend
from llama_attn.testing.comparing import relative_error
from llama_attn.testing.inputs import SITUATIONS, AttentionInputs, make_inputs


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
