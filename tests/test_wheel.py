"""The wheel: what is in it, that it runs where there is neither tree nor compiler, and on which systems it can."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from llama_attn.engines import _compiler

ROOT = Path(__file__).parent.parent
# Instruction sets of a wheel as the assembler calls them. Return addresses are guarded by instructions that do nothing,
# or are not reached, on processors that know no such guards.
GUARDS = "+ibt+shstk"
AS_V3 = "generic64+cx16+popcnt+sse4.2+avx2+bmi+bmi2+f16c+fma+lzcnt+movbe" + GUARDS
ASSEMBLER = {
    "x86-64-v3": AS_V3,
    "x86-64-v4": AS_V3 + "+avx512f+avx512bw+avx512cd+avx512dq+avx512vl",
    # Atomic operations of newer processors lie in functions that ask first.
    "armv8-a": "armv8-a+lse",
}
SETS = list(_compiler.PORTABLE.get(platform.machine(), {})) if sys.platform == "linux" else []
RUNNABLE = [isa for isa in SETS if _compiler.PORTABLE[platform.machine()][isa] <= _compiler.processor_flags()]

# Statistics of a model with a layer's weights at hand, which the test takes an entropy of; and what is mapped.
FORWARD = """
import json, sys, torch, llama_attn
from pathlib import Path
from transformers import LlamaConfig
from llama_attn.engines import _library
torch.manual_seed(0)
torch.set_num_threads(2)
config = LlamaConfig(vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=2, initializer_range=0.3)
model = llama_attn.LlamaForCausalLM._from_config(config, attn_implementation="streaming").eval()
ids = torch.arange(40)[None] * 7 % 50
with torch.no_grad():
    stats = model(ids, output_attention_stats=True).attention_stats
    model.set_attn_implementation("eager")
    weights = torch.stack(model(ids, output_attentions=True).attentions).double()
mapped = sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})
error = (stats["entropy"] - torch.special.entr(weights).sum(-1)).abs().max().item()
print(json.dumps([llama_attn.__file__, stats.engine, _library.name(), str(_library.path()), error, mapped]))
"""


def hatchling(folder: Path, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "hatchling", "build", *arguments]
    result = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    hatchling(ROOT, "-t", "sdist", "-d", str(folder))
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def tree(sdist, tmp_path_factory):
    """What the sdist holds, with the wheel built in it, in ``dist``."""
    try:
        usable = SETS and _compiler.is_gcc(_compiler.compiler())
    except RuntimeError as error:
        pytest.skip(str(error))
    if not usable:
        pytest.skip("wheels with libraries are built by GCC on Linux")
    folder = unpacked(sdist, tmp_path_factory.mktemp("tree"))
    hatchling(folder, "-t", "wheel")
    return folder


@pytest.fixture(scope="module")
def wheel(tree):
    return next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run(pip, check=True)
    return folder


@pytest.fixture(scope="module")
def libraries(installed):
    """The file for each instruction set."""
    return {isa: next((installed / "llama_attn" / "engines").glob(f"native-{isa}-*.so")) for isa in SETS}


def test_what_is_in_it(sdist, wheel, libraries):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert any(name.endswith("/hatch_build.py") for name in names)
    assert not any(name.endswith(".so") for name in names), "the sdist is for every machine"
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name).name for name in archive.namelist()]
        about = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        tag = re.search("^Tag: (.*)$", archive.read(about).decode(), re.MULTILINE)[1]
    assert [name for name in names if name.endswith(".so")] == sorted(path.name for path in libraries.values())
    assert {"forward.cpp", "exports.map"} < set(names), "`llama-attn build` works from it"
    assert "hatch_build.py" not in names
    assert re.fullmatch(rf"py3-none-manylinux_2_\d+_{platform.machine()}", tag)
    assert wheel.stem.endswith(tag)


@pytest.mark.parametrize("isa", [None, *RUNNABLE])
def test_it_runs_elsewhere(isa, installed, tmp_path):
    """The fast engine, with no compiler and nothing built; on torch's own OpenMP and no other."""
    environment = os.environ | {"PATH": "", "PYTHONPATH": str(installed), "LLAMA_ATTN_CACHE": str(tmp_path)}
    environment.pop("LLAMA_ATTN_ISA", None)
    if isa is not None:
        environment["LLAMA_ATTN_ISA"] = isa
    command = [sys.executable, "-c", FORWARD]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    module, engine, name, path, error, mapped = json.loads(result.stdout)
    assert Path(module).is_relative_to(installed)
    assert engine == "native"
    assert name == (isa or RUNNABLE[0])
    assert Path(path).is_relative_to(installed)
    assert path in mapped
    assert error < 1e-5
    openmp = [library for library in mapped if re.search("gomp|omp5|libomp", Path(library).name)]
    assert len(openmp) == 1, openmp
    assert "/torch" in openmp[0]


