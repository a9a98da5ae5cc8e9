"""Write docs/benchmarks.md and its picture from docs/benchmarks.json, which ``make bench`` fills.

``python docs/make_benchmarks.py``: no number on that page comes from anywhere else.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_attn.stats.files import complete_file
from llama_attn.viz.style import BLUE, GREEN, ORANGE, empty_figure

DOCS = Path(__file__).parent
CLAIMS = DOCS.parent / "benchmarks" / "claims"
GROUPS = {
    "forward": "A whole forward. Statistics are the eight of the default set.",
    "decode": "Generating behind a cache.",
    "record": "Other models than ours, observed from outside.",
    "decisions": "What more than the default statistics costs, on the backend `streaming`; memory that is freed stays with the process.",
    "engines": "One attention call without a model, and what measuring a part of a model costs. "
    '`offload="cpu"` moves numbers off another device, so on a CPU there is nothing to measure.',
    "memory": "The peak of a fresh process with random weights of SmolLM2's shape in float32, on the CPU; importing "
    "PyTorch and transformers and the weights are part of it. What counts is the resident memory of the process. glibc "
    "gives memory from 1 MiB on back at once (`MALLOC_MMAP_THRESHOLD_`); as it is, it keeps more or less of it, and the "
    "peak of stock itself differs by 140 MiB from one process to the next: that row is the median of five.",
    "peers": "Others, on the same weights. What they give is less than the eight statistics: see the rows.",
    "report": "The interactive page of random numbers of SmolLM2's shape, 30 layers of 9 heads, which hardly compress; "
    "opened in headless Chromium.",
    "figures": "Pictures of matplotlib, written as PNG.",
}
INTRODUCTION = """# Benchmarks

Written by `docs/make_benchmarks.py` from what `make bench` measured ([benchmarks.json](benchmarks.json)); no number is
typed by hand. `BENCH="forward decode" make bench` measures some of the groups again.

Times are medians of at least five rounds after one to warm up; in every round the baseline and all cases of a shape
run in turns in one process, and the range is that of the ratios of single rounds. Ratios are time or memory over that of
the baseline: less is better. Rows with a goal say plainly whether it was met. What was tried to get there is in
[Performance](performance.md).

![ratios](images/benchmarks.png)
"""
YOURSELF = """## Run it yourself

