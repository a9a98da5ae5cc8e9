"""The independent oracle: q, k, v and hidden states captured from transformers' own model, weights in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from decisions import kept_keys, rows_at
from transformers.initialization import no_init_weights
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as upstream

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import statistics_table
from llama_attn.testing import relative_error


@dataclass
class Layer:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    hidden: torch.Tensor
    output_weight: torch.Tensor


def stock_of(model):
    """transformers' own class with the weights of ``model``, on the same backend where it has it, else on sdpa."""
    config = copy.deepcopy(model.config)
    if config._attn_implementation != "eager":
        config._attn_implementation_internal = "sdpa"
    with no_init_weights():
        stock = upstream.LlamaForCausalLM(config).to(next(model.parameters()).dtype)
    stock.load_state_dict(model.state_dict())
    return stock.eval()


def capture(stock, **inputs):
    """What every attention call of ``stock`` saw, and the last layer's output."""
    layers: list[Layer] = []
    hidden = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: hidden.append(args[0]), with_kwargs=True)
        for layer in stock.model.layers
    ]
    hooks.append(stock.model.norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0])))

    def attend(module, query, key, value, attention_mask, **kwargs):
        weight = module.o_proj.weight
        layers.append(Layer(query, key, value, kwargs["scaling"], hidden[-1], weight))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(before, upstream.eager_attention_forward)
        return function(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("oracle", attend)
    before = stock.config._attn_implementation
    ALL_MASK_ATTENTION_FUNCTIONS.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS[before])
    stock.config._attn_implementation_internal = "oracle"
    try:
        with torch.no_grad():
            stock(**inputs)
    finally:
        stock.config._attn_implementation_internal = before
        for hook in hooks:
            hook.remove()
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop("oracle")
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop("oracle")
    return layers, hidden[-1]


def causal_weights(model, ids):
    """Weights of a Llama on one row, from what stock attention calls see, (layer, head, query, key), in its dtype."""
    layers = []
    for layer in capture(stock_of(model), input_ids=ids)[0]:
        key = layer.key[0].repeat_interleave(layer.query.shape[1] // layer.key.shape[1], 0)
        scores = layer.query[0] @ key.mT * layer.scaling
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        layers.append(scores.masked_fill(later, -torch.inf).softmax(-1))
    return torch.stack(layers).numpy()


def visible_by_hand(real, num_queries, sequences=None, causal=True, mask=None):
    """Who sees whom, pair by pair, from the definitions alone: (visible, real queries, rank of keys)."""
    batch, num_keys = real.shape
    offset = num_keys - num_queries
    is_real = real.tolist()
    document = [[0] * num_keys] * batch if sequences is None else sequences.tolist()

    def sees(b, q, k):
        return is_real[b][k] and (k <= q or not causal) and document[b][k] == document[b][q]

    queries, keys = range(offset, num_keys), range(num_keys)
    visible = torch.tensor([[[[sees(b, q, k) for k in keys] for q in queries]] for b in range(batch)])
    if mask is not None:
        visible = mask.expand(batch, -1, -1, -1).clone()
        real = visible.any(2).any(1)
        real_queries = visible.any(3).any(1)
    else:
        real_queries = real[:, offset:]
    rank = torch.full((batch, num_keys), 10**6)
    for b in range(batch):
        counts: dict[int, int] = {}
        for k in range(num_keys):
            if real[b, k]:
                sequence = document[b][k]
                rank[b, k] = counts.get(sequence, 0)
                counts[sequence] = counts.get(sequence, 0) + 1
    return visible, real_queries, rank, real


def expected(
    layers,
    last_hidden,
    config: AttentionStatsConfig,
    names,
    *,
    real,
    segments=None,
    tokens=None,
    bias=None,
    **visibility,
):
    """Every statistic by its textbook form, (layer, …), with NaN or −1 where there is no real token.

    And who sees how many: ``visible_keys`` and ``visible_queries``.
    """
    table = statistics_table()
    num_queries = layers[0].query.shape[2]
    visible, real_queries, rank, real_keys = visible_by_hand(real, num_queries, **visibility)
    positions = torch.arange(real.shape[1])[-num_queries:]
    rows = positions % config.query_stride == 0
    heads = list(config.heads) if config.heads is not None else list(range(layers[0].query.shape[1]))
    pairs = visible[:, :, rows] & real_queries[:, None, rows, None]
    seen_by_someone = pairs.any(2).any(1)

    chosen = range(len(layers)) if config.layers is None else config.layers

    def reference(n: int, hidden, rows=rows) -> Reference:
        layer = layers[n]
        group = layer.query.shape[1] // layer.key.shape[1]
        return Reference(
            query=layer.query[:, :, rows],
            key=layer.key,
            value=layer.value,
            scaling=layer.scaling,
            visible=visible[:, :, rows],
            real_queries=real_queries[:, rows],
            rank=rank,
            query_slots=positions[rows],
            config=config,
            bidirectional=visibility.get("mask") is not None or not visibility.get("causal", True),
            bias=None if bias is None else bias[:, :, rows],
            segments=segments,
            tokens=tokens,
            keep=kept_keys(config, list(chosen).index(n), real.shape[1]) if n in chosen else None,
            hidden=hidden[:, rows],
            output_weight=layer.output_weight,
        ), group

    results = {"visible_keys": pairs.sum(-1).amax(1), "visible_queries": pairs.sum(-2).amax(1)}
    for name in names:
        statistic = table[name]
        at = rows_at(config, positions) if "row" in statistic.dims else rows
        values = [statistic.textbook(reference(i, layers[i].hidden, at)[0]) for i in chosen]
        if statistic.dims[0] == "hidden_layer":
            values.append(statistic.textbook(reference(len(layers) - 1, last_hidden)[0]))
        value = torch.stack([v.double() if v.is_floating_point() else v for v in values])
        if "head" in statistic.dims:
            value = value[:, :, heads]
        none = -1 if statistic.dtype is not None else torch.nan
        if "query" in statistic.dims:
            hidden_rows = ~real_queries[:, rows]
        elif "key" in statistic.dims:
            hidden_rows = ~(real_keys if statistic.is_norm or "row" in statistic.dims else seen_by_someone)
        else:
            results[name] = value
            continue
        shape = [n if d in ("batch", "query", "key") else 1 for d, n in zip(statistic.dims, value.shape, strict=True)]
        results[name] = value.masked_fill(hidden_rows.view(shape), none)
    return results


def errors(stats: AttentionStats, expected_values) -> dict[str, float]:
    """|a − b| / (1 + |b|) of every statistic; integers must be equal."""
    return {name: relative_error(stats[name], value) for name, value in expected_values.items()}


def rounding_bound(query, key) -> float:
    """What rounding may do to a statistic: a score of D products is off by about √D roundings of |q| |k|, and a
    weight, relative to itself, by as much again; a sum over keys adds one each. Half precision inputs are exact in
    float32, where the work is done.
    """
    eps = torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).eps
    channels = query.shape[-1]
    longest = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()
    return (8 + key.shape[2]) * eps + 4 * channels**0.5 * eps / 2 * float(longest) * channels**-0.5
