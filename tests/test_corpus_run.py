"""A run over a corpus: on several processes, killed and started again, over damaged files; and what it refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli_models
import pandas
import pytest
from corpora import assert_same, measured, run, write
from corpus_process import hold, measure
from filelock import FileLock
from forked import processes
from test_cli import invoke

from llama_attn.cli.corpus import _places
from llama_attn.corpus import CorpusSummary, compare
from llama_attn.corpus.batches import Reader
from llama_attn.corpus.hub import HubDataset, is_hub_dataset
from llama_attn.corpus.records import find_files, read, survey
from llama_attn.corpus.run import SHARDS, SKIPPED, SUMMARY, Run

COUNT, EVERY, KILLS = 90, 4, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write(folder, parts=2, count=COUNT)
    return folder


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return measured(folder, tmp_path_factory.mktemp("run"), every=EVERY)


def started(folder, out, number=1, killed_after=None, every=EVERY):
    """So many processes at once."""
    found = [
        processes.Process(target=measure, args=(str(folder), str(out), every, killed_after)) for _ in range(number)
    ]
    for process in found:
        process.start()
    return found


def ended(found):
    for process in found:
        process.join(120)
    return [process.exitcode for process in found]


@pytest.mark.parametrize("number", [2, 3])
def test_several_processes(number, folder, expected, tmp_path):
    assert ended(started(folder, tmp_path, number)) == [0] * number
    assert_same(CorpusSummary.load(tmp_path / SUMMARY), expected)


def test_killed_and_started_again(folder, expected, tmp_path):
    """Twenty times at a random moment, then to the end: no text is lost, none counted twice."""
    draw, codes, done = random.Random(0), [], []  # noqa: S311
    begun = time.perf_counter()
    assert ended(started(folder, tmp_path / "whole")) == [0]
    whole = time.perf_counter() - begun
    shards, patience = tmp_path / "run" / SHARDS, 1.0
    for _ in range(KILLS):
        codes += ended(started(folder, tmp_path / "run", killed_after=draw.uniform(0.02, 0.1) * whole * patience))
        done.append(len([*shards.glob("*.safetensors")]))
        # A machine that is busier than when the whole was timed gets nothing done in a part of that time.
        patience = 1.0 if done[-1] > max(done[:-1], default=0) else 1.3 * patience
    assert codes.count(-signal.SIGKILL) >= KILLS / 2, "too late to hit anything"
    assert len({*done}) > 3, "the kills fell between the same shards"
    assert ended(started(folder, tmp_path / "run")) == [0]
    assert_same(CorpusSummary.load(tmp_path / "run" / SUMMARY), expected)


def test_the_work_of_a_dead_process_is_taken_over(folder, expected, tmp_path):
    """One holds a shard for ever; once it is killed, the other, which has waited for it, goes on."""
    begun = run(folder, tmp_path, every=EVERY)
    begun.begin()
    lock = tmp_path / SHARDS / "000003.lock"
    holder = processes.Process(target=hold, args=(str(lock),))
    holder.start()
    while not lock.exists():
        time.sleep(0.01)
    other = started(folder, tmp_path)
    deadline = time.monotonic() + 60
    while len([*(tmp_path / SHARDS).glob("*.safetensors")]) < len(begun.shards) - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert other[0].is_alive()
    assert not (tmp_path / SUMMARY).exists()
    os.kill(holder.pid, signal.SIGKILL)
    assert ended(other) == [0]
    assert_same(CorpusSummary.load(tmp_path / SUMMARY), expected)


def test_what_another_process_did_meanwhile_is_not_done_again(folder, expected, tmp_path, monkeypatch):
    """Between looking for a shard and locking it, it appears."""
    measured(folder, tmp_path / "other", every=EVERY)

    def acquire(lock, take=FileLock.acquire):
        done = tmp_path / "other" / SHARDS / Path(lock.lock_file).with_suffix(".safetensors").name
        for path in (done, done.with_suffix("").with_suffix(f".{SKIPPED}")):
            if path.exists():
                shutil.copy(path, tmp_path / "run" / SHARDS)
        return take(lock)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    monkeypatch.setattr(Reader, "measure", lambda *arguments: pytest.fail("measured again"))
    assert_same(measured(folder, tmp_path / "run", every=EVERY), expected)


def test_a_damaged_shard_is_measured_again(folder, expected, tmp_path):
    measured(folder, tmp_path, every=EVERY)
    shard = tmp_path / SHARDS / "000002.safetensors"
    whole = bytearray(shard.read_bytes())
    for damage in (lambda file: file[:-100], lambda file: file[:5000] + b"\xff" + file[5001:]):
        shard.write_bytes(damage(bytes(whole)))
        (tmp_path / SUMMARY).write_bytes(b"damaged too")
        assert_same(measured(folder, tmp_path, every=EVERY), expected)
        assert shard.stat().st_size == len(whole)


def test_a_full_disk_leaves_what_is_done(folder, expected, tmp_path, monkeypatch):
    written = []

    def full(self, path, save=CorpusSummary.save):
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        save(self, path)

    monkeypatch.setattr(CorpusSummary, "save", full)
    with pytest.raises(OSError, match="No space left"):
        measured(folder, tmp_path, every=EVERY)
    assert len([*(tmp_path / SHARDS).glob("*.safetensors")]) == 3
    assert_same(measured(folder, tmp_path, every=EVERY), expected)


def lines(path: Path, *records: bytes) -> Path:
    path.write_bytes(b"\n".join(records) + b"\n")
    return path


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_attn.corpus.records.LONGEST_LINE", 5000)
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    lines(
        data / "a.jsonl", b'\xef\xbb\xbf{"text": "first"}', b"", b'{"txt": "x"}', b"[1, 2]", b'{"text": 5}', b'{"text": " "}',
        b'{"text": "\xff\xfe"}', b"{", b'{"text": "a \xc2\xa7 b"}', b'{"text": "' + b"x" * 9000 + b'"}', b"   ", b'{"text": "last"}',
        b"[" * 4000,
    )  # fmt: skip
    lines(data / "more" / "b.txt", b"a line", b"\xe4\xf6\xfc", "ein Gr\u00fc\u00df".encode(), b"\r")
    lines(data / "empty.txt")
    (data / "c.parquet").write_bytes(b"PAR1 cut off")
    (data / "ignored.csv").write_text("x")
    found = measured(data, tmp_path / "out", every=2)
    assert (found.texts, found.skipped) == (4, 11)
    skipped = [json.loads(line) for line in (tmp_path / "out" / SKIPPED).read_text().splitlines()]
    reasons = {(entry["file"], entry["line"]): entry["reason"] for entry in skipped}
    expected = {
        ("a.jsonl", 3): "no field 'text'; there are ['txt']",
        ("a.jsonl", 4): "expected an object with the field 'text', got list",
        ("a.jsonl", 5): "field 'text': expected text, got int",
        ("a.jsonl", 6): "field 'text': no text in it",
        ("a.jsonl", 7): "not UTF-8: byte 10 is 0xff",
        ("a.jsonl", 8): "not JSON: ",
        ("a.jsonl", 9): "the tokenizer fails: RuntimeError: a letter that I do not know",
        ("a.jsonl", 10): "a line of 9,013 bytes, more than 5,000",
        ("a.jsonl", 13): "not JSON: ",
        ("more/b.txt", 2): "not UTF-8: byte 0 is 0xe4",
        ("c.parquet", 0): "",
    }
    assert {*reasons} == {*expected}
    for place, reason in expected.items():
        assert reasons[place].startswith(reason), place
    assert "Parquet" in reasons["c.parquet", 0]
    assert {found.files[number] for number in found.sample.file} == {"a.jsonl", "more/b.txt"}


def test_tables(tmp_path):
    import pyarrow
    from pyarrow import parquet

    values = [f"row {number}" for number in range(23)]
    values[5] = None
    table = pyarrow.table({"text": values, "number": range(23)})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    source = survey("t.parquet", tmp_path / "t.parquet", 4)
    assert (source.records, source.unreadable, len(source.starts)) == (23, "", 6)
    found = [record for start in source.starts for record in read(source, start, min(4, 23 - start[0]), "text")]
    assert [record.text or record.unreadable for record in found] == [
        value or "field 'text': expected text, got NoneType" for value in values
    ]
    assert [record.line for record in found] == [*range(1, 24)]
    other = [*read(source, source.starts[1], 4, "body")]
    assert [record.unreadable for record in other] == ["no column 'body'; there are ['text', 'number']"] * 4
    whole = (tmp_path / "t.parquet").read_bytes()
    # Its end is as it was, what it leads to is not.
    (tmp_path / "t.parquet").write_bytes(whole[:4] + b"\x7f" * 150 + whole[154:])
    damaged = survey("t.parquet", tmp_path / "t.parquet", 23)
    broken = [*read(damaged, damaged.starts[0], 23, "text")]
    assert len(broken) == 23
    assert broken[0].unreadable
    assert broken[-1].text == "row 22"


def test_datasets(tmp_path, monkeypatch):
    """A folder is read as a dataset of the hub is."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    write(folder, parts=2, count=30)
    source = HubDataset(str(folder), None, "train").survey(7, 31)
    assert (source.records, len(source.starts)) == (31, 5)
    found = [record for start in source.starts for record in read(source, start, min(7, 31 - start[0]), "text")]
    written = [json.loads(line)["text"] for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    assert [record.text for record in found] == written[:31]
    assert [record.line for record in found] == [*range(1, 32)]
    other = [*read(source, source.starts[4], 3, "body")]
    assert [record.unreadable for record in other] == ["no field 'body'; there are ['text']"] * 3
    with pytest.raises(ValueError, match="--limit: nobody knows how many records"):
        HubDataset(str(folder), None, "train").survey(7, None)
    with pytest.raises(ValueError, match="there is no dataset nobody/nothing"):
        HubDataset("nobody/nothing", None, "train").survey(7, 5)
    assert is_hub_dataset("owner/name")
    assert not any(map(is_hub_dataset, (str(folder), "name", "owner/file.txt", "a/b/c")))


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "x.csv").write_text("x")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text("x")
    for given, message in (
        (["missing.txt"], "there is no file or folder missing.txt"),
        ([str(tmp_path / "nothing")], r"has no file that ends in .txt, .jsonl, .parquet"),
        ([str(tmp_path / "x.csv")], r"expected a file that ends in .txt, .jsonl, .parquet, got"),
        ([str(tmp_path / name / "same.txt") for name in "ab"], "two files are called same.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            find_files(given)
    assert [name for name, _ in find_files([str(tmp_path)])] == ["a/same.txt", "b/same.txt"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cli_models.save("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture
def words(tmp_path):
    draw = random.Random(1)  # noqa: S311
    made = [" ".join(draw.choices(["the", "cat", "sat", "on", "a", "mat"], k=draw.randint(1, 30))) for _ in range(40)]
    return lines(tmp_path / "words.txt", *(text.encode() for text in made))


def test_the_command(checkpoint, words, tmp_path):
    def command(out, *options):
        return invoke(
            "corpus", checkpoint, words, "--out", tmp_path / out, "--max-tokens", "16", "--dtype", "float32", *options
        )

    first = command("one", "--shard-records", "7")
    assert first.exit_code == 0, first.output
    assert "40 texts, " in first.output
    assert f"{SUMMARY} is in " in first.output
    found = CorpusSummary.load(tmp_path / "one" / SUMMARY)
    assert found.texts == 40
    assert found.cut > 0
    again = command("one", "--shard-records", "7")
    assert again.exit_code == 0
    assert "was finished before" in again.output
    for option, value, message in (
        ("--max-tokens", "17", "max_tokens was 16, and is now 17"),
        ("--limit", "3", "limit was None, and is now 3"),
        ("--statistics", "induction", "config was {'statistics':"),
        ("--layers", "0-0", "config was {'layers': None}, and is now {'layers': [0]}"),
    ):
        other = command("one", "--shard-records", "7", option, value)
        assert other.exit_code == 2
        assert message in other.output
    size = words.stat().st_size
    words.write_text("other words\n")
    other = command("one", "--shard-records", "7")
    assert other.exit_code == 2
    assert f"one is of other texts: words.txt has 12 bytes, and had {size:,}; choose another --out" in other.output
    words.write_text("more words..\n"[:12])
    assert command("two").exit_code == 0
    words.write_text("some words..\n"[:12])
    assert "words.txt has another content than it had" in command("two").output
    words.rename(tmp_path / "others.txt")
    words = tmp_path / "others.txt"
    assert "words.txt was among them, and is not now" in command("two").output


def test_a_command_that_is_stopped(checkpoint, words, tmp_path, monkeypatch):
    """By Ctrl-C, when the second shard is claimed."""
    command = ("corpus", checkpoint, words, "--out", tmp_path / "run", "--max-tokens", "16", "--dtype", "float32")
    claim, claimed = Run._claim, []

    def stopped(run, shard, progress):
        claimed.append(shard)
        if len(claimed) == 2:
            raise KeyboardInterrupt
        return claim(run, shard, progress)

    monkeypatch.setattr(Run, "_claim", stopped)
    found = invoke(*command, "--shard-records", "7")
    assert found.exit_code == 130
    said = " ".join(found.output.split())
    assert "stopped; 1 of 6 shards are complete in" in said
    assert said.endswith("and the same command goes on from there")
    monkeypatch.undo()
    again = invoke(*command, "--shard-records", "7").output
    assert f"1 of 6 shards are complete in {tmp_path / 'run'}; going on from there\n" in again
    assert "40 texts, " in again
    assert "going on" not in invoke(*command, "--shard-records", "7").output


def test_several_files_of_lines(checkpoint, tmp_path):
    for name, text in (("a.txt", "the cat\nsat\n"), ("b.txt", "on a mat\n")):
        (tmp_path / name).write_text(text)

    def command(*files):
        return invoke("corpus", checkpoint, *(tmp_path / file for file in files), "--out", tmp_path / "out")

    assert "3 texts (lines of 2 files), " in command("a.txt", "b.txt").output
    (tmp_path / "c.txt").write_text("and more\n")
    grown = command("a.txt", "b.txt", "c.txt").output
    assert "c.txt was not among them, and is now (what is new can be measured by itself, and llama-attn merge" in grown


def test_where_texts_stood():
    assert _places(["a.txt"]) == ""
    assert _places(["a.txt", "b.jsonl"]) == " (lines of 2 files)"
    assert _places(["a.parquet", "b.parquet"]) == " (rows of 2 files)"
    assert _places(["a.parquet", "owner/name"]) == " (records of 2 files)"


def test_merging_runs(checkpoint, words, tmp_path):
    written = words.read_text().splitlines()
    for name, part in (("one", written[:25]), ("two", written[25:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part) + "\n")
        result = invoke("corpus", checkpoint, tmp_path / f"{name}.txt", "--out", tmp_path / name, "--dtype", "float32")
        assert result.exit_code == 0, result.output
    (tmp_path / "two" / SUMMARY).unlink()
    result = invoke("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both.safetensors")
    assert result.exit_code == 0, result.output
    assert "40 texts" in result.output
    in_both = {*written[:25]} & {*written[25:]}
    said = f"{len(in_both)} are in more than one of FOLDERS" if in_both else "40 texts"
    assert said in result.output
    assert ("more than one of FOLDERS" in result.output) == bool(in_both)
    both = CorpusSummary.load(tmp_path / "both.safetensors")
    assert both.files == ("one.txt", "two.txt")
    one = CorpusSummary.load(tmp_path / "one" / SUMMARY)
    assert both.tokens > one.tokens
    # Two corpora are compared by the same command as two runs.
    files = tmp_path / "one" / SUMMARY, tmp_path / "both.safetensors"
    result = invoke("compare", *files, "--statistic", "entropy", "--out", tmp_path / "all.csv", "--top", "3")
    assert result.exit_code == 0, result.output
    assert "texts_a: 25" in result.output
    assert "texts_b: 40" in result.output
    assert "texts_in_both: 25" in result.output
    assert "paired" in result.output
    other = tmp_path / "other.txt"
    other.write_text("something else\nand more of it\n")
    invoke("corpus", checkpoint, other, "--out", tmp_path / "other", "--dtype", "float32")
    unpaired = invoke("compare", files[0], tmp_path / "other" / SUMMARY)
    assert unpaired.exit_code == 0, unpaired.output
    assert "texts_in_both: 0" in unpaired.output
    # Names are whole.
    assert "mean_distance" in unpaired.output
    assert "paired" not in unpaired.output
    frame, expected = pandas.read_csv(tmp_path / "all.csv"), compare(one, both)
    assert frame.effect.tolist() == pytest.approx(expected.effect.tolist(), nan_ok=True)
    strongest = expected[expected.statistic == "entropy"].iloc[0]
    assert f"{strongest.effect:.3g}" in result.output
    other = invoke("compare", files[0], tmp_path / "one.txt")
    assert other.exit_code == 2
    assert "one.txt is none" in " ".join(other.output.split())
    assert invoke("compare", *files, "--plot", tmp_path / "x.png").exit_code == 2
    again = invoke("merge", tmp_path / "one", tmp_path / "two" / ".." / "one", "--out", tmp_path / "x")
    assert again.exit_code == 2
    assert "one is given twice, and its texts would count twice" in again.output
    # Few texts are all in the samples; of more, it is said how many were looked at.
    apart = ("merge", tmp_path / "one", tmp_path / "other", "--out", tmp_path / "x")
    assert "as far as a sample" not in invoke(*apart).output
    CorpusSummary.merge([CorpusSummary.load(tmp_path / "other" / SUMMARY)] * 65).save(tmp_path / "other" / SUMMARY)
    assert "as far as a sample" in invoke(*apart).output
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    again = invoke("merge", tmp_path / "one", tmp_path / "copy", "--out", tmp_path / "x")
    of = len({*written[:25]})
    assert f"warning: of {of} sampled texts {of} are in more than one of FOLDERS, and count each time" in again.output
    assert invoke("merge", tmp_path / "nothing", "--out", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--statistics", "weights_map"], r"statistics: ['weights_map'] do not add up"),
        (["--statistics", "entropie"], "entropie"),
        (["--layers", "one"], "--layers: expected something like 0-9, 3,5,7 or all, got 'one'"),
        (["--dtype", "int8"], "--dtype: expected one of"),
    ],
)
def test_options_that_cannot_be(options, message, checkpoint, words, tmp_path):
    result = invoke("corpus", checkpoint, words, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_nothing_that_can_be_read(checkpoint, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    result = invoke("corpus", checkpoint, tmp_path / "empty.txt", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "there is no text in empty.txt" in result.output
    lines(tmp_path / "bad.jsonl", b"{", b'{"a": 1}')
    result = invoke("corpus", checkpoint, tmp_path / "bad.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "none of 2 records could be read" in result.output
    (tmp_path / "file").write_text("")
    lines(tmp_path / "good.txt", b"the cat")
    result = invoke("corpus", checkpoint, tmp_path / "good.txt", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "--out: cannot write to" in result.output


def test_on_a_launcher(checkpoint, words, tmp_path):
    alone = invoke(
        "corpus", checkpoint, words, "--out", tmp_path / "alone", "--dtype", "float32", "--shard-records", "5"
    )
    assert alone.exit_code == 0, alone.output
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m",
        "llama_attn.corpus", checkpoint, words, "--out", tmp_path / "two", "--dtype", "float32", "--shard-records", "5",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert_same(CorpusSummary.load(tmp_path / "two" / SUMMARY), CorpusSummary.load(tmp_path / "alone" / SUMMARY))
