"""What is timed by a benchmark, which keeps the numbers, and by a claim, which judges one; checked before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from models import mistral, ours, stock
from timing import Case

from llama_attn import AttentionStatsConfig, record

STOCK = "stock sdpa, no statistics"
# Of so many last tokens logits are compared.
COMPARED = 64

# Backend, whether it measures, and the most it may take of the time of the baseline.
Asked = tuple[str, bool, float | None]


def label(backend: str, stats) -> str:
    """What the table calls a case."""
    if stats is None:
        return f"{backend}, no statistics"
    return f"{backend} ({stats.engine}), statistics" if backend == "streaming" else f"{backend}, statistics"


def forwards(model, ids: torch.Tensor, asked: Sequence[Asked], truth: torch.Tensor | None = None):
    """Whole forwards: transformers' own class on sdpa, and ours.

    Args:
        model: Whose weights all of them use.
        ids: Input, (1, length).
        asked: The cases.
        truth: Logits in higher precision, if the dtype is too coarse to compare with stock's.
    """
    plain = stock(model)

    @torch.no_grad()
    def forward(network, kept=1, **arguments):
        return network(ids, logits_to_keep=kept, use_cache=False, **arguments)

    expected, cases = forward(plain, COMPARED).logits, []
    for backend, measures, goal in asked:
        network = ours(model, backend)
        output = forward(network, COMPARED, output_attention_stats=measures)
        stats = output.attention_stats if measures else None
        if truth is None:
            torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-3)
        else:
            # Two attentions that both round to the dtype: of single tokens either may be off by several times as much as
            # the other, of many ours by twice at most.
            assert (output.logits - truth).norm() <= 2 * (expected - truth).norm(), backend
        if stats is not None:
            total = (stats["received"] * stats.visible_queries[:, None]).sum(-1)
            torch.testing.assert_close(total, torch.full_like(total, ids.shape[1]), rtol=1e-4, atol=0)
        call = lambda n=network, m=measures: forward(n, output_attention_stats=m)  # noqa: E731
        cases.append(Case(label(backend, stats), call, goal))
    return Case(STOCK, lambda: forward(plain)), cases


def decoding(model, ids: torch.Tensor, asked: Sequence[Asked]):
    """The last token behind a cache of all others, with statistics of its own.

    Args:
        model: Whose weights all of them use.
        ids: Input, (1, length).
        asked: The cases.
    """
    cached = ids.shape[1] - 1

    @torch.no_grad()
    def decoder(network, **arguments):
        """Feeds one token; the cache ends as it began."""
        cache = network(ids[:, :cached], use_cache=True, logits_to_keep=1).past_key_values

        @torch.no_grad()
        def decode():
            output = network(ids[:, cached:], past_key_values=cache, **arguments)
            cache.crop(-1)
            return output

        return decode

    baseline = decoder(stock(model))
    expected, cases = baseline().logits, []
    for backend, measures, goal in asked:
        decode = decoder(ours(model, backend), output_attention_stats=measures)
        output = decode()
        torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-3)
        stats = output.attention_stats if measures else None
        if stats is not None:
            assert stats["entropy"].shape[-1] == 1
            assert stats["received"].shape[-1] == cached + 1
        cases.append(Case(label(backend, stats), decode, goal))
    return Case(STOCK, baseline), cases


def around_stock(model, ids: torch.Tensor, at_most: float):
    """The same forward on sdpa, observed by our class and from outside.

    Args:
        model: Whose weights both use.
        ids: Input, (1, length).
        at_most: The goal.
    """
    plain, mine = stock(model), ours(model, "sdpa")

    @torch.no_grad()
    def recorded():
        with record(plain) as recording:
            plain(ids, logits_to_keep=1, use_cache=False)
        return recording.stats

    @torch.no_grad()
    def observed():
        return mine(ids, logits_to_keep=1, use_cache=False, output_attention_stats=True).attention_stats

    expected, found = observed(), recorded()
    for name in expected.names:
        torch.testing.assert_close(found[name], expected[name])
    return Case("our class, sdpa, statistics", observed), Case("record around stock, sdpa", recorded, at_most)


def from_weights(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The default statistics that the weights of one layer, (batch, head, query, key), tell: six of eight.

    The logsumexp and the largest score are lost in the softmax. Plain PyTorch, one line each, as one would write it.
    """
    length, config = weights.shape[-1], AttentionStatsConfig()
    positions = torch.arange(length, device=weights.device)
    distance = positions[:, None] - positions
    near = (distance >= 0) & (distance < config.window)
    return {
        "entropy": -torch.xlogy(weights, weights).sum(-1),
        "max_weight": weights.amax(-1),
        "sink_mass": weights[..., : config.sink_tokens].sum(-1),
        "local_mass": (weights * near).sum(-1),
        "mean_distance": torch.einsum("bhqk,qk->bhq", weights, distance.to(weights.dtype)),
        "received": weights.sum(-2) / (length - positions),
    }


def from_eager(model, ids: torch.Tensor, at_most: float):
    """Stock eager attention that returns its weights, then six of the eight default statistics from them.

    Args:
        model: Whose weights both use.
        ids: Input, (1, length).
        at_most: The goal.
    """
    eager, streaming = stock(model, "eager"), ours(model, "streaming")

    @torch.no_grad()
    def theirs():
        output = eager(ids, logits_to_keep=1, use_cache=False, output_attentions=True)
        layers = [from_weights(weights) for weights in output.attentions]
        return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}

    @torch.no_grad()
    def measured():
        return streaming(ids, logits_to_keep=1, use_cache=False, output_attention_stats=True).attention_stats

    stats = measured()
    for name, value in theirs().items():
        # Two attentions in float32 whose roundings 30 layers amplify: a thousandth of the statistic's own scale.
        torch.testing.assert_close(stats[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()), msg=name)
    baseline = Case("stock eager, output_attentions, six statistics from the weights", theirs)
    return baseline, Case(label("streaming", stats), measured, at_most)


def windowed(length: int, window: int, at_most: float, device: str = "cpu"):
    """A model with a window: stock sdpa computes all scores and hides most of them.

    Args:
        length: Tokens.
        window: Of them, that each one sees.
        at_most: The goal.
        device: Where it runs.
    """
    plain, streaming = mistral(window, "sdpa").to(device), mistral(window, "streaming").to(device)
    streaming.load_state_dict(plain.state_dict(), assign=True)
    ids = torch.randint(1024, (1, length), generator=torch.Generator().manual_seed(0)).to(device)

    @torch.no_grad()
    def forward(network):
        return network(ids, logits_to_keep=1, use_cache=False).logits

    def recorded():
        with record(streaming) as recording:
            logits = forward(streaming)
        return logits, recording.stats

    logits, stats = recorded()
    torch.testing.assert_close(logits, forward(plain), rtol=1e-3, atol=1e-3)
    assert (stats.visible_keys == torch.arange(1, length + 1).clamp(max=window)).all()
    return Case(STOCK, lambda: forward(plain)), Case(label("streaming", stats), recorded, at_most)
