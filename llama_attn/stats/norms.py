"""Norms of the residual stream, of keys and of values: statistics of tensors rather than of weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.extents import check_returned
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import BUILT_IN, Statistic

HIDDEN_DIMS = ("hidden_layer", "batch", "query")
TOP_DIMS = (*HIDDEN_DIMS, "rank")
SUN = "Sun et al., arXiv 2402.17762 (massive activations)"


def measured_norm(statistic: Statistic, config: AttentionStatsConfig, *observed: Tensor) -> Tensor:
    """What the streaming form of a norm returns.

    Args:
        statistic: The norm.
        config: What was asked for.
        observed: What it observes: hidden states, and which are real if it asks for that; keys; or values, and the weight
            of the output projection by head if it asks for that.

    Raises:
        ValueError: It is something else than the statistic says.
    """
    of_hidden = statistic.observes == "hidden_real"
    norms = statistic.stream(*observed, *((config,) if of_hidden else ()))
    if statistic.name in BUILT_IN:
        return norms
    states = observed[0]
    lengths = {"batch": len(states), "query": states.shape[1], "key": states.shape[-2], "rank": config.top_k}
    lengths |= {"kv_head": states.shape[1], "head": len(observed[-1])}
    axes = {dim: lengths[dim] for dim in statistic.dims[1:]}
    return check_returned(statistic, "streaming form", norms, axes, states.dtype)


def _l2(states: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vector_norm(states, dim=-1)


def _mean_norm(states: Float[Tensor, "batch kv_head key channel"]) -> Float[Tensor, "batch key"]:
    return _l2(states.mean(1))


def _median(states: Float[Tensor, "batch query channel"]) -> Float[Tensor, "batch query"]:
    # The mean of the two middle values when their number is even, which torch.median is not.
    magnitudes, channels = states.abs(), states.shape[-1]
    upper = magnitudes.kthvalue(channels // 2 + 1, dim=-1).values
    if channels % 2:
        return upper
    return (magnitudes.kthvalue(channels // 2, dim=-1).values + upper) / 2


def _max_channel(states: Float[Tensor, "batch query channel"]) -> Int[Tensor, "batch query"]:
    return states.abs().argmax(-1).int()


def _ranked(states: Float[Tensor, "batch query channel"], top_k: int) -> Int[Tensor, "batch query rank"]:
    """The channels of the largest magnitudes, ties to the lower one; as many as there are."""
    magnitudes, channels = states.abs(), states.shape[-1]
    kept = min(top_k, channels)
    if magnitudes.dtype == torch.float64:
        return magnitudes.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    # torch.topk breaks ties as it likes, and sorting costs ten times as much. Floats from 0 up are in the order of
    # their bits, so that bits and channel in one integer leave no ties.
    from_last = torch.arange(channels - 1, -1, -1, device=states.device)
    numbers = magnitudes.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(from_last)
    return channels - 1 - (numbers.topk(kept, dim=-1).values & 0xFFFFFFFF)


def _top(
    states: Float[Tensor, "batch query channel"], real: Bool[Tensor, "batch query"], config: AttentionStatsConfig
) -> Float[Tensor, "batch query rank"]:
    channels = _ranked(states, config.top_k)
    missing = config.top_k - channels.shape[-1]
    return torch.nn.functional.pad(states.abs().gather(-1, channels), (0, missing), value=torch.nan)


def _top_channel(
    states: Float[Tensor, "batch query channel"], real: Bool[Tensor, "batch query"], config: AttentionStatsConfig
) -> Int[Tensor, "batch query rank"]:
    channels = _ranked(states, config.top_k)
    return torch.nn.functional.pad(channels, (0, config.top_k - channels.shape[-1]), value=-1).int()


def _layer_median(
    states: Float[Tensor, "batch query channel"], real: Bool[Tensor, "batch query"], config: AttentionStatsConfig
) -> Float[Tensor, " batch"]:
    """The mean of the two middle magnitudes of all real tokens, which are one if their number is odd."""
    magnitudes = states.abs().masked_fill(~real[..., None], torch.nan).flatten(1)
    count = real.sum(-1, keepdim=True) * states.shape[-1]
    # No sorting, and nothing whose shape depends on how much is padding. The upper middle is the lower one again
    # where enough entries are as small, and else the smallest beyond.
    lower = magnitudes.nanmedian(dim=-1, keepdim=True).values
    beyond = magnitudes.masked_fill(~(magnitudes > lower), torch.inf).amin(-1, keepdim=True)
    upper = torch.where((magnitudes <= lower).sum(-1, keepdim=True) > count // 2, lower, beyond)
    # A state that is not a number may not pass for padding.
    broken = (~magnitudes.isnan()).sum(-1, keepdim=True) != count
    return ((lower + upper) / 2).masked_fill(broken, torch.nan).squeeze(-1)


def _value_output_norm(
    value: Float[Tensor, "batch kv_head key channel"], output_weight: Float[Tensor, "head hidden channel"]
) -> Float[Tensor, "batch head key"]:
    factors = output_weight
    if value.shape[2] > 2 * value.shape[3]:
        # ‖W v‖ = ‖R v‖ with W = QR: a channel × channel product per key in place of one with the whole hidden size. Of few
        # keys, as of a decoded token, the decomposition itself would take longer.
        factors = torch.linalg.qr(output_weight, mode="r").R
    groups = factors.shape[0] // value.shape[1]
    factors = factors.unflatten(0, (value.shape[1], groups))
    norms = [_l2(torch.matmul(value, factors[:, group].mT)) for group in range(groups)]
    return torch.stack(norms, dim=2).flatten(1, 2)


def _hidden(reference: Reference) -> Tensor:
    if reference.hidden is None:
        raise ValueError("hidden: the reference has no hidden states")
    return reference.hidden.double()


def _top_textbook(reference: Reference) -> tuple[Tensor, Tensor]:
    values, channels = _hidden(reference).abs().sort(dim=-1, descending=True, stable=True)
    top_k = reference.config.top_k
    shape = (*values.shape[:-1], top_k)
    top, top_channels = values.new_full(shape, torch.nan), channels.new_full(shape, -1)
    kept = min(top_k, values.shape[-1])
    top[..., :kept], top_channels[..., :kept] = values[..., :kept], channels[..., :kept]
    return top, top_channels


def _layer_median_textbook(reference: Reference) -> Tensor:
    rows = zip(_hidden(reference).abs(), reference.real_queries, strict=True)
    entries = [states[real].flatten().sort().values for states, real in rows]
    middles = [row[[(len(row) - 1) // 2, len(row) // 2]].mean() if len(row) else torch.nan for row in entries]
    return torch.tensor(middles, dtype=torch.float64)


def _value(reference: Reference) -> Tensor:
    if reference.value is None:
        raise ValueError("value: the reference has no values")
    return reference.value.double()


def _value_output_textbook(reference: Reference) -> Tensor:
    if reference.output_weight is None:
        raise ValueError("output_weight: the reference has no output projection")
    heads, kv_heads = reference.query.shape[1], reference.key.shape[1]
    value = _value(reference).repeat_interleave(heads // kv_heads, dim=1)
    weight = reference.output_weight.double().unflatten(1, (heads, -1))
    return torch.einsum("bhkd,mhd->bhkm", value, weight).norm(dim=-1)


STATISTICS = (
    Statistic(
        "hidden_norm", HIDDEN_DIMS, "activation", SUN, observes="hidden", stream=_l2,
        textbook=lambda reference: _hidden(reference).square().sum(-1).sqrt(),
        meaning="L2 norm of the residual stream",
    ),
    Statistic(
        "hidden_max", HIDDEN_DIMS, "activation", SUN, observes="hidden",
        stream=lambda states: states.abs().amax(-1),
        textbook=lambda reference: _hidden(reference).abs().amax(-1),
        meaning="largest magnitude in the residual stream",
    ),
    Statistic(
        "hidden_max_channel", HIDDEN_DIMS, "channel", SUN, observes="hidden", stream=_max_channel,
        textbook=lambda reference: _hidden(reference).abs().argmax(-1), dtype=torch.int32,
        meaning="channel of the largest magnitude",
    ),
    Statistic(
        "hidden_median", HIDDEN_DIMS, "activation", SUN, observes="hidden", stream=_median,
        textbook=lambda reference: _hidden(reference).abs().quantile(0.5, dim=-1),
        meaning="median magnitude in the residual stream",
    ),
    Statistic(
        "hidden_top", TOP_DIMS, "activation", SUN, observes="hidden_real", stream=_top,
        textbook=lambda reference: _top_textbook(reference)[0],
        meaning="largest magnitudes in the residual stream, sorted",
    ),
    Statistic(
        "hidden_top_channel", TOP_DIMS, "channel", SUN, observes="hidden_real", stream=_top_channel,
        textbook=lambda reference: _top_textbook(reference)[1], dtype=torch.int32,
        meaning="channels of the largest magnitudes, sorted",
    ),
    Statistic(
        "hidden_layer_median", ("hidden_layer", "batch"), "activation", SUN, observes="hidden_real",
        stream=_layer_median, textbook=_layer_median_textbook,
        meaning="median magnitude of all channels of all measured tokens; of single forwards only",
    ),
    Statistic(
        "key_norm", ("layer", "batch", "kv_head", "key"), "activation", "Devoto et al., arXiv 2406.11430",
        observes="key", stream=_l2, textbook=lambda reference: reference.key.double().square().sum(-1).sqrt(),
        meaning="L2 norm of each key after RoPE",
    ),
    Statistic(
        "value_norm", ("layer", "batch", "kv_head", "key"), "activation", "Guo et al., arXiv 2406.12335",
        observes="value", stream=_l2, textbook=lambda reference: _value(reference).square().sum(-1).sqrt(),
        meaning="L2 norm of each value",
    ),
    Statistic(
        "key_mean_norm", ("layer", "batch", "key"), "activation", "norm of the mean over KV heads",
        observes="key", stream=_mean_norm,
        textbook=lambda reference: reference.key.double().mean(1).square().sum(-1).sqrt(),
        meaning="L2 norm of the keys averaged over heads",
    ),
    Statistic(
        "value_mean_norm", ("layer", "batch", "key"), "activation", "norm of the mean over KV heads",
        observes="value", stream=_mean_norm,
        textbook=lambda reference: _value(reference).mean(1).square().sum(-1).sqrt(),
        meaning="L2 norm of the values averaged over heads",
    ),
    Statistic(
        "value_output_norm", ("layer", "batch", "head", "key"), "activation", "Kobayashi et al., arXiv 2004.10102",
        observes="value_output", stream=_value_output_norm, textbook=_value_output_textbook,
        meaning="L2 norm of each value after its head's output projection",
    ),
)  # fmt: skip
