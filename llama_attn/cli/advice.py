"""What the library advises in Python, said as commands."""

from __future__ import annotations

import re

from llama_attn.stats.formats import HOLDS, STATS, SUMMARY

# Statistics that need more than their name, and how they are measured.
ELSEWHERE = {
    "segment_mass": "needs segments; give several --file with --documents",
    "kept_mass": "needs the keys that are kept; `llama-attn budget` chooses them and tells it",
    "row_weights": "needs rows, which no option names; in Python: AttentionStatsConfig(rows=(-1,))",
}
UNMEASURED = re.compile(r"measure with AttentionStatsConfig\(statistics=\(…, ([^)]*)\)\)")
ROWS = 'measure with AttentionStatsConfig(rows=(-1,)) or rows="generated"'
SAID = {
    ROWS: "no command measures them; in Python: AttentionStatsConfig(rows=(-1,))",
    "measure with AttentionStatsConfig(segments=…)": (
        "measure with llama-attn run MODEL --file ONE --file OTHER --documents --generate N"
    ),
    'measure in generate, with AttentionStatsConfig(segments=…) for the prompt, or rows="generated"': (
        "measure with llama-attn run MODEL … --generate N"
    ),
    'measure "sink_mass", or the rows themselves with AttentionStatsConfig(rows="generated")': (
        "measure with llama-attn run MODEL … --statistics sink_mass"
    ),
    HOLDS[STATS][1]: "llama-attn plot, report and compare take it",
    HOLDS[SUMMARY][1]: "llama-attn report, compare and merge take it",
}


def as_commands(message: str) -> str:
    """A message whose advice, as the library words it, can be followed on the command line."""
    message = UNMEASURED.sub(lambda found: _measured(re.findall(r'"(\w+)"', found[1])), message)
    for python, command in SAID.items():
        message = message.replace(python, command)
    return message


def _measured(names: list[str]) -> str:
    if special := [name for name in names if name in ELSEWHERE]:
        return f"{special[0]} {ELSEWHERE[special[0]]}"
    return f"measure with llama-attn run MODEL … --statistics {','.join(names)}"