def test_what_it_takes_from_the_system(wheel, libraries):
    """The C library alone, and no newer one than the tag says."""
    versions = []
    for path in libraries.values():
        needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path))
        assert {name.split(".")[0] for name in needed} <= {"libc", "libm", "ld-linux-x86-64", "ld-linux-aarch64"}
        versions += [int(minor) for minor in re.findall(r"Name: GLIBC_2\.(\d+)", run("readelf", "-V", path))]
    assert f"manylinux_2_{max(versions)}_" in wheel.name


def test_what_it_shows(libraries):
    for path in libraries.values():
        names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", path).splitlines()]
        ours = ["llama_attn_abi", "llama_attn_backward", "llama_attn_call_size", "llama_attn_forward"]
        assert names == ours, "what it has of the C++ library is nobody else's"


@pytest.mark.parametrize("isa", SETS)
def test_no_instruction_of_another_processor(isa, libraries, tmp_path):
    """Every instruction, once, is given to an assembler that knows those of the instruction set and no others."""
    code = {
        line.split("\t")[1]
        for line in run("objdump", "-d", "--no-show-raw-insn", libraries[isa]).splitlines()
        if "\t" in line
    }
    code = {re.sub(r"#.*|<.*>|//.*", "", line).strip() for line in code}
    # Addresses to jump to, as they are written, are no labels; what does nothing has prefixes that nobody writes.
    code = sorted(line for line in code if not re.fullmatch(r"[\w. ,]* [\da-f]+|.*\bnopw?\b.*", line))
    assert len(code) > 5_000
    (tmp_path / "code.s").write_text("\n".join(code) + "\n")
    assert assembles(ASSEMBLER[isa], tmp_path)
    if isa == "x86-64-v4":
        assert not assembles(ASSEMBLER["x86-64-v3"], tmp_path)
    if isa == "x86-64-v3":
        assert not assembles(ASSEMBLER["x86-64-v3"].replace("+fma", ""), tmp_path)


def assembles(march: str, folder: Path) -> bool:
    command = ["as", f"-march={march}", "-o", "/dev/null", "code.s"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_is_there_is_kept_and_what_is_old_goes(tree):
    """So that building again, as editable installations do, takes no time where nothing has changed."""
    engines = tree / "llama_attn" / "engines"
    before = {path.name: path.stat().st_mtime_ns for path in engines.glob("*.so")}
    (engines / f"native-{SETS[0]}-0000.so").touch()
    hatchling(tree, "-t", "wheel", "-d", str(tree / "again"))
    assert {path.name: path.stat().st_mtime_ns for path in engines.glob("*.so")} == before


def test_without_a_compiler(sdist, tmp_path):
    folder = unpacked(sdist, tmp_path)
    said = hatchling(folder, "-t", "wheel", CXX="no-such-compiler")
    assert "a wheel without the native engine" in said
    assert "no C++ compiler found; looked for ['no-such-compiler']" in said
    (wheel,) = (folder / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
