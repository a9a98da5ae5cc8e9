"""Two corpora, or two models on one, against numbers worked out text by text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from corpora import CONFIG, measured, model, write

from llama_attn.corpus import compare

NORMAL_95 = 1.959963984540054


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write(folder, count=40)
    return folder


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    return measured(folder, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory):
    """The model after some training, on the same texts."""
    changed = model()
    torch.manual_seed(1)
    with torch.no_grad():
        changed.model.layers[1].self_attn.q_proj.weight.mul_(0.5)
    return measured(folder, tmp_path_factory.mktemp("other"), module=changed)


def scores(summary, name, layer, head):
    """The score of every text; all of them are in the sample."""
    assert summary.texts == len(summary.sample.digest)
    return summary.sample.means[:, summary.about.scores.index(name), layer, head].astype(np.float64)


def test_the_same_texts(one, other):
    frame = compare(one, other)
    assert frame.attrs["texts_a"] == frame.attrs["texts_b"] == 43
    assert len(frame) == len(one.about.scores) * 18
    strength = frame[["effect", "paired_effect"]].abs().max(axis=1)
    assert (strength.diff().dropna() <= 0).all()
    changed = frame[(frame.layer == 1) & (frame.statistic == "logsumexp")]
    assert (changed.paired_low.gt(0) | changed.paired_high.lt(0)).any()
    assert (frame[frame.layer == 0].difference.abs() < 1e-6).all()
    # Texts that come twice are one pair.
    distinct = np.unique(one.sample.digest, return_index=True)[1]
    assert (frame.texts == 40).all()
    for line in frame[frame.layer == 2].iloc[::7].itertuples():
        a, b = (scores(summary, line.statistic, line.layer, line.head) for summary in (one, other))
        assert line.mean_a == pytest.approx(a.mean(), rel=1e-5, abs=1e-7)
        assert line.difference == pytest.approx(b.mean() - a.mean(), rel=1e-3, abs=1e-5)
        rounding = 1e-5 * (1 + max(abs(a.mean()), abs(b.mean())))
        error = NORMAL_95 * np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)) + rounding
        assert line.high - line.difference == pytest.approx(error, rel=1e-4, abs=1e-7)
        assert line.difference - line.low == pytest.approx(error, rel=1e-4, abs=1e-7)
        assert line.effect == pytest.approx(
            line.difference / max(np.sqrt((a.var() + b.var()) / 2), rounding), rel=1e-4, abs=1e-6
        )
        apart = (b - a)[distinct]
        assert line.paired_difference == pytest.approx(apart.mean(), rel=1e-6, abs=1e-9)
        error = NORMAL_95 * apart.std(ddof=1) / np.sqrt(40) + rounding
        assert line.paired_high - line.paired_difference == pytest.approx(error, rel=1e-6)
        assert line.paired_effect == pytest.approx(apart.mean() / max(apart.std(ddof=1), rounding), rel=1e-6)


def test_summaries_are_taken_by_their_files_too(one, other, tmp_path):
    one.save(tmp_path / "one.safetensors")
    for first in (tmp_path / "one.safetensors", str(tmp_path / "one.safetensors")):
        pandas.testing.assert_frame_equal(compare(first, other), compare(one, other))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        compare(one, tmp_path / "none.safetensors")


def test_with_itself_there_is_no_effect(one):
    frame = compare(one, one)
    assert (frame.difference == 0).all()
    assert (frame.paired_difference == 0).all()
    assert (frame.low <= 0).all()
    assert (frame.high >= 0).all()


def test_rounding_is_no_difference(one):
    """Of short texts all attention is nearby: nothing but rounding tells corpora apart."""

    def all_nearby(share):
        known = one.by_text["local_mass"]
        of_texts = replace(known, mean=np.full_like(known.mean, share), m2=np.full_like(known.m2, 1e-17))
        return replace(one, by_text={**one.by_text, "local_mass": of_texts})

    frame = compare(all_nearby(1), all_nearby(1 - 1e-7))
    lines = frame[frame.statistic == "local_mass"]
    assert len(lines) == 18
    assert (lines.low < 0).all()
    assert (lines.high > 0).all()
    assert (lines.effect.abs() < 0.01).all()


def test_other_texts_are_not_paired(one, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "x.txt").write_text("something else\nand more of it\n")
    few = measured(folder, tmp_path / "run")
    frame = compare(one, few)
    assert (frame.texts == 0).all()
    assert frame.paired_difference.isna().all()
    assert frame.difference.notna().all()


def test_what_only_one_has_is_named(folder, one, tmp_path):
    part = measured(
        folder, tmp_path, config=replace(CONFIG, statistics=("entropy", "sink_mass"), layers=(2, 0), heads=(4,))
    )
    frame = compare(part, one)
    assert {*frame.statistic} == {"entropy", "sink_mass"}
    assert {*zip(frame.layer, frame["head"], strict=True)} == {(0, 4), (2, 4)}
    assert (frame.difference.abs() < 1e-6).all()
    assert frame.attrs["only_in_b"] == [name for name in one.about.scores if name not in ("entropy", "sink_mass")]
    models = frame.attrs["models"]
    assert [model.rsplit(", ", 1)[1] for model in models] == ["2 layers × 1 heads", "3 layers × 6 heads"]
    assert all(model.startswith(one.about.model or "no name") for model in models)
    assert frame.attrs["compared"] == "2 layers × 1 heads"
    assert compare(one, one).attrs["models"] == []


def test_what_cannot_be_compared(folder, one, tmp_path):
    part = measured(folder, tmp_path, config=replace(CONFIG, statistics="entropy"))
    bare = measured(folder, tmp_path / "bare", config=replace(CONFIG, statistics="logsumexp"))
    with pytest.raises(
        ValueError, match=r"b: expected a statistic, layer and head that a has too; a has \['entropy'\]"
    ):
        compare(part, bare)
    for confidence in (0, 1, True, "high"):
        with pytest.raises(ValueError, match="confidence: expected a number between 0 and 1"):
            compare(one, one, confidence=confidence)
