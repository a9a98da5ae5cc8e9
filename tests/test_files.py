"""Every file is whole under its name, whoever else writes it, and as readable as the user's other files."""

from __future__ import annotations

import ast
import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from forked import processes

import llama_attn
from llama_attn import AttentionStats
from llama_attn.stats.files import complete_file

WRITERS, SECONDS = 4, 1.0


@pytest.fixture
def stats(ids):
    with torch.no_grad():
        return tiny_model()(ids, output_attention_stats=True).attention_stats


def _save_for_a_while(stats, path, failures):
    stop = time.monotonic() + SECONDS
    while time.monotonic() < stop:
        try:
            stats.save(path)
        except OSError as error:
            failures.append(repr(error))


def _save_in_a_process(source, path, queue):
    failures: list[str] = []
    _save_for_a_while(AttentionStats.load(source), path, failures)
    queue.put(failures)


def _load_beside(writers, path, stats):
    """Load as often as there is time while the writers run, each time a whole file; how often that was."""
    loads = 0
    for writer in writers:
        writer.start()
    try:
        while any(writer.is_alive() for writer in writers):
            loaded = AttentionStats.load(path)
            assert torch.equal(loaded["entropy"], stats["entropy"])
            loads += 1
    finally:
        for writer in writers:
            writer.join()
    return loads


def test_threads_that_save_the_same_path(stats, tmp_path):
    path, failures = tmp_path / "run.safetensors", []
    stats.save(path)
    writers = [threading.Thread(target=_save_for_a_while, args=(stats, path, failures)) for _ in range(WRITERS)]
    assert _load_beside(writers, path, stats) > 3
    assert failures == []
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_save_the_same_path(stats, tmp_path):
    path, source = tmp_path / "out" / "run.safetensors", tmp_path / "source.safetensors"
    path.parent.mkdir()
    stats.save(source)
    stats.save(path)
    queue = processes.Queue()
    writers = [processes.Process(target=_save_in_a_process, args=(source, path, queue)) for _ in range(2)]
    assert _load_beside(writers, path, stats) > 3
    assert [queue.get(timeout=10) for _ in writers] == [[], []]
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_path_do_not_share_a_name(tmp_path):
    path = tmp_path / "a.txt"
    with complete_file(path) as first:
        first.write_text("first")
        with complete_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_are_those_of_the_umask_or_of_the_file_before(umask, expected, stats, tmp_path):
    before = os.umask(umask)
    try:
        stats.save(path := tmp_path / "run.safetensors")
        with complete_file(text := tmp_path / "a.txt") as unfinished:
            unfinished.write_text("a")
        assert [stat.S_IMODE(p.stat().st_mode) for p in (path, text)] == [expected] * 2
        path.chmod(0o604)
        stats.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_what_cannot_be_a_file(stats, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match=r"path: '.*pipe' is a device or a pipe"):
        stats.save(tmp_path / "pipe")
    with pytest.raises(ZeroDivisionError), complete_file(tmp_path / "a"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    stats.save(tmp_path / ("n" * 255))
    assert stat.S_ISREG((tmp_path / ("n" * 255)).stat().st_mode)


# Calls that make a file.
WRITING = {"write_text", "write_bytes", "savefig", "save_file", "to_csv", "to_html", "to_netcdf", "write_html"}


def loose_writers(tree: ast.AST) -> list[str]:
    """Calls that write a file under a name which is not that of `complete_file`."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any("complete_file" in ast.unparse(item.context_expr) for item in node.items):
            inside |= set(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in inside:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            mode = [a.value for a in (*node.args[1:], *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            opened = name in ("open", "fdopen") and any(isinstance(m, str) and set(m) & set("wax") for m in mode)
            if (name in WRITING and not (node.args and ast.unparse(node.args[0]) == "buffer")) or opened:
                found.append(ast.unparse(node))
    return found


def test_every_writer_of_the_package_goes_through_the_one():
    files = Path(llama_attn.__file__).parent.rglob("*.py")
    assert {str(file): loose for file in files if (loose := loose_writers(ast.parse(file.read_text())))} == {}
    for code in ("path.write_text('a')", "open(path, 'w')", "figure.savefig(path)", "frame.to_csv(out)"):
        assert loose_writers(ast.parse(code)), "the check can fail"
