"""Properties of every engine over random shapes, masks, packing, caches, parameters and block sizes.

``HYPOTHESIS_PROFILE=long`` runs 1,700 examples of each.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import cases
from engines import SIZES, check, same, taken
from hypothesis import Phase, given, settings, strategies as st
from oracle import visible_by_hand

from llama_attn.stats.merge import Group, Measured, Run
from llama_attn.testing import relative_error


@given(cases(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)), SIZES)
def test_equal_to_the_textbook(engine, case, sizes):
    sizes = taken(engine, sizes)
    check(engine, case, case.bound, sizes=sizes, gradients=False)
    # The output does not depend on what is measured, nor the numbers on whether there is an output.
    walk, plain = case.walk(engine, **sizes), case.walk(engine, (), **sizes)
    assert not plain.raw
    assert same(plain.output, walk.output)
    assert same(plain.logsumexp, walk.logsumexp)
    observed = replace(case, value=None).walk(engine, **sizes)
    assert observed.output is None
    assert all(same(observed.raw[name], value) for name, value in walk.raw.items())


@given(cases(), SIZES, SIZES)
def test_the_size_of_blocks_does_not_matter(engine, case, sizes, others):
    known = case.known(engine)
    one, two = (case.walk(engine, **taken(engine, chosen)) for chosen in (sizes, others))
    assert relative_error(one.output, two.output) < 1e-12
    expected = case.finished(one.raw, known)
    for name, value in case.finished(two.raw, known).items():
        assert relative_error(value, expected[name]) < 1e-9, name


@given(cases(causal=True, cached=False), st.lists(st.integers(1, 39), max_size=4))
def test_in_pieces_as_at_once(engine, case, cuts):
    known, length = case.known(engine), case.query.shape[2]
    edges = [0, *sorted({cut for cut in cuts if cut < length}), length]
    run = Run(case.config)
    real, sequence = case.visibility.real, case.visibility.sequence
    for first, last in itertools.pairwise(edges):
        visibility = replace(
            case.visibility, first_query=first, num_keys=last,
            real=None if real is None else real[:, :last], sequence=None if sequence is None else sequence[:, :last],
        )  # fmt: skip
        # As many segments in every piece, whatever it happens to hold.
        wanted = replace(
            case.wanted(known), tokens=case.tokens[:, :last], segments=case.config.segments[:, :last],
            keep=case.config.kept[0, ..., :last],
        )  # fmt: skip
        walk = engine.walk(case.query[:, :, first:last], case.key[:, :, :last], None, visibility, case.scoring, wanted)
        raw = {name: raw[None] for name, raw in walk.raw.items()}
        run.add(Measured(tuple(known), (Group((0,), [visibility], raw, case.query.shape[1]),)))
    pieces = case.finished({name: raw[0] for name, raw in run.result().groups[0].raw.items()}, known)
    for name, value in case.finished(case.walk(engine).raw, known).items():
        assert relative_error(pieces[name], value) < 1e-9, name


@given(cases(), st.randoms())
def test_the_order_of_the_batch_does_not_matter(engine, case, random):
    order = list(range(case.query.shape[0]))
    random.shuffle(order)
    pick = {name: getattr(case.visibility, name) for name in ("real", "sequence")}
    visibility = replace(case.visibility, **{name: None if t is None else t[order] for name, t in pick.items()})
    config = replace(case.config, segments=case.config.segments[order], keep=case.config.keep[:, order])
    shuffled = replace(
        case, query=case.query[order], key=case.key[order], value=case.value[order], visibility=visibility,
        config=config, tokens=case.tokens[order],
    )  # fmt: skip
    if int(config.segments.max()) != int(case.config.segments.max()):
        return
    known = case.known(engine)
    expected = case.finished(case.walk(engine).raw, known)
    for name, value in shuffled.finished(shuffled.walk(engine).raw, known).items():
        assert relative_error(value, expected[name][order]) < 1e-9, name


@given(cases(dtypes=(torch.float32, torch.float64)))
def test_bounds_and_sums(engine, case):
    values, visibility = case.finished(case.walk(engine).raw, case.known(engine)), case.visibility
    slack = 1e-4 if case.query.dtype == torch.float32 else 1e-10
    real = visibility.real_queries.sum(-1).double()
    total = values["received_total"].double().nansum(-1)
    assert relative_error(total, real[:, None].expand_as(total)) < slack
    seen = visibility.visible_keys[:, None].double()
    rows = visibility.real_queries[:, None].expand_as(values["entropy"])
    shares = {"sink_mass", "local_mass", "max_weight", "previous_token", "duplicate_token", "induction"}
    for name in sorted(shares & values.keys()):
        assert (values[name][rows] <= 1 + slack).all(), name
        assert (values[name][rows] >= 0).all(), name
    assert (values["entropy"][rows] <= seen.log().expand_as(values["entropy"])[rows] + slack).all()
    assert (values["effective_keys"][rows] <= seen.expand_as(values["entropy"])[rows] * (1 + slack)).all()
    assert (values["effective_keys"][rows] >= 1 - slack).all()
    histogram = values["distance_histogram"].sum(-1)
    present = histogram[real > 0]
    assert relative_error(present, torch.ones_like(present)) < slack


@given(cases())
def test_visibility_counts_pair_by_pair(case):
    visibility, reference = case.visibility, case.reference()
    pairs = reference.visible[:, 0] & reference.real_queries[..., None]
    assert torch.equal(visibility.visible_keys.long(), pairs.sum(-1))
    assert torch.equal(visibility.visible_queries.long(), pairs.sum(-2))
    assert torch.equal(visibility.real_queries, reference.real_queries)
    real = visibility.real_keys
    assert torch.equal(visibility.rank[real], reference.rank[real])


@given(cases())
def test_spans_tell_pair_by_pair_who_sees_whom(case):
    visibility, visible = case.visibility, case.reference().visible[:, 0]
    keys, queries = torch.arange(visibility.num_keys), torch.arange(visibility.num_queries)[:, None]
    first, stop = (span[:, :, None] for span in visibility.key_spans)
    assert torch.equal((first <= keys) & (keys < stop) & visibility.real_keys[:, None], visible)
    first, stop = (span[:, None] for span in visibility.query_spans)
    assert torch.equal((first <= queries) & (queries < stop), visible)


def test_the_checks_can_fail(engine, monkeypatch):
    """With a textbook that knows no causal triangle."""

    def both_ways(real, queries, sequences, causal, mask):
        return visible_by_hand(real, queries, sequences, False, mask)

    monkeypatch.setattr("cases.visible_by_hand", both_ways)

    @settings(phases=[Phase.generate])
    @given(cases())
    def compared(case):
        check(engine, case, case.bound, gradients=False)

    with pytest.raises(AssertionError):
        compared()
