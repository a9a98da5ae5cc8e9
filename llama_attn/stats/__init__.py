"""What is measured: the table of statistics, who sees whom, and the container of the results."""

from __future__ import annotations

from llama_attn.stats import keys, maps, norms, rows, table, tokens

for _module in (rows, tokens, keys, maps, norms):
    table.BUILT_IN.update({statistic.name: statistic for statistic in _module.STATISTICS})
