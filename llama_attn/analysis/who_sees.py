"""Which share of the keys that each query sees are the first of its text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from llama_attn.stats.runs import Runs, runs_of, sum_of_runs

__all__ = ["Runs", "runs_of", "sink_shares", "sum_of_runs"]


def sink_shares(
    of_layers: list[Runs], queries: Int[np.ndarray, " query"], sink_tokens: int, *, cross: bool
) -> list[Float[np.ndarray, " query"]]:
    """Which share of the keys that each query sees are the first ``sink_tokens`` of its own sequence.

    Where a sequence begins is not counted, but follows: keys that some query of some layer sees together are of one
    sequence. What no query links may be packed documents or chunks of one text, which look the same; for all but the
    first of such parts the share is NaN. So it is for all if the row may begin before the first key that is seen.

    Args:
        of_layers: Who sees whom in each layer of one row.
        queries: Position of each measured query [token].
        sink_tokens: How many keys at the beginning of a sequence are counted.
        cross: Whether the keys are of another text, which all queries see from its beginning.
    """
    keys = np.unique(np.concatenate([runs.keys for runs in of_layers])) if of_layers else np.zeros(0, np.int64)
    shares = []
    whole = len(queries) > 0 and queries[0] == 0 and (np.diff(queries) == 1).all()
    begins = len(keys) > 0 and (keys[0] == 0 or bool(whole) or cross)
    linked = np.zeros(max(len(keys) - 1, 0), np.int64)
    for runs in of_layers:
        first, last = (np.searchsorted(keys, runs.keys[at]) for at in (runs.first, runs.stop - 1))
        linked += sum_of_runs(np.ones(len(runs.queries), np.int64), first, last, len(linked))
    together = keys[: 1 + next((at for at, number in enumerate(linked) if not number), len(linked))]
    for runs in of_layers:
        share = np.full(len(runs.queries), np.nan)
        if begins:
            known = runs.keys[runs.first] <= together[-1]
            sinks = np.searchsorted(runs.keys, together[:sink_tokens][-1], side="right")
            share[known] = ((sinks.clip(runs.first, runs.stop) - runs.first) / runs.count)[known]
        shares.append(share)
    return shares
