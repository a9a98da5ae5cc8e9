"""The report of a corpus, and its JSON: the numbers of the summary, nothing else, and only as large as asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from corpora import Letters, highest, measured, write
from report_page import Page

from llama_attn.corpus.bins import value_bins
from llama_attn.corpus.examples import AROUND
from llama_attn.corpus.table import Table
from llama_attn.viz import corpus_json, corpus_report
from llama_attn.viz.corpus import page as page_of_corpus
from llama_attn.viz.corpus.numbers import decile_texts, keys_held
from llama_attn.viz.report import assembly


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write(folder)
    return measured(folder, tmp_path_factory.mktemp("run")).with_strings(Letters())


def texts_of(summary):
    """Every text of the corpus by its file and line, (ids)."""
    return {
        (summary.files[file], int(line)): ids[ids >= 0]
        for file, line, ids in zip(summary.sample.file, summary.sample.line, summary.sample.ids, strict=True)
    }


def least_megabytes(summary, path):
    with pytest.raises(ValueError, match="is too small for this corpus") as error:
        corpus_report(summary, path, max_megabytes=0.5)
    return float(str(error.value).rsplit(" ", 1)[1])


def test_the_page_holds_the_summary(summary, tmp_path):
    page = Page(corpus_report(summary, tmp_path / "report.html"))
    dataset, frame = summary.to_xarray(), summary.to_pandas()
    assert page.about["model"] == summary.about.model
    assert [page.about[name] for name in ("texts", "tokensRead", "cut")] == [73, summary.tokens, summary.cut]
    assert [*chain(*page.about["roles"])] == [role if isinstance(role, str) else None for role in frame.role]
    for name in summary.about.scores:
        page.check(f"score {name}", dataset[f"{name}_text_mean"])
    page.check("score sink_rate", summary.first_key[..., 0] / summary.first_key[..., 1])
    for role, share in zip(summary.about.roles, dataset.role_share.values, strict=True):
        assert (f"score {role}_share" in page) == bool(share.any()), role
        if share.any():
            page.check(f"score {role}_share", share)
    for name, moments in summary.by_text.items():
        of_texts, _ = page.array(f"texts {name}")
        told = ("mean", "std", "min", "max", "count")
        expected = np.stack([dataset[f"{name}_text_{each}"].values for each in told], -1)
        np.testing.assert_allclose(of_texts, expected, rtol=1e-6)
        counts, edges = page.array(f"histogram {name}")[0], page.about["arrays"][f"histogram {name}"]["edges"]
        whole = [None, *value_bins(summary.about.labels[name].unit).edges, None]
        first = whole.index(edges[0])
        assert whole[first : first + len(edges)] == edges
        assert counts.sum() == moments.histogram.sum()
        np.testing.assert_array_equal(counts, moments.histogram[..., first : first + len(edges) - 1])
        of_positions, _ = page.array(f"positions {name}")
        expected = np.stack([dataset[f"{name}_{each}"].values for each in told[:4]], -1)
        np.testing.assert_allclose(of_positions, expected, rtol=1e-6)
    found = {
        page.about["tokens"][at]: row for at, row in zip(page.about["sinkTokens"], page.about["sinks"], strict=True)
    }
    assert len(found) + page.about["otherSinks"] == summary.sinks.counts[:, :2].any(1).sum() > 1
    for (token,), counts in zip(summary.sinks.keys.tolist(), summary.sinks.counts.tolist(), strict=True):
        if any(counts[:2]):
            assert found[f"<{token}>"] == [token, *counts]
    massive = [[*key, *counts] for key, counts in zip(summary.massive.keys, summary.massive.counts, strict=True)]
    assert sorted(page.about["massive"]) == sorted(np.array(massive).tolist()) != []


def test_only_files_of_examples_are_named(summary, tmp_path):
    """As a corpus of very many files has them."""
    files = ("before.jsonl", *summary.files, *(f"z{number}.jsonl" for number in range(1000)))
    parts = {name: getattr(summary, name) for name in ("strongest", "sample")}
    more = {name: replace(part, file=part.file + 1) for name, part in parts.items()}
    few, many = (
        Page(corpus_report(each, tmp_path / "report.html")) for each in (summary, replace(summary, files=files, **more))
    )
    assert many.about["files"] == few.about["files"] == list(summary.files)
    name = f"strongest {summary.about.examples_of[0]} place"
    np.testing.assert_array_equal(many.array(name)[0], few.array(name)[0])


def test_of_many_lines_the_largest_are_kept(summary, tmp_path, monkeypatch):
    monkeypatch.setattr(page_of_corpus, "MOST_LINES", 2)
    massive = Table(np.array([[0, 7], [1, 7], [2, 9]]), np.array([[40, 5], [30, 20], [20, 10]]))
    about = Page(corpus_report(replace(summary, massive=massive), tmp_path / "report.html")).about
    totals = summary.sinks.counts[:, :2].sum(1)
    assert [row[1] + row[2] for row in about["sinks"]] == sorted(totals.tolist(), reverse=True)[:2]
    assert about["otherSinks"] == (totals > 0).sum() - 2
    assert about["massive"] == [[1, 7, 30, 20], [2, 9, 20, 10]]
    assert about["otherMassive"] == 1


def test_keys_that_hold_most_of_the_attention(summary):
    """Weights of each bin, all as large as can be or as small, bound the keys from both sides."""
    least, most = keys_held(summary)
    for layer, head in np.ndindex(least.shape):
        counts, masses = (each[layer, head] for each in (summary.weight_count, summary.weight_mass))
        queries, wanted = summary.queries[layer], 0.95 * masses.sum()
        spread = np.repeat(masses / np.maximum(counts, 1), np.rint(counts).astype(int))
        equal = 1 + np.searchsorted(np.cumsum(np.sort(spread)[::-1]), wanted)
        assert most[layer, head] * queries == pytest.approx(equal, abs=1.01)
        assert 0.8 * most[layer, head] < least[layer, head] <= most[layer, head]


def test_texts_of_a_head(summary, tmp_path):
    """Each example is a text of the corpus, cut around where the statistic is highest in it."""
    page = Page(corpus_report(summary, tmp_path / "report.html"))
    texts, about = texts_of(summary), summary.about
    assert len(texts) == summary.texts, "all of so few texts are sampled"
    for name in about.examples_of:
        means = summary.sample.means[:, about.scores.index(name)]
        for kind in ("strongest", "deciles"):
            score, place, tokens, values = (
                page.array(f"{kind} {name} {part}")[0] for part in ("score", "place", "tokens", "values")
            )
            assert score.shape[2] == {"strongest": 3, "deciles": 20}[kind]
            assert np.isfinite(score).all()
            for here in np.ndindex(score.shape):
                file, line, position, start = place[here].tolist()
                ids = texts[summary.files[file], line]
                assert start <= position < start + AROUND
                shown = [page.about["tokens"][token - 1] for token in tokens[here] if token]
                assert shown == [f"<{token}>" for token in ids[start : start + AROUND]]
                known = values[here][: len(shown)]
                assert known[position - start] == pytest.approx(highest(known, start), abs=1e-3)
                assert np.isnan(values[here][len(shown) :]).all()
        for layer, head in np.ndindex(*means.shape[1:]):
            order = np.argsort(means[:, layer, head], kind="stable")
            tenths = [order[73 * tenth // 10 : 73 * (tenth + 1) // 10] for tenth in range(10)]
            digests = summary.sample.digest
            expected = [
                sorted(sorted(tenth, key=lambda text: digests[text])[:2], key=list(tenth).index) for tenth in tenths
            ]
            shown = [
                (summary.files[file], line)
                for file, line, *_ in page.array(f"deciles {name} place")[0][layer, head].tolist()
            ]
            names = [(summary.files[summary.sample.file[text]], summary.sample.line[text]) for text in chain(*expected)]
            assert shown == names, (name, layer, head)
        score = page.array(f"strongest {name} score")[0]
        # Scores that differ by rounding alone are in the order of their texts.
        np.testing.assert_allclose(score, -np.sort(-np.moveaxis(means, 0, -1))[..., :3], atol=2e-5)


def test_tenths_of_few_texts():
    means = np.array([3.0, np.nan, 1.0, 2.0])[:, None, None]
    chosen = decile_texts(means)[0, 0].reshape(10, 2)
    assert sorted(chosen[chosen >= 0].tolist()) == [0, 2, 3]
    assert chosen[chosen >= 0].tolist() == [2, 3, 0]
    assert (decile_texts(means * np.nan) == -1).all()
    many = np.random.default_rng(0).permutation(100).astype(float)[:, None, None]
    chosen = decile_texts(many)[0, 0].reshape(10, 2)
    for tenth, texts in enumerate(chosen):
        among = np.flatnonzero((many.ravel() >= 10 * tenth) & (many.ravel() < 10 * tenth + 10))
        assert sorted(texts) == among[:2].tolist()


def test_everything_fits_into_the_budget(summary, tmp_path):
    """Less room, less detail; scores stay as they are, and the page says what it lacks."""
    path = tmp_path / "report.html"
    full, least = corpus_report(summary, path).stat().st_size / 1e6, least_megabytes(summary, path)
    assert path.stat().st_size / 1e6 == full, "what does not fit leaves the file as it was"
    texts = []
    for share in (0.7, 0.3, 0.1, 0):
        budget = least + share * (full - least)
        page = Page(corpus_report(summary, path, max_megabytes=budget))
        assert path.stat().st_size <= budget * 1e6
        for name in summary.about.scores:
            page.check(f"score {name}", summary.by_text[name].mean)
            if f"positions {name}" in page:
                page.check(
                    f"positions {name}",
                    np.stack([getattr(summary.by_position[name], each) for each in ("mean", "std", "low", "high")], -1),
                )
        texts.append(sum(entry["shape"][2] for name, entry in page.about["arrays"].items() if name.endswith(" score")))
    assert texts == sorted(texts, reverse=True)
    assert texts[-1] < texts[0] / 10


def test_the_page_asks_for_nothing_and_reads_nothing_as_html(summary, tmp_path):
    html = corpus_report(summary, tmp_path / "report.html").read_text("utf-8")
    assert re.findall(r'\b(?:src|href|action)="([^"]*)"', html) == ["data:,", "#all"]
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "<81>" not in html, "tokens are inside the compressed blocks"


def test_a_file_gives_the_same_page_as_its_summary(summary, tmp_path):
    summary.save(tmp_path / "summary.safetensors")
    pages = [
        corpus_report(source, tmp_path / "report.html").read_bytes()
        for source in (summary, tmp_path / "summary.safetensors", str(tmp_path / "summary.safetensors"))
    ]
    assert pages[0] == pages[1] == pages[2]
    first, again = (
        corpus_json(source, tmp_path / "summary.json").read_bytes()
        for source in (summary, tmp_path / "summary.safetensors")
    )
    assert first == again


@pytest.mark.parametrize("write", [corpus_report, corpus_json])
def test_bad_input(write, summary, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no summary")
    for source, message in (
        (7, "summary: expected a CorpusSummary or the path of one, got a int"),
        (tmp_path / "bad.safetensors", "is damaged or no summary of a corpus"),
    ):
        with pytest.raises(ValueError, match=message):
            write(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        write(tmp_path / "none.safetensors", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        write(summary, tmp_path / "none" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize("megabytes", [0, -1, True, "12", float("nan")])
def test_budgets_that_are_none(megabytes, summary, tmp_path):
    with pytest.raises(ValueError, match="max_megabytes: expected a positive number, got"):
        corpus_report(summary, tmp_path / "report.html", max_megabytes=megabytes)


def test_the_file_appears_only_when_complete(summary, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("before")
    monkeypatch.setattr(assembly.Shell, "filled", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        corpus_report(summary, tmp_path / "report.html")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_json_holds_the_summary(summary, tmp_path):
    dataset, frame = summary.to_xarray(), summary.to_pandas()
    held = json.loads(corpus_json(summary, tmp_path / "summary.json").read_text("utf-8"))
    assert (held["format"], held["version"]) == ("llama_attn.corpus", 1)
    assert [held[name] for name in ("texts", "tokens", "cut", "skipped")] == [73, summary.tokens, summary.cut, 0]
    assert [(head["layer"], head["head"]) for head in held["heads"]] == list(
        zip(frame.layer, frame["head"], strict=True)
    )
    assert [head["role"] for head in held["heads"]] == [role if isinstance(role, str) else None for role in frame.role]
    described = {entry["name"]: entry for entry in held["statistics"]}
    assert list(described) == [name for name in summary.about.labels if name in summary.by_position]
    for head in held["heads"]:
        here = dataset.sel(layer=head["layer"], head=head["head"])
        assert head["scores"]["sink_rate"] == float(here.sink_rate)
        assert head["role_texts"] == {
            role: round(float(share) * summary.texts)
            for role, share in zip(here.role.values, here.role_share, strict=True)
        }
        assert 0 < head["keys"]["least"] <= head["keys"]["most"] == head["scores"]["keys_for_95_percent"]
        for name, told in head["statistics"].items():
            assert described[name]["of_heads"]
            for key in ("count", "mean", "std", "min", "max"):
                assert told["texts"][key] == pytest.approx(float(here[f"{name}_text_{key}"]), nan_ok=True)
                np.testing.assert_allclose(
                    np.array(told["positions"][key], dtype=float), here[f"{name}_{key}"].values, err_msg=name
                )
            assert len(told["texts"]["histogram"]) == len(described[name]["value_edges"]) + 1
            np.testing.assert_array_equal(told["positions"]["histogram"], here[f"{name}_histogram"])
        assert len(told["positions"]["mean"]) == len(held["positions"])
    for name in ("key_norm", "hidden_norm"):
        np.testing.assert_allclose(held["others"][name]["positions"]["mean"], dataset[f"{name}_mean"].values)
    texts = texts_of(summary)
    for at, name in enumerate(summary.about.examples_of):
        for number, head in enumerate(held["heads"]):
            place = (at, *np.unravel_index(number, summary.roles.shape[1:]))
            strongest, deciles = head["strongest"][name], head["deciles"][name]
            assert [text["score"] for text in strongest] == summary.strongest.score[place].tolist()
            assert [len(tenth) for tenth in deciles] == [2] * 10
            for text in [*strongest, *chain(*deciles)]:
                ids = texts[text["file"], text["line"]][text["start"] :][:AROUND].tolist()
                assert text["tokens"] == ids
                assert [held["token_strings"][str(token)] for token in ids] == [f"<{token}>" for token in ids]
                values = [value for value in text["values"] if value is not None]
                assert values[text["position"] - text["start"]] == pytest.approx(
                    highest(values, text["start"]), abs=1e-3
                )
    sinks = {
        entry["token"]: [entry[key] for key in ("first", "behind", "times_first", "times_behind")]
        for entry in held["sinks"]
    }
    assert sinks == {
        token: counts
        for (token,), counts in zip(summary.sinks.keys.tolist(), summary.sinks.counts.tolist(), strict=True)
        if any(counts[:2])
    }
    assert [list(entry.values()) for entry in held["massive"]] == np.hstack(
        [summary.massive.keys, summary.massive.counts]
    ).tolist()


def test_json_says_null_where_nothing_is_known(summary, tmp_path):
    moments = summary.by_text["entropy"]
    unknown = replace(moments, count=moments.count * 0, low=moments.low + np.inf)
    changed = replace(summary, by_text={**summary.by_text, "entropy": unknown}, strings={})
    held = json.loads(corpus_json(changed, tmp_path / "summary.json").read_text("utf-8"))
    head = held["heads"][0]
    assert head["scores"]["entropy"] is head["statistics"]["entropy"]["texts"]["min"] is None
    assert all(name == f"<id:{token}>" for token, name in held["token_strings"].items())


def test_scores_without_bounds_are_no_examples(summary, tmp_path):
    """Of a damaged file, or of half precision: neither first nor last among the others, and never in JSON."""
    means, values = summary.sample.means.copy(), summary.sample.values.copy()
    means[0], means[1] = -np.inf, np.inf
    values[2:] = np.inf
    changed = replace(summary, sample=replace(summary.sample, means=means, values=values))
    held = json.loads(corpus_json(changed, tmp_path / "summary.json").read_text("utf-8"))
    known = [
        text for head in held["heads"] for tenths in head["deciles"].values() for tenth in tenths for text in tenth
    ]
    assert known
    bounded = {f"{int(digest) % 2**64:016x}" for digest in summary.sample.digest[2:]}
    assert {text["digest"] for text in known} <= bounded
    assert all(value is None for text in known for value in text["values"])
    corpus_report(changed, tmp_path / "page.html")
