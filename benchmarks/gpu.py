"""All that is to be done with a GPU, in one command and at most eight minutes: ``make gpu``, or ``python benchmarks/gpu.py``.

It checks the engines, the backends and whole models on CUDA against float64, FlashAttention 2 and 3 among them where they
are installed, times the Triton engine against PyTorch's kernels and Llama-3-8B's shape against stock sdpa, and measures
memory at 32k and 128k tokens. Numbers are written to docs/benchmarks.json as they come, so that what ran is kept whatever
happens then. ``--dry-run`` is the rehearsal on a CPU: the same code on small shapes, which leaves no number.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of Triton's interpreter, and of the check mode of the benchmarks.
REHEARSAL = {"TRITON_INTERPRET": "1", "LLAMA_ATTN_BENCH": "check", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Step:
    """A file of tests, and what it is for.

    Args:
        name: For ``--only``.
        what: In a few words.
        file: Path in the repository.
        options: Of pytest.
    """

    name: str
    what: str
    file: str
    options: tuple[str, ...] = ()


# What tells most comes first. Kernels are not compiled inside the checks of types that tests run with.
STEPS = (
    Step("exact", "engines, backends and models against float64", "tests/gpu_worker.py", ("-o", "addopts=")),
    Step("kernels", "the Triton engine against float64", "tests/triton_worker.py", ("-o", "addopts=")),
    Step("model", "Llama-3-8B's shape, and memory", "benchmarks/test_gpu.py"),
    Step("timed", "the Triton engine against flash and cuDNN", "benchmarks/test_triton.py"),
)


def run(step: Step, seconds: float, environment: dict[str, str]) -> str:
    """Run a step; the last line that pytest prints, or that time was out."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *step.options, step.file]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        print(said, flush=True)
        return "stopped: time is out"
    print(said, flush=True)
    last = said.strip().splitlines()[-1] if said.strip() else "printed nothing"
    return f"ok: {last}" if process.returncode == 0 else f"FAILED: {last}"


def main() -> int:
    """Run the steps; 1 if one of them failed or did not come to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop, whatever is left; 8 by default")
    parser.add_argument("--only", choices=[step.name for step in STEPS], action="append", help="some of the steps")
    options = parser.parse_args()
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here; --dry-run rehearses without")
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    end, outcomes = time.monotonic() + 60 * options.minutes, {}
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        began = time.monotonic()
        print(f"== {step.name}: {step.what}", flush=True)
        outcome = (
            run(step, end - began, REHEARSAL if options.dry_run else {}) if began < end else "not run: time is out"
        )
        outcomes[step.name] = f"{outcome} ({time.monotonic() - began:.0f} s)"
    for name, outcome in outcomes.items():
        print(f"{name:8} {outcome}")
    return any(not outcome.startswith("ok") for outcome in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
