"""Every statistic of any model by its definition, from captured calls: see ``any_oracle``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from any_oracle import Call, Captured, Materialised, Places, layer_path, materialise, places
from decisions import kept_keys, rows_at
from torch import Tensor, nn
from zoo_base import Stack
from zoo_situations import Axis

from llama_attn import AttentionStatsConfig
from llama_attn.stats.reference import Reference
from llama_attn.stats.table import statistics_table

# Statistics that compare positions, which queries and keys of different sequences do not share.
OF_DISTANCE = ("local_mass", "mean_distance", "distance_histogram", "previous_token", "duplicate_token", "induction")


class Written(Reference):
    """One layer on the axis of absolute positions: what the textbook forms of the statistics ask for.

    Whatever a layer cannot see, before the first slot of its cache or of the future, is a key that is hidden.
    """

    def __init__(self, **values: Any) -> None:
        # The fields are frozen, and what the base class would compute is given.
        self.__dict__.update(values)


def _entropy(layer: Written) -> Tensor:
    terms = torch.xlogy(layer.weights, layer.weights).sum(-1)
    return -(terms + torch.xlogy(layer.sink_weights, layer.sink_weights))


def _logsumexp(layer: Written) -> Tensor:
    scores = layer.scores
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.logsumexp(-1)


# Where a learned sink is one more outcome; without one these are the textbook forms.
WITH_SINKS = {
    "entropy": _entropy,
    "logsumexp": _logsumexp,
    "effective_keys": lambda layer: 1 / (layer.weights.square().sum(-1) + layer.sink_weights.square()),
    "learned_sink_mass": lambda layer: layer.sink_weights,
}


@dataclass
class Layers:
    """Several forwards of one stack that continue one another, layer by layer.

    Args:
        index: Number of every layer.
        layers: One `Written` for each.
        pairs: Who is counted as seeing whom, (batch, 1 or head, query, key), for each layer.
        real_queries: (batch, query).
        real_keys: (batch, key), for each layer.
        present: Which keys each layer's cache has held, (key).
        first_key: Where the key axis starts.
        last_hidden: What left the last layer, (batch, query, hidden).
    """

    index: list[int]
    layers: list[Written]
    pairs: list[Tensor]
    real_queries: Tensor
    real_keys: list[Tensor]
    present: list[Tensor]
    first_key: int
    last_hidden: Tensor | None


def _absolute(tensor: Tensor, place: Places, length: int, dim: int, fill: Any) -> Tensor:
    """Slots put at their absolute positions."""
    tensor = tensor.narrow(dim, 0, place.filled)
    before = list(tensor.shape)
    after = list(tensor.shape)
    before[dim], after[dim] = place.offset, length - place.offset - place.filled
    return torch.cat([tensor.new_full(before, fill), tensor, tensor.new_full(after, fill)], dim)


def _ranks(axis: Axis) -> Tensor:
    """Real tokens of the same sequence before each token; many for padding."""
    ranks = torch.full(axis.real.shape, 10**6)
    for b, row in enumerate(axis.real.tolist()):
        counts: dict[int, int] = {}
        for t, real in enumerate(row):
            if real:
                document = int(axis.sequence[b, t])
                ranks[b, t] = counts.get(document, 0)
                counts[document] = counts.get(document, 0) + 1
    return ranks


def _honours(axis: Axis, visible: Sequence[Tensor], queries: list[int]) -> bool:
    """Whether documents that are packed into a row are kept apart, which not every model and backend does."""
    for b, row in enumerate(axis.sequence.tolist()):
        for at, position in enumerate(queries):
            if (
                position
                and row[position] != row[position - 1]
                and any(v[b, :, at, position - 1].any() for v in visible)
            ):
                return False
    return True


def output_weight(model: nn.Module, stack: Stack, path: str) -> Tensor | None:
    """The matrix (hidden, head · channel) that the output of attention goes through."""
    if stack.output is None:
        return None
    parts = path.split(".")
    for part in stack.output.split("/"):
        parts = parts[:-1] if part == ".." else parts + part.split(".")
    linear = model.get_submodule(".".join(parts))
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


def gather(
    model: nn.Module,
    captured: Captured,
    stack: Stack,
    axes: dict[str, Axis],
    config: AttentionStatsConfig,
    forwards: slice = slice(None),
) -> Layers:
    """What was captured of some forwards of one stack, on the axis of absolute positions."""
    all_forwards = captured.of(stack)
    chosen, where = all_forwards[forwards], places(all_forwards, stack, axes)[forwards]
    batch, num_layers = chosen[0][0].query.shape[0], len(chosen[0])
    length = max(place.length for place in where[-1])
    keys = axes["ids"] if stack.cross else axes.get(stack.axis)
    if stack.cross and (keys is None or keys.real.shape[1] != length):
        keys = None
    keys = Axis.plain(batch, length) if keys is None else keys.upto(length)
    starts = [
        (max(p.start + c.query.shape[2] for p, c in zip(ps, cs, strict=True)), ps, cs)
        for ps, cs in zip(where, chosen, strict=True)
    ]
    queries = [position for end, ps, cs in starts for position in range(min(p.start for p in ps), end)]
    # Cross-attention is not told which of its queries are padding.
    real = torch.ones(batch, len(queries), dtype=torch.bool) if stack.cross else keys.real[:, queries]
    made: list[list[Materialised]] = [[materialise(call) for call in layers] for layers in chosen]
    visible = [
        torch.cat(
            [
                _absolute(made[f][n].visible.expand(-1, _masks(made, n), -1, -1), where[f][n], length, 3, False)
                for f in range(len(chosen))
            ],
            2,
        )
        for n in range(num_layers)
    ]
    if not stack.cross and not _honours(keys, visible, queries):
        keys = Axis(keys.ids, keys.real, torch.zeros_like(keys.sequence))
    layers, pairs, present = [], [], []
    for n in range(num_layers):
        calls = [layers[n] for layers in chosen]
        spots = [ps[n] for ps in where]

        def joined(pick: Any, dim: int, fill: Any, n: int = n) -> Tensor:
            return torch.cat(
                [_absolute(pick(made[f][n]), where[f][n], length, dim, fill) for f in range(len(chosen))], 2
            )

        seen, real_n, ranks = visible[n], real, _ranks(keys)
        # A query that is real sees no padding; what padding sees is nothing to count.
        stray = seen & real[:, None, :, None] & ~keys.real[:, None, None, :]
        if stack.inside:
            # As with a mask of one's own: whoever sees or is seen is real, and a row is one sequence.
            real_n, ranks = torch.ones_like(real), _ranks(Axis.of(keys.real, seen.any(2).any(1)))
        elif bool(stray.any()):
            raise AssertionError(f"{calls[0].path}: a real query sees padding, so the situation does not fit the model")
        sees_some = seen.any(-1).any(1)
        real_queries = real_n & sees_some
        held = torch.zeros(length, dtype=torch.bool)
        for place in spots:
            held[place.offset : place.offset + place.filled] = True
        key, value = _last_held(calls, spots, length, "key"), _last_held(calls, spots, length, "value")
        states = [c.hidden for c in calls]
        # Windows of an image are rows of attention, but not of the residual stream.
        fits = all(
            s is not None and s.shape[:2] == (c.query.shape[0], c.query.shape[2])
            for s, c in zip(states, calls, strict=True)
        )
        hidden = torch.cat(states, 1) if fits else None
        layers.append(
            Written(
                query=torch.cat([c.query for c in calls], 2),
                key=key,
                value=value,
                scaling=calls[0].scaling,
                scores=joined(lambda m: m.scores, 3, -torch.inf),
                weights=joined(lambda m: m.weights, 3, 0.0),
                sinks=made[0][n].sinks,
                sink_weights=torch.cat([made[f][n].sink_weights for f in range(len(chosen))], 2),
                visible=seen,
                real_queries=real_queries,
                rank=ranks,
                query_slots=torch.tensor(queries),
                distance=(torch.tensor(queries)[:, None] - torch.arange(length)).abs(),
                config=config,
                bidirectional=True,
                segments=None if config._segments is None else config._segments[0][:, :length],
                tokens=keys.ids,
                keep=kept_keys(config, n, length),
                hidden=hidden,
                output_weight=output_weight(model, stack, calls[0].path),
                bias=None,
            )
        )
        pairs.append(seen & real_queries[:, None, :, None])
        present.append(held)
    outputs = captured.last_outputs.get(stack.path)
    last = None
    if outputs is not None and all(layer.hidden is not None for layer in layers) and len(outputs) == len(all_forwards):
        last = torch.cat(outputs[forwards], 1)
    index = [_index(stack, call.path, n) for n, call in enumerate(chosen[0])]
    first_key = min(place.offset for ps in where for place in ps)
    if stack.inside:
        real, seen_keys = layers[0].real_queries, [layer.visible.any(2).any(1) for layer in layers]
    else:
        seen_keys = [keys.real] * num_layers
    return Layers(index, layers, pairs, real, seen_keys, present, first_key, last)


def _masks(made: list[list[Materialised]], layer: int) -> int:
    """Heads of the masks of a layer, the same for all its calls."""
    return max(forward[layer].visible.shape[1] for forward in made)


def _last_held(calls: list[Call], spots: list[Places], length: int, name: str) -> Tensor:
    """Keys or values at their positions, as the last call that has them has them."""
    first = getattr(calls[0], name)
    full = torch.zeros(*first.shape[:2], length, first.shape[3], dtype=first.dtype)
    for call, place in zip(calls, spots, strict=True):
        full[:, :, place.offset : place.offset + place.filled] = getattr(call, name)[:, :, : place.filled]
    return full


def _index(stack: Stack, path: str, order: int) -> int:
    """Number of the layer: its place in the list, or the order of calls where places do not number them."""
    if stack.shared or (stack.path.count("#") > 1 and stack.layer is None):
        return order
    return int(layer_path(stack, path).rpartition(".")[2])


def expected(found: Layers, names: Sequence[str], config: AttentionStatsConfig, stack: Stack) -> dict[str, Tensor]:
    """Every statistic, (layer, …), NaN or −1 where there is no data; and who sees how many."""
    table = statistics_table()
    keys = slice(found.first_key, None)
    visible_keys = torch.stack([pairs.sum(-1).amax(1) for pairs in found.pairs])
    visible_queries = torch.stack([pairs.sum(-2).amax(1) for pairs in found.pairs])[..., keys]
    results = {
        "visible_keys": visible_keys[0] if (visible_keys == visible_keys[0]).all() else visible_keys,
        "visible_queries": visible_queries[0] if (visible_queries == visible_queries[0]).all() else visible_queries,
    }
    for name in names:
        statistic = table[name]
        form = WITH_SINKS.get(name, statistic.textbook)
        values = [form(layer) for layer in found.layers]
        none = -1 if statistic.dtype is not None else torch.nan
        for n, value in enumerate(values):
            layer = found.layers[n]
            value = value.double() if value.is_floating_point() else value
            if name in OF_DISTANCE and stack.cross:
                value = torch.full_like(value, torch.nan)
            dims = statistic.dims[1:]
            if "query" in dims:
                of_stream = statistic.dims[0] == "hidden_layer" and not stack.inside
                real = found.real_queries if of_stream else layer.real_queries
                value = _hide(value, dims, "query", ~real, none)
            elif "row" in dims:
                value = value[:, :, rows_at(config, layer.query_slots)]
                value = _hide(value, dims, "key", ~found.real_keys[n] & found.present[n], none)[..., keys]
            elif "key" in dims:
                shown = found.real_keys[n] & found.present[n] if statistic.is_norm else found.pairs[n].any(2).any(1)
                value = _hide(value, dims, "key", ~shown, none)[..., keys]
            values[n] = value
        if statistic.dims[0] == "hidden_layer":
            last = Written(**{**found.layers[-1].__dict__, "hidden": found.last_hidden})
            value = form(last)
            value = value.double() if value.is_floating_point() else value
            if "query" in statistic.dims:
                value = _hide(value, statistic.dims[1:], "query", ~found.real_queries, none)
            values.append(value)
        results[name] = torch.stack(_same_heads(values, none))
    return results


def _hide(value: Tensor, dims: tuple[str, ...], dim: str, hidden: Tensor, none: float) -> Tensor:
    shape = [size if name in ("batch", dim) else 1 for name, size in zip(dims, value.shape, strict=True)]
    return value.masked_fill(hidden.view(shape), none)


def _same_heads(values: list[Tensor], none: float) -> list[Tensor]:
    """Layers with fewer heads have no data for the others."""
    most = max(value.shape[1] for value in values) if values[0].ndim > 2 else 0
    return [
        value
        if not most or value.shape[1] == most
        else torch.cat([value, value.new_full((value.shape[0], most - value.shape[1], *value.shape[2:]), none)], 1)
        for value in values
    ]
