"""Which library the native engine runs: that of this very processor, else the best of the wheel that the processor can."""

from __future__ import annotations

import platform
import re
import subprocess
import sys

import pytest
import torch
from forked import Python
from typer.testing import CliRunner

from llama_attn import engines
from llama_attn.cli import app
from llama_attn.engines import _compiler, _library as library, native

pytestmark = pytest.mark.usefixtures("built_native")
V4, V3 = _compiler.PORTABLE["x86_64"].values()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with the wheel's libraries for both instruction sets, whose files are empty, and none of its own."""

    def change(flags=V4, brought=("x86-64-v4", "x86-64-v3"), built=False, named=None):
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(_compiler, "processor_flags", lambda: frozenset(flags))
        monkeypatch.setattr(_compiler, "portable", lambda: {isa: tmp_path / isa for isa in ("x86-64-v4", "x86-64-v3")})
        for isa in brought:
            (tmp_path / isa).touch()
        monkeypatch.setenv("LLAMA_ATTN_CACHE", str(tmp_path))
        monkeypatch.delenv("LLAMA_ATTN_ISA", raising=False)
        if named is not None:
            monkeypatch.setenv("LLAMA_ATTN_ISA", named)
        library.choices.cache_clear()
        if built:
            library.own().touch()

    yield change
    monkeypatch.undo()
    library.choices.cache_clear()


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, "x86-64-v4"),
        ({"flags": V4 - {"avx512cd"}}, "x86-64-v3"),
        ({"flags": V4 - {"avx512vl", "bmi2"}}, "native"),
        ({"flags": ()}, "native"),
        ({"brought": ["x86-64-v3"]}, "x86-64-v3"),
        ({"brought": []}, "native"),
        ({"built": True}, "native"),
        ({"named": "x86-64-v3"}, "x86-64-v3"),
        ({"named": "x86-64-v3", "built": True}, "x86-64-v3"),
        ({"named": "native"}, "native"),
    ],
)
def test_the_best_that_runs_here(settings, chosen, machine, tmp_path):
    machine(**settings)
    assert library.name() == chosen
    assert library.path() == (library.own() if chosen == "native" else tmp_path / chosen)


@pytest.mark.parametrize(
    ("settings", "choices"),
    [
        ({"named": "avx512"}, ["native", "x86-64-v4", "x86-64-v3"]),
        ({"named": ""}, ["native", "x86-64-v4", "x86-64-v3"]),
        ({"named": "x86-64-v4", "flags": V3}, ["native", "x86-64-v3"]),
        ({"named": "x86-64-v4", "brought": ["x86-64-v3"]}, ["native", "x86-64-v3"]),
    ],
)
def test_what_cannot_be_chosen(settings, choices, machine):
    machine(**settings)
    with pytest.raises(ValueError, match=r"LLAMA_ATTN_ISA: expected one of .* processor runs, got") as raised:
        native.unavailable()
    assert str(choices) in str(raised.value)
    assert repr(settings["named"]) in str(raised.value)


def test_a_library_is_no_engine():
    """A wheel, and an installation from the sources, brings libraries into the folder of the engines."""
    assert engines.ENGINES == ("native", "torch", "triton")


def test_a_wrong_choice_ends_the_import():
    code = "import os; os.environ['LLAMA_ATTN_ISA'] = 'x86-64-v9'; import llama_attn.engines"
    status, said = Python("-c", code).ended()
    assert status == 1
    assert "ValueError: LLAMA_ATTN_ISA: expected one of ['native'" in said


def test_a_torch_that_shows_its_openmp_to_nobody():
    """As its wheels for ARM do; a flag of theirs for all others is taken away here."""
    code = (
        "import ctypes; shown, ctypes.RTLD_GLOBAL = ctypes.RTLD_GLOBAL, ctypes.RTLD_LOCAL; import torch; "
        "ctypes.RTLD_GLOBAL = shown; from llama_attn.engines import native; print(native.unavailable()); "
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["None", "1"], result.stdout + result.stderr


def test_a_library_outlives_torch_and_no_change_of_the_sources(monkeypatch, tmp_path):
    before = library.own(), _compiler.digest("x86-64-v3")
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert (library.own(), _compiler.digest("x86-64-v3")) == before
    for source in _compiler.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(_compiler, "SOURCES", tmp_path)
    assert (library.own(), _compiler.digest("x86-64-v3")) == before
    (tmp_path / "tile.h").write_text((tmp_path / "tile.h").read_text() + "\n")
    assert library.own() != before[0]
    assert _compiler.digest("x86-64-v3") != before[1]


@pytest.mark.parametrize(("name", "other"), [("ABI", 99), ("Call", library.Tensor)])
def test_another_library_is_refused(name, other, monkeypatch):
    ours = library.ABI
    monkeypatch.setattr(library, name, other)
    library.load.cache_clear()
    expected = "99 and" if name == "ABI" else f"{ours} and 80 bytes"
    numbers = rf"takes calls of ABI {ours} and \d{{4}} bytes, expected ABI {expected}"
    with pytest.raises(ImportError, match=numbers):
        library.load(library.path())
    assert "remove it and run `llama-attn build`" in native.unavailable()
    monkeypatch.undo()
    assert native.unavailable() is None


def test_a_file_that_is_no_library(machine):
    machine()
    assert "cannot be loaded" in native.unavailable()
    assert str(library.path()) in native.unavailable()


@pytest.fixture
def on_x86_64():
    if platform.machine() != "x86_64" or not _compiler.is_gcc(_compiler.compiler()):
        pytest.skip("it takes a GCC for x86-64")


@pytest.mark.usefixtures("on_x86_64")
def test_what_the_compiler_says_of_this_processor(tmp_path):
    """The compiler asks the processor itself."""
    code = 'int main() { return !!__builtin_cpu_supports("x86-64-v3") + 2 * !!__builtin_cpu_supports("x86-64-v4"); }'
    (tmp_path / "levels.cpp").write_text(code)
    subprocess.run([_compiler.compiler(), "levels.cpp", "-o", "levels"], cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "levels"], check=False).returncode
    able = _compiler.processor_flags()
    assert said == V3.issubset(able) + 2 * V4.issubset(able)


@pytest.mark.usefixtures("on_x86_64")
@pytest.mark.parametrize("isa", ["x86-64-v3", "x86-64-v4"])
def test_what_the_compiler_takes_for_granted(isa):
    """The extensions that it may use: those it says so of in its macros."""
    other_names = {
        "sse3": "pni", "bmi": "bmi1", "lzcnt": "abm", "lahf_sahf": "lahf_lm", "crc32": "sse4_2",
        "gcc_have_sync_compare_and_swap_16": "cx16",
    }  # fmt: skip

    def macros(march):
        command = [_compiler.compiler(), f"-march={march}", "-dM", "-E", "-x", "c++", "/dev/null"]
        return set(
            re.findall(
                "define __(.*?)_* 1$",
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.lower(),
                re.MULTILINE,
            )
        )

    names = {other_names.get(name, name) for name in macros(isa) - macros("x86-64") if not name.startswith("fp_fast")}
    assert _compiler.PORTABLE["x86_64"][isa] == names


def test_the_command_line_names_it():
    output = CliRunner().invoke(app, ["backends"]).output
    assert f"the native engine runs its library for {library.name()}: {library.path()}" in output
