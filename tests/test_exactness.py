"""Promise 4: every statistic equals its textbook definition on q and k captured from transformers' own model."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from oracle import capture, errors, expected, stock_of

from llama_attn import AttentionStatsConfig
from llama_attn.stats.table import statistics_table

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def everything(segments=None, **changes) -> AttentionStatsConfig:
    given = {} if segments is None else {"rows": (-1, 30, *range(7)), "keep": segments != 1}
    return AttentionStatsConfig(statistics="all", norms=True, segments=segments, **given | changes)


def check(model, config, *, bound, real, segments=None, visibility=None, own_output=False, **inputs):
    outputs = []
    watch = model.model.norm.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with torch.no_grad():
        stats = model(**inputs, output_attention_stats=config).attention_stats
    watch.remove()
    layers, last = capture(stock_of(model), **inputs)
    last = outputs[0] if own_output else last
    wanted = expected(
        layers,
        last,
        config,
        stats.names,
        real=real,
        segments=segments,
        tokens=inputs["input_ids"],
        **(visibility or {}),
    )
    found = errors(stats, wanted)
    assert set(found) == set(stats.values) - {"key_segment"}
    assert max(found.values()) <= bound, {name: error for name, error in found.items() if error > bound}
    return stats


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        # Not eager in float64: upstream's own output is NaN there, since the float64 mask is −inf in its float32
        # softmax, which gives padding rows NaN, whose values then reach every row.
        ("eager", torch.float32),
        ("sdpa", torch.float32),
        ("sdpa", torch.float64),
        ("streaming", torch.float32),
        ("streaming", torch.float64),
    ],
)
def test_every_statistic_of_a_padded_batch(backend, dtype, ids, left_padding):
    segments = torch.randint(-1, 3, ids.shape, generator=torch.Generator().manual_seed(2))
    segments[0, 0] = 2
    model = tiny_model(backend, dtype)
    # The statistics are compared on the queries and keys of the stock model. In float32 another attention, however
    # good, rounds otherwise, which the layers amplify: only the first one has the same queries and keys, and the
    # last layer's output is compared with the model's own.
    layers = (0,) if backend == "streaming" and dtype == torch.float32 else None
    stats = check(
        model, everything(segments, map_size=10, top_k=40, window=5, sink_tokens=3, layers=layers),
        bound=BOUND[dtype], real=left_padding.bool(), segments=segments, own_output=layers is not None,
        input_ids=ids, attention_mask=left_padding,
    )  # fmt: skip
    assert set(stats.names) == set(statistics_table())
    assert stats["entropy"].dtype == dtype


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (2, 0), "heads": (5, 1, 2)},
        {"query_stride": 5},
        {"query_stride": 3, "heads": (3,), "map_size": 8},
        {"sink_tokens": 40, "window": 100, "map_size": 1},
        {"window": 1, "top_k": 1, "map_size": 37},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_selections_and_parameters(backend, changes, ids, left_padding):
    model = tiny_model(backend, torch.float64)
    check(
        model, everything(**changes), bound=1e-10, real=left_padding.bool(), input_ids=ids, attention_mask=left_padding
    )


def test_segments_as_labels_and_as_numbers(ids):
    """What has no label is in no segment."""
    model, labels = tiny_model(), torch.full(ids.shape, -1)
    labels[:, 2:9], labels[0, 9:], labels[1, 30:] = 0, 1, 1
    named = [[[None, "a", "b"][label + 1] for label in row] for row in labels.tolist()]
    by_number, by_name, with_names = (
        model(ids, output_attention_stats=AttentionStatsConfig(segments=given)).attention_stats
        for given in (labels, named, (labels, ("a", "b")))
    )
    assert (by_number.segments, by_name.segments, with_names.segments) == (("0", "1"), ("a", "b"), ("a", "b"))
    assert torch.equal(by_name["segment_mass"], by_number["segment_mass"])
    assert torch.equal(with_names["segment_mass"], by_number["segment_mass"])
    assert (by_number["segment_mass"][:, :, :, :2] == 0).all()


@pytest.mark.parametrize("top_k", [3, 40])
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_equal_weights_go_to_the_lower_key(backend, top_k, ids):
    """Whether a tie lies among the ``top_k`` or reaches beyond them."""
    model = tiny_model(backend)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.zero_()
    with torch.no_grad():
        stats = model(ids, output_attention_stats=AttentionStatsConfig(statistics="all", top_k=top_k)).attention_stats
    ranks, queries = torch.arange(top_k), torch.arange(37)[:, None]
    expected = torch.where(ranks <= queries, ranks, -1).int()
    assert (stats["topk_position"] == expected).all()


@pytest.mark.parametrize("length", [1, 2, 7, 63, 130])
@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (6, 2), (8, 2), (8, 1)], ids=str)
def test_odd_lengths_and_groups(length, heads):
    model = tiny_model("streaming", torch.float64, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))
    check(model, everything(), bound=1e-10, real=torch.ones(1, length, dtype=torch.bool), input_ids=ids)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
def test_packed_documents(backend, stride):
    model = tiny_model(backend, torch.float64)
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(3))
    lengths = [(11, 1, 18), (7, 20, 3)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    sequences = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    check(
        model, everything(sink_tokens=2, map_size=8, query_stride=stride), bound=1e-10,
        real=torch.ones(2, 30, dtype=torch.bool), visibility={"sequences": sequences}, input_ids=ids, position_ids=positions, use_cache=False,
    )  # fmt: skip


def test_packing_that_upstream_ignores_is_not_reported():
    """With a cache sdpa lets documents see one another, so the numbers must say so."""
    model = tiny_model("sdpa", torch.float64)
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    check(
        model, everything(), bound=1e-10, real=torch.ones(1, 12, dtype=torch.bool),
        input_ids=ids, position_ids=positions, use_cache=True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
@pytest.mark.parametrize("kind", ["bool", "additive", "per_head"])
def test_a_mask_of_the_users_own(backend, kind):
    model = tiny_model(backend, torch.float64)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(2, 6 if kind == "per_head" else 1, 20, 20, generator=generator) < 0.4
    mask[:, :, range(20), range(20)] = True
    mask[1, :, :, 3] = False  # a key that nobody sees, so its own query must see another
    mask[1, :, 3, 0] = True
    mask[0, 1:, :, 7] = False  # with a mask by head, a key that one head alone sees
    mask[0, 1:, 7, 0] = True
    given = mask
    if kind == "additive" or backend == "eager":
        given = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    stats = check(
        model, everything(), bound=1e-10, real=torch.ones(2, 20, dtype=torch.bool), visibility={"mask": mask},
        input_ids=ids, attention_mask=given,
    )  # fmt: skip
    assert stats["received"][:, 1, :, 3].isnan().all()


@pytest.mark.parametrize("backend", ["sdpa", "eager", "streaming"])
@pytest.mark.parametrize("heads", [1, 6])
def test_a_bias_of_the_users_own(backend, heads):
    """An additive mask that also prefers some of the keys it shows, as ALiBi does."""
    model = tiny_model(backend, torch.float64)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 97, (2, 20), generator=generator)
    bias = torch.randn(2, heads, 20, 20, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, heads, 20, 20, dtype=torch.bool).tril()
    check(
        model, everything(query_stride=2), bound=1e-10, real=torch.ones(2, 20, dtype=torch.bool),
        visibility={"mask": mask, "bias": bias}, input_ids=ids,
        attention_mask=bias.masked_fill(~mask, torch.finfo(torch.float64).min),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_a_mask_of_several_blocks(backend):
    """Longer than the blocks of queries in which it is read."""
    model = tiny_model(backend, torch.float64, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 97, (1, 300), generator=generator)
    mask = torch.rand(1, 1, 300, 300, generator=generator) < 0.5
    mask[:, :, range(300), range(300)] = True
    bias = torch.randn(1, 1, 300, 300, generator=generator, dtype=torch.float64)
    check(
        model, AttentionStatsConfig(statistics=("entropy", "max_logit", "received", "weights_map")), bound=1e-10,
        real=torch.ones(1, 300, dtype=torch.bool), visibility={"mask": mask, "bias": bias}, input_ids=ids,
        attention_mask=bias.masked_fill(~mask, torch.finfo(torch.float64).min),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mask_in_half_precision(dtype, backend):
    """The lowest number of float16, −65504, hides a key."""
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[:, :, 5:, 2] = False
    inputs = {
        "input_ids": torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(4)),
        "attention_mask": torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min),
    }
    config, model = everything(), tiny_model(backend, dtype, num_hidden_layers=1)
    with torch.no_grad():
        stats = model(**inputs, output_attention_stats=config).attention_stats
    layers, last = capture(stock_of(model), **inputs)
    # The residual stream behind the layer is rounded otherwise by every backend.
    names = [name for name in stats.names if stats.labels[name].dims[0] == "layer"]
    real = torch.ones(2, 20, dtype=torch.bool)
    wanted = expected(layers, last, config, names, real=real, tokens=inputs["input_ids"], mask=mask)
    assert max(errors(stats, wanted).values()) <= 1e-5


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_padding_inside_a_row(backend, ids):
    """Few different tokens, so that many keys have the predecessor that induction looks for."""
    mask = torch.ones_like(ids)
    mask[0, 5:8] = mask[0, 21] = mask[1, 3] = 0
    check(
        tiny_model(backend, torch.float64), everything(sink_tokens=7), bound=1e-10, real=mask.bool(),
        input_ids=ids % 4 + 3, attention_mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_bidirectional(backend, ids, left_padding):
    model = tiny_model(backend, torch.float64)
    check(
        model, everything(window=4), bound=1e-10, real=left_padding.bool(), visibility={"causal": False},
        input_ids=ids, attention_mask=left_padding, is_causal=False,
    )  # fmt: skip


@pytest.mark.smollm2
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_smollm2_on_the_demo_chat(backend, dtype, smollm2, demo_chat):
    model, _ = smollm2
    model.set_attn_implementation(backend)
    length = demo_chat["input_ids"].shape[1]
    segments = torch.arange(length)[None] // 8
    stats = check(
        model.to(dtype), everything(segments, map_size=20), bound=BOUND[dtype],
        real=torch.ones(1, length, dtype=torch.bool), segments=segments, **demo_chat,
    )  # fmt: skip
    middle = stats["sink_mass"][14:27, 0, :, 1:].mean((-1, -2))
    assert middle.max() > 0.7, "the middle layers of SmolLM2 put most of their attention on the first token"
