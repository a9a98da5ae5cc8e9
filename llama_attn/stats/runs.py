"""Who sees whom, read off how many keys each query sees and how many queries see each key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class Runs:
    """The keys that each query sees: a run of those that some query sees.

    Args:
        queries: Position of each query that sees something [token].
        places: Its place among the measured queries.
        keys: Position of each key that some query sees [token].
        first: First key of each query, as a place in ``keys``.
        stop: First place behind its last key.
    """

    queries: Int[np.ndarray, " query"]
    places: Int[np.ndarray, " query"]
    keys: Int[np.ndarray, " key"]
    first: Int[np.ndarray, " query"]
    stop: Int[np.ndarray, " query"]

    @property
    def count(self) -> Int[np.ndarray, " query"]:
        """How many keys each query sees."""
        return self.stop - self.first

    def near(self, distance: Int[np.ndarray, " *some"] | int) -> Int[np.ndarray, query * some]:
        """How many keys each query sees at less than a distance, to either side [tokens]."""
        at = np.expand_dims(self.queries, tuple(range(1, 1 + np.ndim(distance))))
        first, stop = (ends.reshape(at.shape) for ends in (self.first, self.stop))
        nearest = np.searchsorted(self.keys, at - distance, side="right").clip(first, stop)
        farthest = np.searchsorted(self.keys, at + distance, side="left").clip(first, stop)
        return np.maximum(farthest - nearest, 0)


def runs_of(
    queries: Int[np.ndarray, " query"],
    keys: Int[np.ndarray, " key"],
    visible_keys: Int[np.ndarray, " query"],
    visible_queries: Int[np.ndarray, " key"],
    direction: str,
) -> Runs | None:
    """The keys that each query of one row sees; None where the counts do not tell.

    They tell in two cases. In causal attention each query sees the last n_i real keys up to itself: all of them, a
    window, a chunk or a packed document. And wherever each query sees a run of real keys whose two ends never move
    backwards from query to query, the counts allow one solution only: full, windowed or packed attention to both
    sides, blocks of an image in a causal text, cross-attention. Behind another mask of the user's own they fit neither,
    unless it has the very counts of such a rule.

    Args:
        queries: Position of each measured query [token].
        keys: Position of each key [token].
        visible_keys: How many keys each query sees; 0 for padding.
        visible_queries: How many of the queries see each key; 0 for padding.
        direction: ``"causal"``, ``"bidirectional"`` or ``"cross"``.
    """
    places, seen = np.flatnonzero(visible_keys), np.flatnonzero(visible_queries)
    queries, keys = queries[places], keys[seen]
    count, seen_by = visible_keys[places].astype(np.int64), visible_queries[seen].astype(np.int64)
    if direction == "causal":
        until = np.searchsorted(keys, queries, side="right")
        found = Runs(queries, places, keys, until - count, until)
        if _fits(found, seen_by):
            return found
    first = _moving_forwards(count, seen_by)
    if first is None:
        return None
    found = Runs(queries, places, keys, first, first + count)
    # A token sees itself, except in cross-attention, where it is not among the keys.
    itself = direction == "cross" or bool((found.near(1) == 1).all())
    return found if itself and _fits(found, seen_by) else None


def _fits(runs: Runs, seen_by: Int[np.ndarray, " key"]) -> bool:
    """Whether as many queries see each key as were counted."""
    if (runs.first < 0).any() or (runs.stop > len(runs.keys)).any():
        return False
    ones = np.ones(len(runs.queries), np.int64)
    return np.array_equal(sum_of_runs(ones, runs.first, runs.stop, len(runs.keys)), seen_by)


def _moving_forwards(
    count: Int[np.ndarray, " query"], seen_by: Int[np.ndarray, " key"]
) -> Int[np.ndarray, " query"] | None:
    """Where the run of each query begins, if no end of a run moves backwards; None if that cannot be.

    Of the runs that begin no later than a key, those that see it are the last ones. So the number of queries that
    see a key, and the ends of the runs that began before it, say how many have begun.
    """
    lengths = count.tolist()
    first = [0] * len(lengths)
    begun = ended = 0
    for key, seeing in enumerate(seen_by.tolist()):
        while ended < begun and first[ended] + lengths[ended] <= key:
            ended += 1
        if not begun <= ended + seeing <= len(lengths):
            return None
        first[begun : ended + seeing] = [key] * (ended + seeing - begun)
        begun = ended + seeing
    return np.array(first, np.int64) if begun == len(lengths) else None


def sum_of_runs(
    values: np.ndarray, first: Int[np.ndarray, " run"], stop: Int[np.ndarray, " run"], length: int
) -> np.ndarray:
    """Add ``values[i]`` to every place from ``first[i]`` up to but not ``stop[i]``, in time linear in both."""
    steps = np.zeros(length + 1, values.dtype)
    np.add.at(steps, first, values)
    np.add.at(steps, stop, -values)
    return np.cumsum(steps)[:length]
