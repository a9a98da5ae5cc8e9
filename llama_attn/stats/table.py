"""The table of statistics: what each one is called, means, and is computed from.

One entry is all that a new statistic needs; the engines, the labels, the tests and the docs read the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

import torch

from llama_attn.stats.reference import Reference

Observed = Literal["block", "hidden", "hidden_real", "key", "value", "value_output"]
"""What a statistic is made from."""
Needed = Literal["segments", "tokens", "rows", "keep"]
"""What a statistic needs to be told."""

# Dimensions that a statistic may have besides layer and batch, in the order in which they appear.
DIMENSIONS = (
    "layer", "hidden_layer", "batch", "head", "kv_head", "query", "row", "key",
    "query_bin", "key_bin", "distance_bin", "weight_bin", "rank", "segment",
)  # fmt: skip
# By what is observed: the axes in front, those that may stand behind them, and those of the same length for every text,
# which may follow. As a text grows, its keys and bins of positions do, at the end of what is stored: nothing follows them.
AXES: dict[Observed, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "block": (
        "layer batch head",
        ("", "query", "key", "row key", "query_bin key_bin", "distance_bin"),
        ("weight_bin", "rank", "segment"),
    ),
    "hidden": ("hidden_layer batch", ("", "query"), ("rank",)),
    "hidden_real": ("hidden_layer batch", ("", "query"), ("rank",)),
    "key": ("layer batch", ("", "key", "kv_head", "kv_head key"), ("rank",)),
    "value": ("layer batch", ("", "key", "kv_head", "kv_head key"), ("rank",)),
    "value_output": ("layer batch head", ("", "key"), ("rank",)),
}
GROWING = ("key", "query_bin", "key_bin", "distance_bin")
WHOLE_NUMBERS = (torch.int8, torch.int16, torch.int32, torch.int64)
# Said wherever one of them is asked for its mean.
WHOLE_HAVE_NO_MEAN = (
    "whole numbers are positions or channels, with −1 for none; a count has a mean if it is of floats, with NaN"
)


@dataclass(frozen=True)
class Statistic:
    """One statistic of attention.

    Args:
        name: The key in ``AttentionStats``.
        dims: Names of the axes, each once and in this order.

            - Of attention: ``layer``, ``batch``, ``head``, and behind them nothing (a sum over queries), ``query``,
              ``key``, ``row`` and ``key``, ``query_bin`` and ``key_bin``, or ``distance_bin``.
            - Of keys and values: ``layer``, ``batch``, and of ``kv_head`` and ``key`` what there is; ``head`` in place
              of ``kv_head`` for ``observes="value_output"``.
            - Of hidden states: ``hidden_layer``, ``batch``, and ``query`` if it is of single tokens.

            Where neither ``key`` nor a bin of positions is the last, ``rank`` may follow, and of attention ``weight_bin`` and
            ``segment``.
        unit: Unit of the numbers.
        source: Where the definition comes from.
        stream: The streaming form. For a statistic of attention it takes a `Block` of query rows. With a
            ``query`` axis it returns the block's rows (batch, head, row, …); without one it returns what the
            block adds to a running sum whose shape is (batch, head, …), and for keys those of the block.
            For a norm it takes what ``observes`` says, and returns (batch, …) without the layer axis.
        textbook: The definition on the materialised float64 weights of a `Reference`, which the tests compare with.
            It returns the axes behind the layer. Queries that are padding have weights there, which no block has: a
            sum over queries leaves them out with ``reference.real_queries``.
        meaning: One line for labels and docs.
        default: Whether it belongs to the default set.
        finish: ``finish(total, counts, config)`` turns the finished running sum, (layer, batch, head, …), into the
            statistic, e.g. divides it by ``counts.visible_queries_per_head``, (batch, head or 1, key), of the `Counts`;
            ``config`` is the `AttentionStatsConfig`.
        dtype: Integer type of positions and channels, where −1 is "none", as in padding; ``None`` for floats, where it is
            NaN. Counts are better floats, since means leave out NaN and not −1. The streaming form returns this type;
            floats are of the type of what it is given.
        parts: Sizes of axes which the running sum has behind ``head`` and ``finish`` removes.
        observes: What the streaming form is given. Everything but ``"block"`` is a norm (``norms=True``).

            - ``"block"``: a `Block`.
            - ``"key"``: keys after RoPE, (batch, kv_head, key, channel).
            - ``"value"``: values, (batch, kv_head, key, value_channel).
            - ``"value_output"``: the values, and the weight of the output projection by head, (head, hidden,
              value_channel).
            - ``"hidden"``: states of the residual stream, (batch, query, channel); one more layer than there are, whose
              last is the output.
            - ``"hidden_real"``: the same states, which of them are real tokens, (batch, query), and the configuration.
        needs: What it cannot be measured without, one or several of these; None for nothing. A block has it.

            - ``"tokens"``: ids, which are ``block.tokens`` (batch, key) and ``block.row_tokens`` (batch, row).
            - ``"segments"``: those of the configuration, ``block.segments`` (batch, key), of which there are
              ``block.wanted.num_segments``.
            - ``"rows"``: those of the configuration; it has the axis ``row``, and needs nothing besides.
            - ``"keep"``: that of the configuration, ``block.keep`` (batch, 1 or kv_head, key).
        of_distance: Whether it compares places of queries and of keys, as by ``block.distance``, or ``block.query_slots`` with
            ``block.key_slots``. In cross-attention, where they are of two texts, it is then NaN; elsewhere nothing
            changes.
    """

    name: str
    dims: tuple[str, ...]
    unit: str
    source: str
    stream: Callable[..., torch.Tensor]
    textbook: Callable[[Reference], torch.Tensor]
    meaning: str = ""
    default: bool = False
    finish: Callable[..., torch.Tensor] | None = None
    dtype: torch.dtype | None = None
    parts: tuple[int, ...] = ()
    observes: Observed = "block"
    needs: Needed | Collection[Needed] | None = None
    of_distance: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))
        check_dims(self.name, self.dims)
        for field, known in (
            ("observes", get_args(Observed)),
            ("dtype", (None, *WHOLE_NUMBERS)),
        ):
            if (given := getattr(self, field)) not in known:
                raise ValueError(f"{field}: expected one of {list(known)} for {self.name!r}, got {given!r}")
        if not isinstance(self.needs, str | None):
            object.__setattr__(self, "needs", self.needed)
        if unknown := [need for need in self.needed if need not in get_args(Needed)]:
            raise ValueError(f"needs: expected some of {list(get_args(Needed))} for {self.name!r}, got {unknown}")
        self._check_axes()
        for form in ("stream", "textbook", *(["finish"] if self.finish is not None else [])):
            if not callable(getattr(self, form)):
                raise TypeError(f"{form}: expected a function for {self.name!r}, got {getattr(self, form)!r}")
        for field in ("needs", "finish"):
            if self.is_norm and (given := getattr(self, field)) is not None:
                raise ValueError(f"{field}: expected None for {self.name!r}, which observes no block, got {given!r}")
        if self.parts and (self.finish is None or self.per_query):
            raise ValueError(
                f"parts: expected () for {self.name!r}, no sum over queries with a `finish`, got {self.parts!r}"
            )

    def _check_axes(self) -> None:
        """Refuse axes that what is observed does not have, or that do not go together.

        Raises:
            ValueError: The message says which there may be.
        """
        front, ends, fixed = AXES[self.observes]
        allowed = [(*front.split(), *end.split()) for end in ends]
        others = tuple(dim for dim in self.dims if dim not in fixed)
        if others not in allowed or (others != self.dims and others[-1] in GROWING):
            why = ""
            if {"query", "key"} <= {*self.dims}:
                why = "; of query and key it would be a matrix of T × T, see `weights_map`"
            elif "head" in front.split() and "head" not in self.dims:
                why = "; keep the axis of heads, and sum over it in what has been measured"
            raise ValueError(
                f"dims: {self.name!r} observes {self.observes!r}: expected {front.split()}, then one of {list(ends)}, then any "
                f"of {list(fixed)} (none behind keys or bins of positions), got {self.dims!r}{why}"
            )
        if ("row" in self.dims or "rows" in self.needed) and ("row" not in self.dims or self.needed != ("rows",)):
            raise ValueError(
                f"needs: expected 'rows' and nothing else for {self.name!r} if and only if it has the axis 'row', got "
                f"{self.needs!r} for {self.dims!r}"
            )
        if "segment" in self.dims and "segments" not in self.needed:
            raise ValueError(
                f"needs: expected 'segments' for {self.name!r}, which has the axis 'segment', got {self.needs!r}"
            )

    @property
    def needed(self) -> tuple[Needed, ...]:
        """What it needs, be it nothing, one thing or several."""
        if self.needs is None:
            return ()
        several = isinstance(self.needs, Collection) and not isinstance(self.needs, str)
        return tuple(cast(Collection[Needed], self.needs)) if several else (cast(Needed, self.needs),)

    @property
    def is_norm(self) -> bool:
        """Whether it is measured on a tensor of the model rather than on attention weights."""
        return self.observes != "block"

    @property
    def none(self) -> float:
        """What stands where there is no number, as in padding: NaN, and −1 of whole numbers."""
        return math.nan if self.dtype is None else -1

    @property
    def per_query(self) -> bool:
        """Whether a block of query rows holds its final rows, so that nothing is summed over blocks."""
        return "query" in self.dims or "row" in self.dims


def check_dims(name: str, dims: Sequence[str]) -> None:
    """Check the axes of a statistic.

    Raises:
        ValueError: One of them is unknown, or they are not in order.
    """
    dims = tuple(dims)
    in_order = tuple(dim for dim in DIMENSIONS if dim in dims)
    if in_order != dims or dims[:2] not in (("layer", "batch"), ("hidden_layer", "batch")):
        raise ValueError(
            f"dims: expected ('layer' or 'hidden_layer', 'batch', …), each once and in the order of "
            f"{list(DIMENSIONS)}, got {dims!r} for {name!r}"
        )


# Names that say something else wherever statistics are kept.
TAKEN = (*DIMENSIONS, "visible_keys", "visible_queries", "key_token", "query_token", "key_segment")

# Filled once by the package, from the modules that define the entries; plain dicts, which torch.compile can read.
BUILT_IN: dict[str, Statistic] = {}
_ADDED: dict[str, Statistic] = {}


def register_statistic(statistic: Statistic) -> Statistic:
    """Add ``statistic`` to the table, after which its name can be asked for like any other.

    `llama_attn.testing.assert_statistic_matches` checks that its streaming form is its textbook form.

    Raises:
        TypeError: ``statistic`` is not a `Statistic`.
        ValueError: The name belongs to a built-in statistic, or is that of an axis or a count.
    """
    if not isinstance(statistic, Statistic):
        raise TypeError(f"statistic: expected a Statistic, got {statistic!r}")
    if statistic.name in BUILT_IN:
        raise ValueError(f"statistic: {statistic.name!r} is built in; choose another name than {list(BUILT_IN)}")
    if not isinstance(statistic.name, str) or not statistic.name or statistic.name in TAKEN:
        raise ValueError(f"name: expected a string other than {list(TAKEN)}, got {statistic.name!r}")
    _ADDED[statistic.name] = statistic
    return statistic


def statistics_table() -> Mapping[str, Statistic]:
    """Every statistic by name: the built-in ones in a fixed order, then those that were registered."""
    return MappingProxyType({**BUILT_IN, **_ADDED})


def default_statistics() -> tuple[str, ...]:
    """The names measured when nothing else is asked for."""
    return tuple(name for name, statistic in BUILT_IN.items() if statistic.default)
