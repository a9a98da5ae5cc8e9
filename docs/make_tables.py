"""Write the tables of the documentation from what the code knows: ``python docs/make_tables.py``."""

from __future__ import annotations

from pathlib import Path

from llama_attn import AttentionStatsConfig
from llama_attn.stats.table import statistics_table

DEFAULT = AttentionStatsConfig()
INTRODUCTION = f"""# Statistics

A = attention weights, s = scaled scores, i = query, j = key. "May see" includes causality, padding, packing and masks.
Positions that are padding are NaN, or −1 in integer statistics. ● marks the default set, † what `norms=True` adds.
The first tokens are {DEFAULT.sink_tokens} (`sink_tokens`), the nearest keys {DEFAULT.window} (`window`), the most attended keys {DEFAULT.top_k} (`top_k`), unless
`AttentionStatsConfig` says otherwise.
This page is written by `docs/make_tables.py` from the table in `llama_attn/stats/`.

| name | axes | unit | meaning | source |
|---|---|---|---|---|
"""


def statistics_page() -> str:
    """The page that lists every statistic."""
    lines = []
    for name, statistic in statistics_table().items():
        mark = " ●" if statistic.default else " †" if statistic.is_norm else ""
        axes = " × ".join(statistic.dims)
        lines.append(f"| `{name}`{mark} | {axes} | {statistic.unit} | {statistic.meaning} | {statistic.source} |")
    return INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "statistics.md").write_text(statistics_page())
