"""Raw numbers of one forward, and of several that continue one another as if they had been one.

Rows of queries and norms of keys follow one another. Sums over queries are added, after the sum so far has grown to
the length that the row has now. A norm of all tokens together, such as a median, is neither, and has no merged form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Counts
from llama_attn.stats.row_positions import counts_from_end
from llama_attn.stats.table import Statistic
from llama_attn.stats.visibility import Visibility


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that see the same and have as many heads, and what was measured in them.

    Args:
        layers: Their indices, in order.
        sights: Who saw whom, one entry per forward.
        raw: Raw numbers by statistic, (layer, …).
        heads: How many query heads each layer holds in this process.
        kv_heads: How many KV heads.
    """

    layers: tuple[int, ...]
    sights: Sequence[Visibility]
    raw: Mapping[str, Tensor]
    heads: int
    kv_heads: int = 0

    @property
    def length(self) -> int:
        """Position behind the last key [token]."""
        return self.sights[-1].length

    def counts(self, real_keys: Tensor | None = None) -> Counts:
        """Who saw whom in all forwards.

        Args:
            real_keys: Which keys are real in the end, (batch, key), if the forwards do not say so.
        """
        first, last = self.sights[0], self.sights[-1]
        knows_rows = real_keys is not None or all(sight.rows is None for sight in self.sights)
        if len(self.sights) > 1 and knows_rows and all(_is_simple(sight) for sight in self.sights):
            # Steps of decoding, of which there may be many: as if all queries had come at once.
            real = last.real if real_keys is None else real_keys
            return Counts.of(replace(last, first_query=first.first_query, stop_query=None, real=real, rows=None))
        return reduce(Counts.followed_by, (Counts.of(sight) for sight in self.sights))

    def only(self, layer: int) -> Group:
        """One of the layers by itself."""
        at = self.layers.index(layer)
        return replace(self, layers=(layer,), raw={name: raw[at : at + 1] for name, raw in self.raw.items()})


