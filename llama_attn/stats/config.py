"""What to measure: the configuration that a user passes as ``output_attention_stats``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch

from llama_attn.stats.integers import as_integer
from llama_attn.stats.keep import Keep, read_keep
from llama_attn.stats.row_positions import Rows, read_rows, rows_from_json, rows_to_json
from llama_attn.stats.segments import NumberedSegments, Segments, read_segments
from llama_attn.stats.table import default_statistics, statistics_table


@dataclass(frozen=True)
class AttentionStatsConfig:
    """Which statistics of which heads to measure.

    Args:
        statistics: Names from the table of statistics, or a single name, or ``"all"`` for everything the call allows.
        layers: Layer indices to measure; ``None`` for all.
        heads: Query-head indices to measure; ``None`` for all. KV heads are never filtered.
        sink_tokens: Number of real keys at the start of a sequence that count as the sink [tokens].
        window: Distances 0 ≤ i − j < window count as local [tokens].
        top_k: Number of most attended keys kept per query, and of largest magnitudes per token.
        map_size: Largest number of bins along each axis of a map.
        norms: Add every norm of hidden states, keys and values to the selection.
        segments: Integer tensor (batch, key), −1 for "none", or one list of labels per sample, or what
            `chat_segments` or `image_segments` returns; adds ``segment_mass``.
        query_stride: Measure queries 0, s, 2s … of the row only.
        offload: ``"cpu"`` moves every layer's numbers to the CPU as soon as they exist.
        engine: ``"native"`` (C++, on the CPU), ``"torch"`` (PyTorch, on any device) or ``"triton"`` (on an NVIDIA GPU);
            ``None`` takes ``native`` on a CPU that has it, and ``torch`` elsewhere.
        rows: Positions of queries, negative ones from the end of the row, or a slice of positions, or ``"generated"``:
            the last query of the prompt and every token that was fed back; adds ``row_weights``.
        keep: Which keys are kept, bool (batch, key) or (layer, batch, kv_head, key), layers as measured, or what
            `keep_mask` returns; keys beyond its length are kept; adds ``kept_mass``.

    Raises:
        ValueError: An unknown statistic, or a number that is not a positive integer.
    """

    statistics: tuple[str, ...] | str = field(default_factory=default_statistics)
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    sink_tokens: int = 1
    window: int = 64
    top_k: int = 8
    map_size: int = 64
    norms: bool = False
    segments: Segments | None = field(default=None, compare=False, repr=False)
    query_stride: int = 1
    offload: str | None = None
    engine: str | None = None
    # A slice has no hash before Python 3.12.
    rows: Rows | None = field(default=None, hash=False)
    keep: Any = field(default=None, compare=False, repr=False)

    # The same as integers, read once: a compiled forward cannot look at values.
    _segments: NumberedSegments | None = field(init=False, default=None, compare=False, repr=False)
    _keep: Keep | None = field(init=False, default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.statistics != "all":
            names = (self.statistics,) if isinstance(self.statistics, str) else tuple(self.statistics)
            known = statistics_table()
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f'statistics: unknown {unknown}; there are {sorted(known)}, or "all"')
            if not names and not self.norms:
                raise ValueError("statistics: expected at least one name (or norms=True), got none")
            object.__setattr__(self, "statistics", tuple(dict.fromkeys(names)))
        for name in ("layers", "heads"):
            object.__setattr__(self, name, _indices(name, getattr(self, name)))
        for name in ("sink_tokens", "window", "top_k", "map_size", "query_stride"):
            number = getattr(self, name)
            try:
                integer = as_integer(number)
            except TypeError:
                integer = 0
            if not 0 < integer < 2**63:
                raise ValueError(f"{name}: expected a positive integer, got {number!r}")
            object.__setattr__(self, name, integer)
        if not isinstance(self.norms, bool):
            raise ValueError(f"norms: expected True or False, got {self.norms!r}")
        if self.segments is not None:
            object.__setattr__(self, "_segments", read_segments(self.segments))
        if self.rows is not None:
            object.__setattr__(self, "rows", read_rows(self.rows))
        if self.keep is not None:
            object.__setattr__(self, "_keep", read_keep(self.keep))
        if self.offload not in (None, "cpu"):
            raise ValueError(f'offload: expected None or "cpu", got {self.offload!r}')
        if self.engine is not None and not isinstance(self.engine, str):
            raise ValueError(f"engine: expected None or the name of an engine, got {self.engine!r}")

    @classmethod
    def from_argument(
        cls, value: bool | AttentionStatsConfig | None, name: str = "output_attention_stats"
    ) -> AttentionStatsConfig | None:
        """Read an argument of this name: None and False are off, True is the default set.

        Raises:
            ValueError: Anything else that is not a configuration.
        """
        if value is None or value is False:
            return None
        if value is True:
            # Made once, since every token that is decoded asks anew; a compiled graph does not look into a cache.
            return cls() if torch.compiler.is_compiling() else _default()
        if isinstance(value, cls):
            return value
        meant = "; a statistic is named by AttentionStatsConfig(statistics=…)" if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected None, a bool or an AttentionStatsConfig, got {value!r}{meant}")

    @property
    def labelled(self) -> int | None:
        """How many tokens of a row segments were given for; None without any."""
        return None if self._segments is None else self._segments[0].shape[1]

    @property
    def numbered_segments(self) -> NumberedSegments | None:
        """The segments as integers, (batch, prompt), and their names; None without any."""
        return self._segments

    def segments_of(
        self, shape: tuple[int, int], device: torch.device
    ) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
        """The segments as integers, and their names.

        Args:
            shape: The (batch, key) that they must have.
            device: Where the integers are needed.

        Raises:
            ValueError: Another shape.
        """
        if self._segments is None:
            return None, None
        labels, names = self._segments
        if tuple(labels.shape) != tuple(shape):
            raise ValueError(
                f"segments: expected shape {shape}, got {tuple(labels.shape)}; each token of the inputs has one, those of "
                "add_generation_prompt=True too"
            )
        return labels.to(device), names

    @property
    def kept(self) -> Keep | None:
        """Which keys are kept, (layer or 1, batch, kv_head or 1, key); None if nobody asked."""
        return self._keep

    def selected(self, axis: str, available: int) -> tuple[int, ...]:
        """The indices chosen on ``axis`` ("layers" or "heads") of a model that has ``available`` of them.

        Raises:
            ValueError: An index the model does not have.
        """
        chosen: tuple[int, ...] | None = getattr(self, axis)
        if chosen is None:
            return tuple(range(available))
        unknown = [index for index in chosen if index >= available]
        if unknown:
            raise ValueError(f"{axis}: unknown {unknown}; the model has {axis} 0 to {available - 1}")
        return chosen

    def bin_width(self, num_keys: int) -> int:
        """Tokens per bin of a map: the smallest power of two that needs no more than ``map_size`` bins."""
        return bin_width(num_keys, self.map_size)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON types."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in ("segments", "keep")}
        return data | {"rows": rows_to_json(self.rows)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AttentionStatsConfig:
        """The inverse of `to_json`; statistics that are not in the table of this process are kept by name."""
        names = data.pop("statistics")
        config = cls(statistics="all", rows=rows_from_json(data.pop("rows", None)), **data)
        if names != "all":
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"statistics: expected names, got {names!r}")
            object.__setattr__(config, "statistics", tuple(names))
        return config


@cache
def _default() -> AttentionStatsConfig:
    return AttentionStatsConfig()


def bin_width(num_keys: int, map_size: int) -> int:
    """The smallest power of two that needs no more than ``map_size`` bins for ``num_keys`` tokens."""
    width = 1
    while -(-num_keys // width) > map_size:
        width *= 2
    return width


def _indices(name: str, value: Sequence[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        indices = tuple(map(as_integer, value))
    except TypeError:
        indices = ()
    if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
        raise ValueError(f"{name}: expected None or distinct indices from 0 up, got {value!r}")
    return indices
