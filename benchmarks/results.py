"""What benchmarks leave behind: rows of a table, merged by test into one JSON file with where and when each was taken.

``docs/make_benchmarks.py`` turns that file into docs/benchmarks.md.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

import llama_attn
from llama_attn.stats.files import complete_file

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "benchmarks.json"


@dataclass(frozen=True)
class Row:
    """One measurement, and what it is compared with.

    Args:
        case: What was measured.
        shape: On which model and how many tokens.
        value: The measurement.
        unit: Of ``value`` and ``baseline_value``: "s" or "MiB".
        baseline: What it is compared with; None if with nothing.
        baseline_value: Its measurement.
        ratio: ``value`` over ``baseline_value``; less is better.
        at_most: The goal for ``ratio``; None if there is none.
        least: Of the ratios of single rounds.
        most: Of the ratios of single rounds.
    """

    case: str
    shape: str
    value: float
    unit: str
    baseline: str | None = None
    baseline_value: float | None = None
    ratio: float | None = None
    at_most: float | None = None
    least: float | None = None
    most: float | None = None

    @classmethod
    def over(
        cls, case: str, shape: str, value: float, unit: str, baseline: str, baseline_value: float, at_most=None
    ) -> Row:
        """A row whose ratio is that of the two values."""
        return cls(case, shape, value, unit, baseline, baseline_value, value / baseline_value, at_most)


def merge(test: str, group: str, rows: list[Row], path: Path, device: str) -> None:
    """Put the rows of one test into the file, in place of what it left there before."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[test] = {"group": group, "environment": environment(device), "rows": [asdict(row) for row in rows]}
    with complete_file(path) as unfinished:
        unfinished.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


@cache
def environment(device: str) -> dict[str, str | int]:
    """Machine, versions and date, as they were when first asked for: before anything is measured."""
    packages = ("torch", "transformers")
    accelerator = {"accelerator": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        "processor": _processor(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "L2 cache": _l2_cache(),
        "memory [GiB]": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        **accelerator,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "llama_attn": llama_attn.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _l2_cache() -> str:
    """As the kernel writes it; "unknown" where it does not."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return size.read_text().strip().replace("K", " KiB") if size.exists() else "unknown"


def _commit() -> str:
    """The commit that was measured, "+" behind it where the code has changed since; "" outside a checkout."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "llama_attn", "benchmarks")
    return _git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
