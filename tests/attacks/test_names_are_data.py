"""Neither a terminal nor a page is told what to do by a name, a unit or a path that stands in a file."""

from __future__ import annotations

import pytest
from hostile import changed, corpus_file, format_of, look_at, outer_of, run_file, with_outer

from llama_attn import AttentionStats
from llama_attn.corpus import CorpusSummary
from llama_attn.viz import corpus_json, corpus_report

EVIL = "a\x1b[31m\x9b2J\u202e\n<b>$x$[red]"


def test_of_a_run(tmp_path):
    """Neither a terminal nor a page is told what to do by a name, a unit or a path."""
    path = tmp_path / "hostile.safetensors"

    def change(header):
        header |= {"model": EVIL, "engine": EVIL, "segments": [EVIL, "b"], "tokens": [[EVIL] * 7] * 2, "stack": EVIL}
        for label in header["labels"].values():
            label |= {"unit": EVIL, "meaning": EVIL, "source": EVIL}
        header["labels"][EVIL] = header["labels"].pop("entropy")

    header, rest = outer_of(changed(run_file(), change))
    header[EVIL] = header.pop("entropy")
    path.write_bytes(with_outer(header, rest))
    text, html, part, _ = look_at(path, format_of(run_file()))
    for shown in (text, html, part):
        assert shown.replace("\n", "").isprintable()
        assert r"a\x1b[31m" in shown
    assert "<b>$" not in html
    assert len(text.splitlines()) == 3 + len(AttentionStats.load(path).values)
    with pytest.raises(KeyError) as refused:
        AttentionStats.load(path)["nothing"]
    assert str(refused.value).isprintable()


def test_of_a_corpus(tmp_path):
    def change(header):
        about = header["about"]
        about |= {"model": EVIL, "weights": EVIL, "roles": [f"{EVIL}{number}" for number in range(10)]}
        for label in about["labels"].values():
            label |= {"meaning": EVIL, "source": EVIL}
        header |= {"files": [EVIL + "1", EVIL + "\ud800", EVIL + "3"]}
        header["strings"] = [[number, EVIL] for number, _ in header["strings"]]

    path = tmp_path / "hostile.safetensors"
    path.write_bytes(changed(corpus_file(), change))
    text, both, *_ = look_at(path, format_of(corpus_file()))
    for shown in (text, both):
        assert shown.isprintable()
        assert r"a\x1b[31m" in shown
    page = corpus_report(CorpusSummary.load(path), tmp_path / "page.html").read_text("utf-8")
    assert "<b>$" not in page
    assert "\x1b" not in page
    assert corpus_json(path, tmp_path / "corpus.json").read_text("utf-8").isascii()