@dataclass(frozen=True, eq=False)
class Measured:
    """The raw numbers of one forward, or of a run of several.

    Args:
        statistics: What was measured.
        groups: The layers.
        hidden: Raw numbers of hidden states by statistic, (hidden_layer, …).
        engines: Names of the engines that measured, in order.
        rows: Positions of the queries whose weights were measured.
    """

    statistics: tuple[Statistic, ...]
    groups: tuple[Group, ...]
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    engines: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Position behind the last key [token]."""
        return max(group.length for group in self.groups)


class Run:
    """Raw numbers of a run that grows step by step.

    Args:
        config: What was asked for.

    Raises:
        ValueError: Rows that are counted from the end, which is not known before it is there.
    """

    def __init__(self, config: AttentionStatsConfig) -> None:
        if counts_from_end(config.rows):
            raise ValueError(
                f"rows: {config.rows} count from the end of the row, which a run of several forwards does not know; "
                'use "generated" for the last token of the prompt and all that were fed back, or positions from 0 up '
                "(inside `record`, recording.forwards has each forward by itself)"
            )
        self._config = config
        self._statistics: dict[str, Statistic] = {}
        self._engines: dict[str, None] = {}
        self._rows: list[list[Group]] = []
        self._sums: list[Group] = []
        self._hidden: dict[str, list[Tensor]] = {}
        self._positions: list[int] = []

    def add(self, measured: Measured) -> None:
        """Add the next forward."""
        self._statistics |= {statistic.name: statistic for statistic in measured.statistics}
        self._engines |= dict.fromkeys(measured.engines)
        self._positions += measured.rows
        for name, raw in measured.hidden.items():
            self._hidden.setdefault(name, []).append(raw)
        groups = list(measured.groups)
        if not self._sums:
            self._sums, self._rows = groups, [[self._kept(group, group.raw)] for group in groups]
            return
        if [group.layers for group in groups] != [group.layers for group in self._sums]:
            groups = self._apart(groups)
        for at, group in enumerate(groups):
            self._rows[at].append(self._new_keys(self._sums[at], group))
            self._sums[at] = self._added(self._sums[at], group)

    def result(self) -> Measured:
        """The whole run.

        Raises:
            ValueError: A statistic was named that several forwards cannot give.
        """
        single = [name for name in self._hidden if not merges(self._statistics[name])]
        if named := [name for name in single if name in self._config.statistics]:
            raise ValueError(
                f"statistics: {named} are numbers of one forward, which several cannot be merged into; "
                "recording.forwards has them"
            )
        groups = []
        for total, rows in zip(self._sums, self._rows, strict=True):
            raw = dict(total.raw)
            for name in raw:
                if (statistic := self._statistics[name]) and _follow_one_another(statistic):
                    axis = next(at for at, dim in enumerate(statistic.dims) if dim in ("query", "row", "key"))
                    parts = [self._widened(group, statistic, total) for group in rows if name in group.raw]
                    raw[name] = torch.cat(parts, dim=axis)
            groups.append(replace(total, raw=raw))
        hidden = {
            name: torch.cat(parts, dim=self._statistics[name].dims.index("query"))
            for name, parts in self._hidden.items()
            if name not in single
        }
        return Measured(
            tuple(self._statistics.values()), tuple(groups), hidden, tuple(self._engines), tuple(self._positions)
        )

    def _apart(self, groups: Sequence[Group]) -> list[Group]:
        """Every layer by itself, before and now: layers that saw the same may no longer do."""
        self._sums, before = [g.only(layer) for g in self._sums for layer in g.layers], self._rows
        self._rows = [[group.only(layer) for group in rows] for rows in before for layer in rows[0].layers]
        order = {group.layers: at for at, group in enumerate(self._sums)}
        alone = [group.only(layer) for group in groups for layer in group.layers]
        if {group.layers for group in alone} != set(order):
            raise ValueError("forwards: not all of them measured the same layers, see recording.forwards")
        return sorted(alone, key=lambda group: order[group.layers])

    def _new_keys(self, before: Group, group: Group) -> Group:
        """What is kept of a group: of the norms of keys those that were not there before."""
        new = group.length - before.length
        raw = dict(group.raw)
        for name, tensor in raw.items():
            statistic = self._statistics[name]
            if statistic.is_norm and "key" in statistic.dims:
                raw[name] = tensor[..., tensor.shape[-1] - new :]
        return self._kept(group, raw)

    def _kept(self, group: Group, raw: Mapping[str, Tensor]) -> Group:
        """A group without its sums over queries, which are added to those before: every step of a run has some."""
        return replace(group, raw={n: tensor for n, tensor in raw.items() if not _is_sum(self._statistics[n])})

    def _added(self, before: Group, group: Group) -> Group:
        raw = dict(before.raw)
        first = before.sights[0].offset
        for name in {**before.raw, **group.raw}:
            statistic, now = self._statistics[name], group.raw.get(name)
            if _follow_one_another(statistic):
                if now is not None:
                    raw[name] = now
                continue
            if now is not None and statistic.dims[-1] == "key":
                now = pad(now, (group.sights[0].offset - first, 0))
            # A forward without a measured query gives no sums.
            if name in raw:
                total = grow(statistic, raw[name], before.length, group.length, self._config)
                now = total if now is None else total + now
            if now is not None:
                raw[name] = now
        return replace(group, sights=(*before.sights, *group.sights), raw=raw)

    def _widened(self, group: Group, statistic: Statistic, total: Group) -> Tensor:
        """Segments and keys that only other tokens have are added to the rows of a group."""
        raw = group.raw[statistic.name]
        if "row" in statistic.dims:
            (sight,), first, last = group.sights, total.sights[0], total.sights[-1]
            front = sight.offset - first.offset
            behind = last.offset + last.num_keys - first.offset - front - raw.shape[-1]
            # A row of padding is NaN everywhere.
            return pad(raw, (front, behind)).masked_fill_(raw[..., :1].isnan(), torch.nan)
        if statistic.dims[-1] != "segment":
            return raw
        most = max(g.raw[statistic.name].shape[-1] for rows in self._rows for g in rows if statistic.name in g.raw)
        return pad(raw, (0, most - raw.shape[-1]))


def _is_simple(sight: Visibility) -> bool:
    """Whether it says nothing but how long the rows are and which tokens are real."""
    return (
        sight.causal and sight.aligned and sight.mask is sight.sequence is None
        and sight.first_key is sight.stop_key is None and not sight.offset
    )  # fmt: skip


def merges(statistic: Statistic) -> bool:
    """Whether the numbers of several forwards can be put together to that of the run."""
    return not statistic.is_norm or bool({"query", "key"} & set(statistic.dims))


def _follow_one_another(statistic: Statistic) -> bool:
    if not merges(statistic):
        raise ValueError(f"{statistic.name}: forwards cannot be merged into one number of the run")
    return not _is_sum(statistic)


def _is_sum(statistic: Statistic) -> bool:
    """Whether it sums over queries."""
    return not statistic.per_query and not statistic.is_norm


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
