"""Put the raw numbers of several forwards of one run together, as if it had been one.

Rows of queries and norms of keys follow one another. Sums over queries are added, after the sum so far has grown to
the length that the row has now. A norm of all tokens together, such as a median, is neither, and has no merged form.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.table import Statistic


class Run:
    """Raw numbers of a run that grows step by step."""

    def __init__(self, config: AttentionStatsConfig) -> None:
        self._config = config
        self._pieces: dict[str, list[Tensor]] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._statistics: dict[str, Statistic] = {}

    def add(self, statistics: tuple[Statistic, ...], recorded: Mapping[str, Tensor], num_keys: int) -> None:
        """Add one forward, by statistic and (layer, …), after which the row has ``num_keys`` tokens."""
        self._statistics |= {statistic.name: statistic for statistic in statistics}
        for name, raw in recorded.items():
            statistic = self._statistics[name]
            if _follow_one_another(statistic):
                self._pieces.setdefault(name, []).append(raw)
            elif name in self._sums:
                total, before = self._sums[name]
                self._sums[name] = grow(statistic, total, before, num_keys, self._config) + raw, num_keys
            else:
                self._sums[name] = raw, num_keys

    def result(self, num_keys: int) -> dict[str, Tensor]:
        """The raw numbers of the whole run, (layer, …) by statistic."""
        whole = {}
        for name, pieces in self._pieces.items():
            dims = self._statistics[name].dims
            axis = dims.index("query") if "query" in dims else dims.index("key")
            whole[name] = torch.cat(pieces, dim=axis)
        for name, (total, before) in self._sums.items():
            whole[name] = grow(self._statistics[name], total, before, num_keys, self._config)
        return whole


def merges(statistic: Statistic) -> bool:
    """Whether the numbers of several forwards can be put together to that of the run."""
    return not statistic.is_norm or bool({"query", "key"} & set(statistic.dims))


def _follow_one_another(statistic: Statistic) -> bool:
    if not merges(statistic):
        raise ValueError(f"{statistic.name}: forwards cannot be merged into one number of the run")
    return statistic.per_query or statistic.is_norm


def grow(statistic: Statistic, total: Tensor, before: int, now: int, config: AttentionStatsConfig) -> Tensor:
    """A running sum over a row of ``before`` tokens, laid out for one of ``now`` tokens."""
    if now == before:
        return total
    if statistic.dims[-1] == "key":
        return pad(total, (0, now - before))
    if statistic.dims[-2:] == ("query_bin", "key_bin"):
        # Widths are powers of two and bins are aligned, so that a wider bin is a sum of whole narrow ones.
        narrow, wide = config.bin_width(before), config.bin_width(now)
        factor, bins = wide // narrow, -(-now // wide)
        short = -total.shape[-1] % factor
        total = pad(total, (0, short, 0, short))
        total = total.unflatten(-1, (-1, factor)).sum(-1).unflatten(-2, (-1, factor)).sum(-2)
        return pad(total, (0, bins - total.shape[-1], 0, bins - total.shape[-2]))
    if statistic.dims[-1] == "distance_bin":
        return pad(total, (0, now.bit_length() - before.bit_length()))
    return total
