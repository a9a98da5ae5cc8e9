"""Who sees whom in calls of every kind: vectors, counts and spans against pairs that are written out."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from calls import CPU, calls
from hypothesis import given, strategies as st

from llama_attn.stats.visibility import Visibility


@given(calls())
def test_visibility_tells_pair_by_pair_who_sees_whom(call):
    visibility, sees = call.visibility, call.sees
    assert torch.equal(visibility.real_queries, call.real_queries)
    counted = sees & call.real_queries[..., None]
    assert torch.equal(visibility.visible_keys.long(), counted.sum(-1))
    assert torch.equal(visibility.visible_queries.long(), counted.sum(-2))
    real = visibility.real_keys
    assert torch.equal(visibility.rank[real], call.rank[real])
    if visibility.mask is not None:
        return
    keys, queries = torch.arange(visibility.num_keys), torch.arange(visibility.num_queries)[:, None]
    first, stop = (span[:, :, None] for span in visibility.key_spans)
    assert torch.equal((first <= keys) & (keys < stop) & real[:, None], sees)
    first, stop = (span[:, None] for span in visibility.query_spans)
    assert torch.equal((first <= queries) & (queries < stop), sees)


@given(calls(), st.integers(1, 9))
def test_a_span_is_the_smallest_run_of_keys_that_some_row_sees(call, size):
    visibility = call.visibility
    first, stop = visibility.key_spans
    for start in range(0, visibility.num_queries, size):
        rows = range(start, min(start + size, visibility.num_queries))
        begin, end = visibility.span_of(rows)
        part = slice(rows.start, rows.stop)
        if bool((first[:, part] < stop[:, part]).any()):
            assert begin <= int(first[:, part].min())
            assert end >= int(stop[:, part].max())
        assert end > begin
        if not visibility.has_spans:
            continue
        assert end - begin <= max(1, int(stop[:, part].max()) - int(first[:, part].min()))
        seen = visibility.visible(rows).expand(visibility.batch, -1, -1, -1)[:, 0]
        assert torch.equal(seen, call.sees[:, part, begin:end])


@pytest.mark.parametrize("kind", ["bool", "additive", "per head", "decoding", "cross"])
def test_a_mask_alone(kind):
    """Keys are real if some query sees them, queries if they see some key."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3 if kind == "per head" else 1, 1 if kind == "decoding" else 7, 9)
    mask = torch.rand(shape, generator=generator) < 0.3
    mask[0, :, -1, :] = kind == "decoding"
    mask[1, :, :, 4] = False
    given_mask = mask
    if kind == "additive":
        given_mask = torch.zeros(shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    options = {"aligned": False} if kind == "cross" else {"offset": 5} if kind == "decoding" else {}
    visibility = Visibility.of_mask(given_mask, batch=2, device=CPU, **options)
    assert not visibility.causal
    assert visibility.queries == range(*{"decoding": (8, 9), "cross": (0, 7)}.get(kind, (2, 9)))
    assert visibility.length == (14 if kind == "decoding" else 9)
    sees = mask.any(-1).any(1)
    assert torch.equal(visibility.real_queries, sees)
    assert torch.equal(visibility.real_keys, mask.any(-2).any(1))
    assert torch.equal(visibility.visible_keys.long(), mask.sum(-1).amax(1))
    assert torch.equal(visibility.visible_queries_per_head.long(), mask.sum(-2))
    assert visibility.rank[0, 8] == (5 if kind == "decoding" else 0) + mask.any(-2).any(1)[0, :8].sum()
    half = visibility.of_heads((0,)).measured(first=visibility.offset + 6)
    assert half.mask.shape == (2, 1, {"decoding": 1, "cross": 1}.get(kind, 3), 9)
    assert torch.equal(half.real_queries, sees[:, -half.num_queries :])


def test_another_device_has_every_vector():
    flags = torch.ones(2, 9, dtype=torch.bool)
    visibility = Visibility(
        2, 0, 9, CPU, real=flags, sequence=torch.zeros(2, 9, dtype=torch.long), mask=flags[:, None, :, None].expand(2, 1, 9, 9),
        rows=flags[:, 0], sees=flags, first_key=torch.zeros(1, 9, dtype=torch.long),
        stop_key=torch.full((1, 9), 9), dropped=torch.zeros(2, dtype=torch.long),
    )  # fmt: skip
    there = visibility.to("meta")
    vectors = [
        getattr(there, field.name) for field in fields(there) if isinstance(getattr(there, field.name), torch.Tensor)
    ]
    assert len(vectors) == 8
    assert {vector.device.type for vector in vectors} == {"meta"}
    assert visibility.to("cpu") is visibility
