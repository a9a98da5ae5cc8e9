"""``benchmarks/claims``: each script runs, is linked, and says whether its claim holds."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("claims/*.py"))
sentence = {script: script.stem.replace("_", " ").capitalize() for script in SCRIPTS}
# One process for all: what takes longest is to import torch and transformers.
RUN = "import runpy, sys\nfor script in sys.argv[1:]:\n    runpy.run_path(script, run_name='__main__')"


def test_every_script_runs():
    environment = os.environ | {"LLAMA_ATTN_BENCH": "check"}
    command = [sys.executable, "-c", RUN, *map(str, SCRIPTS)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert [line for line in said if not line.startswith(" ")] == list(sentence.values())
    assert sum(line.endswith(": not judged in check mode") for line in said) == len(SCRIPTS) >= 5


@pytest.mark.parametrize(
    ("page", "folder"), [("README.md", "benchmarks/claims"), ("docs/benchmarks.md", "../benchmarks/claims")]
)
def test_each_is_linked_by_what_it_claims(page, folder):
    links = re.findall(rf"\[([^]]+)\]\({folder}/([^)]+)\)", (ROOT / page).read_text())
    assert sorted(links) == sorted((claim, script.name) for script, claim in sentence.items())


@pytest.mark.parametrize(("at_most", "verdict"), [(2.0, "holds"), (1.9, "DOES NOT HOLD")])
def test_the_exit_status_tells(at_most, verdict, monkeypatch, capsys):
    """Rounds of seconds that a clock of our own counts: medians of 1 and 2."""
    monkeypatch.delenv("LLAMA_ATTN_BENCH", raising=False)
    monkeypatch.syspath_prepend(BENCHMARKS)
    claim, timing = importlib.import_module("claim"), importlib.import_module("timing")
    now, seconds = 0, {"short": [1, 1, 4], "long": [2, 6, 2]}
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))

    def lasting(name):
        def call():
            nonlocal now
            now += seconds[name].pop(0)

        return call

    short, long = timing.Case("short", lasting("short")), timing.Case("long", lasting("long"), at_most)
    row = timing.compare(short, long, shape="three rounds", rounds=3)
    with nullcontext() if verdict == "holds" else pytest.raises(SystemExit, match=r"^1$"):
        claim.hold("claims/a_long_call_is_short.py", row)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "A long call is short"
    assert said[2:] == [
        "  long: 2.000 s",
        "  short: 1.000 s",
        f"  measured 2.000, in single rounds 0.50 to 6.00; claimed at most {at_most:.3f}: {verdict}",
    ]
