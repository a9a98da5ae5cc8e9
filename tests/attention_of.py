"""One text as transformers' own Llama reads it: its attention written out in float64, and the model with parts hidden."""

from __future__ import annotations

import numpy as np
import torch
from oracle import capture
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class AttentionOf:
    """What attention calls of a stock model see of a text, and their weights in float64.

    Args:
        stock: transformers' own model.
        ids: (batch, token).
    """

    def __init__(self, stock, ids):
        self.calls, self.last = capture(stock, input_ids=ids)
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        scores = [
            call.query.double() @ call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1).mT
            for call in self.calls
        ]
        scores = [each * call.scaling for each, call in zip(scores, self.calls, strict=True)]
        self.scores = torch.stack(scores).masked_fill(later, -torch.inf)
        # (layer, batch, head, query, key)
        self.weights = self.scores.softmax(-1)
        self.ids = ids

    @property
    def outputs(self):
        """What leaves each layer, before the final norm."""
        return [*(call.hidden for call in self.calls[1:]), self.last]

    def transformed(self, layer, head):
        """f(x) of Kobayashi et al. for the tokens of the first row, (key, hidden)."""
        call = self.calls[layer]
        value = call.value[0, head // (call.query.shape[1] // call.value.shape[1])].double()
        width = value.shape[-1]
        return value @ call.output_weight[:, head * width : (head + 1) * width].detach().double().mT


def loss_of(stock, ids, seen=None):
    """Mean loss of the next token of one row, where the heads of each layer see (layer, head, query, key)."""

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling
        weights = scores.masked_fill(~seen[module.layer_idx], -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    before = stock.config._attn_implementation
    if seen is not None:
        ALL_ATTENTION_FUNCTIONS.register("seen", attend)
        stock.config._attn_implementation_internal = "seen"
    try:
        with torch.no_grad():
            probabilities = stock(ids).logits[0, :-1].double().log_softmax(-1)
    finally:
        stock.config._attn_implementation_internal = before
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop("seen", None)
    return -float(probabilities.gather(-1, ids[0, 1:, None]).mean())


def kept_by_snapkv(weights, budget, groups, window=64):
    """Scores of kvpress' SnapKVPress of one row, (layer, kv_head), cut as its ScorerPress does: what it keeps."""
    observed = weights[..., -window:, :-window].mean(-2)
    pooled = torch.nn.functional.avg_pool1d(observed.flatten(0, 1)[:, None], 5, padding=2, stride=1)
    scores = pooled.view(observed.shape).unflatten(1, (groups, -1)).mean(2)
    scores = torch.nn.functional.pad(scores, (0, window), value=scores.max().item())
    return places(scores.topk(budget, dim=-1).indices, weights.shape[-1])


def kept_by_h2o(weights, budget, groups):
    """Half heavy hitters and half recent keys of one row, (layer, kv_head)."""
    total, recent = weights.sum(-2).unflatten(1, (groups, -1)).mean(2), budget // 2
    heavy = total[..., : total.shape[-1] - recent].topk(budget - recent, dim=-1).indices
    kept = places(heavy, total.shape[-1])
    kept[..., -recent:] = True
    return kept


def places(indices, length):
    """Booleans that are True at these keys."""
    return torch.zeros(*indices.shape[:-1], length, dtype=torch.bool).scatter(-1, indices, True)


def induction_pattern(ids):
    """The pattern that TransformerLens compares with: tokens behind an earlier copy of the query's token."""
    pattern = np.zeros((len(ids), len(ids)))
    for i in range(len(ids)):
        for j in range(1, i + 1):
            pattern[i, j] = ids[j - 1] == ids[i]
    return torch.from_numpy(pattern)
