"""What does each head do?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_attn.analysis.dataset import as_dataset, require
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.roles import NO_DATA, THRESHOLDS, role_scores, strengths, strongest_roles

if TYPE_CHECKING:
    import pandas

    from llama_attn.analysis.dataset import Source

NEEDED = ("sink_mass", "mean_distance", "entropy", "previous_token", "duplicate_token", "induction")


def classify_heads(
    ds: Source, query_slice: slice | None = None, *, needle: tuple[int, int] | None = None
) -> pandas.DataFrame:
    """A role for every head, with the scores that it follows from.

    Scores are means over rows and over the real queries that see more than one key:

    | role | score | threshold |
    |---|---|---|
    | ``first_token_sink`` | mass on the first tokens, of queries that see them and more | 0.3 |
    | ``sink`` | mass on all tokens that are sinks of some measured layer | 0.3 |
    | ``previous_token`` | mass on the token before the query | 0.3 |
    | ``duplicate_token`` | mass on earlier copies of the query's token | 0.3 |
    | ``induction`` | mass on tokens that followed earlier copies of the query's token | 0.3 |
    | ``local`` | 1 − mean distance / mean distance of uniform attention | 0.5 |
    | ``uniform`` | mean of entropy / ln(number of visible keys) | 0.9 |
    | ``streaming`` | mass on sink and window together, of queries that see other keys too | 0.9 |
    | ``retrieval`` | share of the ``needle`` that the head copied into the answer | 0.1 |

    The sinks of the run are those that `sink_positions` finds, its ``layer_sink`` in any layer, the first token or
    others: a head may rest on several. ``sink`` is known of all measured queries together only: it is NaN for some of
    them, without ``received``, and where `uniform_attention` is unknown.

    ``streaming`` is 1 − ``outside`` of `streaming_heads`; it is NaN without ``local_mass``, in texts that are no longer
    than sink and window, and where attention is not causal. ``retrieval`` is the score of `retrieval_heads`, the mean
    over rows, of all that was generated; it is NaN without a ``needle``.

    0.3 is the ε of Gu et al.; 0.5 is where `locality` draws the line; both 0.9 are a choice; 0.1 is that of Wu et al. What a layer's window hides
    counts against no head: uniform attention is that over the window, and queries whose window has left the first
    tokens behind do not count for ``first_token_sink``.

    In ordinary text few tokens have an earlier copy, so that heads which look for copies score low and often rest on
    the sink. To find them, measure a random sequence repeated twice and pass the second half as ``query_slice``.

    Args:
        ds: Statistics with ``sink_mass``, ``mean_distance``, ``entropy``, ``previous_token``, ``duplicate_token``
            and ``induction``, and with ``received`` for ``sink``.
        query_slice: Positions of the queries to count, as a Python slice of the row: ``slice(65, None)``.
        needle: What heads may have copied into the answer, as in `retrieval_heads`, which then is asked.

    Returns:
        One line per (layer, head), in the order of the dataset. ``role`` has the largest score relative to its
        threshold among those that exceed it, ``roles`` lists all of these, strongest first; ``score`` is that of the
        role. Of both kinds of sinks, ``first_token_sink`` comes first where it passes and at least half of what is
        on sinks is on the first tokens, as if its score were that of ``sink``. Where none does, the role is ``mixed``, with ``score``
        NaN; where there is no data, ``role`` is missing.
        Then one ``<role>_score`` each. ``attrs["part"]``: what was measured of the model, if not all of it.

    Raises:
        ValueError: A statistic was not measured, the slice holds no measured query, or there is a needle and
            `retrieval_heads` cannot tell.

    Source: TransformerLens, head_detector (previous token, duplicate token, induction); Gu et al., arXiv 2410.10781;
    Xiao et al., arXiv 2410.10819 (streaming); Wu et al., arXiv 2404.15574 (retrieval).
    """
    import pandas

    dataset = as_dataset(ds)
    require(dataset, *NEEDED)
    scores = role_scores(dataset, query_slice, needle)
    relative, best = strengths(scores), strongest_roles(scores)
    values = {role: score.values for role, score in scores.items()}
    lines = []
    for place in np.ndindex(*best.shape):
        of_head = {role: float(score[place]) for role, score in values.items()}
        strength = dict(zip(THRESHOLDS, relative[(slice(None), *place)], strict=True))
        passed = [role for role, threshold in THRESHOLDS.items() if of_head[role] > threshold]
        roles = sorted(passed, key=strength.__getitem__, reverse=True)
        lines.append(
            {
                "layer": int(dataset["layer"].values[place[0]]),
                "head": int(dataset["head"].values[place[1]]),
                "role": roles[0] if roles else None if best[place] == NO_DATA else "mixed",
                "roles": roles,
                "score": of_head[roles[0]] if roles else np.nan,
            }
            | {f"{role}_score": score for role, score in of_head.items()}
        )
    frame = pandas.DataFrame(lines)
    frame.attrs["part"] = measured_part(dataset)
    return frame
