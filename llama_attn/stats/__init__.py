"""What is measured: the table of statistics, who sees whom, and the container of the results."""

from __future__ import annotations

from llama_attn.stats import keys, maps, norms, rows, table, tokens, weight_bins

for _module in (rows, tokens, keys, maps, weight_bins, norms):
    table.BUILT_IN.update({statistic.name: statistic for statistic in _module.STATISTICS})