What README.md claims is measured by one script each, which is named after the claim and ends with 1 where it does not hold.
`make claims` runs all of them, which takes minutes.
"""


def rows(entries: dict[str, Any], group: str) -> Iterator[dict[str, Any]]:
    """Every row of a group, test by test."""
    for entry in entries.values():
        if entry["group"] == group:
            yield from entry["rows"]


def quantity(value: float, unit: str) -> str:
    """A number that a person reads."""
    if unit != "s":
        return f"{value:,.0f} {unit}"
    for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(value) * factor >= 1 or name == "µs":
            return f"{value * factor:#.3g}".rstrip(".") + f" {name}"
    raise AssertionError("unreachable")


def met(row: dict[str, Any]) -> str:
    """Whether the goal of a row was met; nothing without a goal."""
    if row["at_most"] is None:
        return ""
    return "met" if row["ratio"] <= row["at_most"] else "**not met**"


def baseline(row: dict[str, Any]) -> str:
    """What a row is compared with."""
    return f"{row['baseline']}: {quantity(row['baseline_value'], row['unit'])}"


def cells(row: dict[str, Any]) -> list[str]:
    """A line of a table."""
    if row["ratio"] is None:
        return [row["case"], row["shape"], quantity(row["value"], row["unit"]), "", "", "", "", ""]
    return [
        row["case"],
        row["shape"],
        quantity(row["value"], row["unit"]),
        baseline(row),
        f"{row['ratio']:.3f}",
        "" if row["least"] is None else f"{row['least']:.2f}–{row['most']:.2f}",
        "" if row["at_most"] is None else f"≤ {row['at_most']:.2f}",
        met(row),
    ]


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def environments(entries: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """A table of machines and versions, and for each group where and when it was measured."""
    places: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    for entry in entries.values():
        place = dict(entry["environment"])
        commit, date = place.pop("commit"), place.pop("date")
        if place not in places:
            places.append(place)
        note = f"{date}, commit {commit or 'unknown'}"
        label = f"machine {places.index(place) + 1}, {note}"
        notes.setdefault(entry["group"], [])
        if label not in notes[entry["group"]]:
            notes[entry["group"]].append(label)
    names = list(dict.fromkeys(name for place in places for name in place))
    head = ["", *(f"machine {number + 1}" for number in range(len(places)))]
    lines = [[name, *(str(place.get(name, "")) for place in places)] for name in names]
    return table(head, lines), {group: "; ".join(labels) for group, labels in notes.items()}


def claims() -> str:
    """Every script that is named after a claim, and what the first line of it says."""
    lines = []
    for script in sorted(CLAIMS.glob("*.py")):
        claim, said = script.stem.replace("_", " ").capitalize(), ast.get_docstring(ast.parse(script.read_text()))
        lines.append(f"- [{claim}](../benchmarks/claims/{script.name}). {said.splitlines()[0]}\n")
    return "".join(lines)


def page(entries: dict[str, Any]) -> str:
    """The page of the documentation."""
    machines, notes = environments(entries)
    head = ["case", "shape", "measured", "baseline", "ratio", "range", "goal", ""]
    groups = [*GROUPS, *sorted({entry["group"] for entry in entries.values()} - set(GROUPS))]
    found = {group: list(rows(entries, group)) for group in groups}
    goals = [row for group in groups for row in found[group] if row["at_most"] is not None]
    reached = sum(row["ratio"] <= row["at_most"] for row in goals)
    parts = [
        INTRODUCTION,
        f"{reached} of {len(goals)} goals that were measured are met.\n",
        YOURSELF,
        claims(),
        "## Where\n",
        machines,
    ]
    for group in groups:
        parts += [f"## {group.capitalize()}\n"]
        parts += [f"{GROUPS[group]}\n"] if group in GROUPS else []
        if found[group]:
            parts += [f"Measured on {notes[group]}.\n", table(head, [cells(row) for row in found[group]])]
        else:
            parts += [f"Not measured yet: `BENCH={group} make bench`.\n"]
    return "\n".join(parts)


def picture(entries: dict[str, Any], path: Path) -> None:
    """Every ratio as a bar: green where a goal was met, orange where not, blue without one; goals are ticks."""
    bars = {group: [row for row in rows(entries, group) if row["ratio"] is not None] for group in GROUPS}
    bars = {group: found for group, found in bars.items() if found}
    heights = [len(found) for found in bars.values()]
    figure = empty_figure((11.0, 0.5 + 0.22 * sum(heights) + 0.3 * len(bars)))
    panels = figure.subplots(len(bars), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (group, found) in zip(panels, bars.items(), strict=True):
        several = len({(row["baseline"], row["unit"]) for row in found}) > 1
        for y, row in enumerate(found):
            colour = {"": BLUE, "met": GREEN, "**not met**": ORANGE}[met(row)]
            axes.barh(y, row["ratio"], color=colour, height=0.75)
            end = max(row["ratio"], row["at_most"] or 0)
            # A short bar has no room for its number, which stands behind it, or behind a tick that is near.
            beside = end if end - row["ratio"] < 0.2 else row["ratio"]
            place, ink = (0.01, "white") if row["ratio"] > 0.35 else (beside + 0.03, "black")
            axes.text(place, y, f"{row['ratio']:.2f}", va="center", fontsize=7, color=ink)
            if row["at_most"] is not None:
                axes.plot([row["at_most"]] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2)
            if several:
                axes.text(max(end, 1) + 0.03, y, f"of {baseline(row)}", va="center", fontsize=6, color="0.35")
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(found)), [f"{row['case']} ({row['shape']})" for row in found], fontsize=7)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_title(group, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlim(left=0)
    panels[-1].set_xlabel("ratio to the baseline [1]\ngreen: the goal (tick) is met, orange: not, blue: none")
    with complete_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png", metadata={"Software": None})


def main() -> None:
    """Write both."""
    entries = json.loads((DOCS / "benchmarks.json").read_text())
    with complete_file(DOCS / "benchmarks.md") as unfinished:
        unfinished.write_text(page(entries))
    picture(entries, DOCS / "images" / "benchmarks.png")


if __name__ == "__main__":
    main()
