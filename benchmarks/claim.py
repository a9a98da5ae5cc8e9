"""Whether a claim holds: what was measured beside what is claimed, and the exit status.

The scripts in ``benchmarks/claims`` are named after what README.md and the documentation claim; ``make claims`` runs all.
"""

from __future__ import annotations

import sys
from pathlib import Path

from check import CHECK
from results import Row, environment


def sentence(script: str | Path) -> str:
    """What a script claims: its name."""
    return Path(script).stem.replace("_", " ").capitalize()


def hold(script: str, row: Row) -> None:
    """Print a claim and what came of it; exit with 1 if it does not hold. In check mode nothing is judged.

    Args:
        script: Its file.
        row: The measurement, with the most that its ratio may be.
    """
    holds = row.ratio <= row.at_most
    verdict = "not judged in check mode" if CHECK else "holds" if holds else "DOES NOT HOLD"
    rounds = "" if row.least is None else f", in single rounds {row.least:.2f} to {row.most:.2f}"
    where = environment("cpu")
    print(sentence(script))
    print(f"  {row.shape}; {where['processor']}, threads: {where['threads']}, torch {where['torch']}")
    for name, value in ((row.case, row.value), (row.baseline, row.baseline_value)):
        print(f"  {name}: {value:,.3f} s" if row.unit == "s" else f"  {name}: {value:,.1f} {row.unit}")
    print(f"  measured {row.ratio:.3f}{rounds}; claimed at most {row.at_most:.3f}: {verdict}", flush=True)
    if not (holds or CHECK):
        sys.exit(1)
