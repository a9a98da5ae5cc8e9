"""The command on several processes of a launcher, each with the model or all with one; and what is said of them."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys

import cli_models
import pytest
from corpora import assert_same, measured, run, write
from test_cli import invoke

from llama_attn.corpus import CorpusSummary
from llama_attn.corpus.run import SHARDS, SUMMARY


@pytest.mark.parametrize("option", [[], ["--tensor-parallel"]], ids=["a model each", "one model"])
def test_two_processes(option, tmp_path):
    """They measure what one does, and say it once."""
    checkpoint, texts = cli_models.save("llama", tmp_path / "llama"), tmp_path / "texts.txt"
    draw = random.Random(1)  # noqa: S311
    words = ["the", "cat", "sat", "on", "a", "mat"]
    texts.write_text("".join(f"{' '.join(draw.choices(words, k=draw.randint(1, 30)))}\n" for _ in range(40)))
    arguments = [str(part) for part in (checkpoint, texts, "--dtype", "float64", "--shard-records", "7")]
    alone = invoke("corpus", *arguments, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    said = subprocess.run(
        [*command, "llama_attn.corpus", *arguments, "--out", str(tmp_path / "two"), *option],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.count(" texts, ") == 1, said.stdout
    assert said.stdout.count("report.html") == 1, said.stdout
    assert_same(*(CorpusSummary.load(tmp_path / name / SUMMARY) for name in ("alone", "two")))


def test_progress_counts_what_others_measure(tmp_path):
    """Once each: what was done before, and what is done meanwhile."""
    write(tmp_path / "texts", parts=1, count=60)
    measured(tmp_path / "texts", tmp_path / "theirs")
    mine = run(tmp_path / "texts", tmp_path / "mine")
    mine.begin()

    def theirs(number):
        for path in (tmp_path / "theirs" / SHARDS).glob(f"{number:06}.*"):
            shutil.copy(path, tmp_path / "mine" / SHARDS)

    theirs(1)
    told = []

    def progress(texts, tokens):
        if tokens and not any(tokens for _, tokens in told):
            theirs(4)
        told.append((texts, tokens))

    mine.measure(progress)
    assert sum(texts for texts, _ in told) == sum(shard.records for shard in mine.shards) == 63
    assert told.count((10, 0)) == 2
