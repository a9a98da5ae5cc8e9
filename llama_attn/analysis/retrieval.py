"""Which heads fetch what is far away, and which can do with the sink and what is near?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.answer import (
    GENERATED,
    answering,
    first_generated,
    generated_tokens,
    pick_names,
    require_segments,
    seen_of_segments,
)
from llama_attn.analysis.dataset import as_dataset, direction_of, labels, real_tokens, require
from llama_attn.analysis.part import measured_part
from llama_attn.analysis.uniform import measured_with, share_of_keys, uniform_attention

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Array, Source

WU = "Wu et al., arXiv 2404.15574"
CHUANG = "Chuang et al., arXiv 2407.07071"
XIAO = "Xiao et al., arXiv 2410.10819 (DuoAttention)"
# A head that copies more than this share of the needle is a retrieval head (Wu et al., section 2).
RETRIEVAL = 0.1
# A head with less than this share of its attention beyond sink and window is a streaming head.
STREAMING = 0.1


def retrieval_heads(ds: Source, needle: tuple[int, int]) -> xarray.Dataset:
    """Which heads copy a needle from the prompt into the answer.

    A head copies a token of the needle when a generated token equals the token at the key that the head attended most
    when it was drawn, and that key lies in the needle.

    Args:
        ds: Statistics of a run of ``generate`` with ``topk_position`` and token strings (`AttentionStats.with_tokens`),
            and with segments or ``rows="generated"``, which say where the answer begins.
        needle: First position of the needle, and the one behind its last [token].

    Returns:
        These variables (layer, batch, head).

        - ``score`` [fraction]: share of the needle's tokens that the head copied, each counted once.
        - ``steps``: how many generated tokens it copied from the needle, which over the length of the needle is the
          number that the authors' code adds up.
        - ``retrieval``: whether the score exceeds 0.1.

        NaN, 0 and False in layers without data. The last token is not known where it was never fed back, and counts as
        no copy; it mostly is the end of the text. ``attrs`` hold ``needle``, ``threshold`` and ``part``.

    Raises:
        ValueError: A statistic, the tokens or where the answer begins is missing, or the needle does not lie in the prompt.

    Source: Wu et al., arXiv 2404.15574, section 2 (score, threshold 0.1).
    """
    import xarray

    dataset = as_dataset(ds)
    require(dataset, "topk_position")
    if "key_token" not in dataset.coords:
        raise ValueError("source: expected token strings; give them with AttentionStats.with_tokens")
    first, stop = _needle(dataset, needle)
    answer = answering(dataset)
    most = answer.topk_position.isel(rank=0).transpose("layer", "batch", "head", "query").values
    strings, start = dataset.key_token.values, int(dataset["key"].values[0])
    copied = np.zeros((*most.shape[:3], stop - first), dtype=bool)
    steps = np.zeros(most.shape[:3], dtype=np.int64)
    for b in range(answer.sizes["batch"]):
        for step, token in enumerate(generated_tokens(answer, b)):
            if token is None:
                continue
            for at in range(first, stop):
                if str(strings[b, at - start]) == token:
                    hit = most[:, b, :, step] == at
                    copied[:, b, :, at - first] |= hit
                    steps[:, b] += hit
    axes = ("layer", "batch", "head")
    score = np.where((most >= 0).any(-1), copied.mean(-1), np.nan)
    described = {
        "score": (score, "fraction", "share of the needle that the head copied"),
        "steps": (steps, "tokens", "generated tokens that the head copied from the needle"),
        "retrieval": (score > RETRIEVAL, "bool", f"copied more than {RETRIEVAL:g} of the needle"),
    }
    return xarray.Dataset(
        {name: (axes, values, {"units": unit, "long_name": meaning, "source": WU}) for name, (values, unit, meaning) in described.items()},
        {name: dataset[name].values for name in axes},
        {"needle": [first, stop], "threshold": RETRIEVAL, "part": measured_part(dataset)},
    )  # fmt: skip


def lookback_ratio(
    ds: Source, context: str | Sequence[str] | None = None, *, new: str | Sequence[str] | None = None
) -> xarray.DataArray:
    """How much each head looks back at the context rather than at what has been generated, token by token.

    LR = A(context) / (A(context) + A(new)), of the mean attention per token on each: of the N context tokens that the
    query sees, and of the tokens generated so far, the query among them.

    Args:
        ds: Statistics of a run of ``generate`` with segments, and so with ``segment_mass``.
        context: Names of the segments that are the context; None for the whole prompt, with what is in no segment, but
            for ``new``.
        new: Names of segments of the prompt that count as new, such as "Answer:" at its end, which the authors' code
            counts so.

    Returns:
        A ratio (layer, batch, head, query) in [0, 1], of the queries that generated tokens were drawn from, with the
        position of that token as the coordinate ``generated``. NaN where there is nothing new, as for the first token
        without ``new``, for rows that have ended, and where a query sees nothing of the context. ``attrs["part"]`` as
        in `sink_rate`.

    Raises:
        ValueError: There are no segments, no generated tokens or no such segment, one is context and new, or nobody can
            tell what a query sees.

    Source: Chuang et al., arXiv 2407.07071, section 2.
    """
    dataset = as_dataset(ds)
    require_segments(dataset)
    answer = answering(dataset)
    names = None if context is None else pick_names("context", context, dataset)
    if GENERATED not in dataset["segment"].values:
        raise ValueError(
            f"source: expected a segment {GENERATED!r}, which a run of generate adds; there are {dataset['segment'].values.tolist()}"
        )
    counted = [GENERATED, *(pick_names("new", new, dataset) if new is not None else [])]
    if names is not None and GENERATED in names:
        raise ValueError(f"context: expected segments of the prompt, got {context!r}")
    if len(set(counted) - set(names or ())) != len(counted):
        raise ValueError(f"new: expected segments of the prompt that are not context, each once, got {new!r}")
    seen = seen_of_segments(dataset).sel(query=answer["query"].values)
    new_mass, new_tokens = (
        each.sel(segment=counted).sum("segment", skipna=False) for each in (answer.segment_mass, seen)
    )
    if names is None:
        on_keys = 1 - answer.learned_sink_mass if "learned_sink_mass" in answer else 1.0
        held, tokens = on_keys - new_mass, answer.visible_keys - new_tokens
    else:
        held, tokens = (each.sel(segment=names).sum("segment", skipna=False) for each in (answer.segment_mass, seen))
    # What is left of a sum of rounded numbers may lie just below 0.
    of_context = held.clip(min=0) / tokens.where(tokens > 0)
    of_new = new_mass / new_tokens.where(new_tokens > 0)
    ratio = (of_context / (of_context + of_new)).transpose("layer", "batch", "head", "query")
    ratio = ratio.drop_vars([name for name in ratio.coords if name not in ratio.dims])
    ratio = ratio.assign_coords(generated=("query", answer["query"].values + 1)).rename("lookback_ratio")
    ratio.attrs = {
        "units": "ratio",
        "long_name": "attention per token on the context, over that and that on generated tokens",
        "source": CHUANG,
        "part": measured_part(dataset),
    }
    return ratio


def streaming_heads(ds: Source, threshold: float = STREAMING) -> xarray.Dataset:
    """Which heads need nothing but the sink and the nearest keys, as DuoAttention splits them.

    The mass outside is 1 − sink mass − local mass, less what goes to a learned sink. Where the window reaches the
    first tokens, keys lie in both; then nothing lies outside. Only queries count that see a key outside, so that a
    text must be longer than ``sink_tokens`` + ``window`` of the configuration.

    Args:
        ds: Statistics of causal attention with ``sink_mass`` and ``local_mass``.
        threshold: Streaming heads have less than this outside [probability], 0.1 by default. It is a choice: DuoAttention
            learns its split, by training gates of heads on long texts.

    Returns:
        These variables.

        - ``outside`` (layer, head) [probability]: mean over rows and queries.
        - ``uniform`` (layer) [probability]: that of uniform attention, where the threshold says little if it is small.
        - ``kind`` (layer, head): ``"streaming"``, ``"retrieval"``, or ``"no data"`` where no query sees a key outside,
          or it is unknown whether one does, as in `uniform_attention`.

        ``attrs`` hold ``threshold``, ``sink_tokens``, ``window`` and ``part``.

    Raises:
        ValueError: A statistic was not measured, attention is not causal, or the threshold is not between 0 and 1.

    Source: Xiao et al., arXiv 2410.10819 (DuoAttention); Xiao et al., arXiv 2309.17453 (sink and window).
    """
    import xarray

    dataset = as_dataset(ds)
    require(dataset, "sink_mass", "local_mass")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)) or not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a number between 0 and 1, got {threshold!r}")
    if direction_of(dataset) != "causal":
        raise ValueError(
            f"source: expected causal attention, which has a sink and a window, got {direction_of(dataset)}"
        )
    mass, of_uniform = mass_outside(dataset, uniform_attention(dataset))
    outside, uniform = mass.mean(["batch", "query"]), of_uniform.mean(["batch", "query"])
    if "layer" not in uniform.dims:
        uniform = uniform.expand_dims(layer=dataset["layer"])
    kind = labels(outside, threshold, "streaming", "retrieval")
    described = {
        "outside": (outside.transpose("layer", "head"), "probability", "mass outside sink and window"),
        "uniform": (uniform, "probability", "mass of uniform attention outside sink and window"),
        "kind": (kind.transpose("layer", "head"), "label", f"streaming where less than {threshold:g} is outside"),
    }
    settings = {name: measured_with(dataset, name) for name in ("sink_tokens", "window")}
    return xarray.Dataset(
        {name: values.drop_attrs().assign_attrs(units=unit, long_name=meaning, source=XIAO) for name, (values, unit, meaning) in described.items()},
        attrs={"threshold": float(threshold), **settings, "part": measured_part(dataset)},
    )  # fmt: skip


def mass_outside(measured: Mapping[Any, Array], uniform: Mapping[Any, Array]) -> tuple[Array, Array]:
    """Mass of every query outside sink and window, and that of uniform attention; NaN where no key lies outside."""
    inside = uniform["sink_mass"] + uniform["local_mass"]
    # Keys are counted: as shares of all, what lies outside is 1 / n or more, far above rounding. Where the window
    # reaches the sink, all that is seen lies in one of them, so that their sum is 1 or more.
    outside = (1 - inside).where(inside < 1 - 1e-9)
    mass = (share_of_keys(measured) - measured["sink_mass"] - measured["local_mass"]).clip(min=0)
    return mass.where(outside.notnull()), outside.where(real_tokens(measured, "query"))


def _needle(dataset: xarray.Dataset, needle: tuple[int, int]) -> tuple[int, int]:
    """The needle, checked against the prompt."""
    start, stop = int(dataset["key"].values[0]), first_generated(dataset)
    ends = tuple(needle) if isinstance(needle, (tuple, list)) else ()
    integers = all(isinstance(end, (int, np.integer)) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not integers or not start <= ends[0] < ends[1] <= stop:
        raise ValueError(
            f"needle: expected its first position and the one behind its last, in the prompt, {start} to {stop - 1}, got {needle!r}"
        )
    return int(ends[0]), int(ends[1])
