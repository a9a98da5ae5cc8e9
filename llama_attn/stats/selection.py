"""Which statistics a forward is asked for."""

from __future__ import annotations

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.merge import merges
from llama_attn.stats.table import Statistic, statistics_table

# What is measured on the residual stream, not in the attention call.
HIDDEN = ("hidden", "hidden_real")
# What a model may not show, in words.
WHERE = {
    **dict.fromkeys(HIDDEN, "the residual stream that enters each layer, (batch, token, channel)"),
    "value_output": "an output projection that takes the attention's output as it is",
}


def named(config: AttentionStatsConfig) -> list[Statistic]:
    """What is asked for by name, and the norms."""
    table, names = statistics_table(), () if config.statistics == "all" else config.statistics
    if not config.norms:
        return [table[name] for name in names if name in table]
    return [s for s in table.values() if s.name in names or s.is_norm]


def sees_states(config: AttentionStatsConfig) -> bool:
    """Whether hidden states are measured."""
    return any(statistic.observes in HIDDEN for statistic in named(config))


def sees_outputs(config: AttentionStatsConfig) -> bool:
    """Whether what stands behind the output projection is measured."""
    return any(statistic.observes == "value_output" for statistic in named(config))


def wanted_statistics(config: AttentionStatsConfig, *, has_tokens: bool, alone: bool = True) -> tuple[Statistic, ...]:
    """The entries of the table that ``config`` asks for, in the order of the table.

    Args:
        config: What was asked for.
        has_tokens: Whether the token ids of all keys are known.
        alone: Whether the forward stands alone, and is not put together with others.

    Raises:
        ValueError: A statistic is named that needs something which is not there, or that several
            forwards cannot give.
    """
    given = {need for need in ("segments", "rows", "keep") if getattr(config, need) is not None}
    have = given | ({"tokens"} if has_tokens else set())
    ways = {
        **{need: f"`{need}` in the AttentionStatsConfig" for need in ("segments", "rows", "keep")},
        "tokens": "the ids of all tokens: input_ids, not inputs_embeds, and none of them from a cache",
    }
    chosen, everything = [], config.statistics == "all" or config.norms
    asked = set() if config.statistics == "all" else set(config.statistics)
    for name, statistic in statistics_table().items():
        # What is told of in the configuration is told for statistics that need it.
        is_told = not given.isdisjoint(statistic.needed) and have.issuperset(statistic.needed)
        if not everything and name not in asked and not is_told:
            continue
        lacking = [need for need in statistic.needed if need not in have]
        if statistic.is_norm:
            is_named = name in asked
            if is_named and not alone and not merges(statistic):
                raise ValueError(
                    f"statistics: {name!r} is a number of one forward, which the steps of generate cannot be merged "
                    "into; leave it out, or measure one forward over the finished sequence"
                )
            wanted = is_named or (config.norms and (alone or merges(statistic)))
        else:
            wanted = is_told or name in asked or (config.statistics == "all" and not lacking)
        if wanted and lacking:
            raise ValueError(f"statistics: {name!r} needs {' and '.join(ways[need] for need in lacking)}")
        if wanted:
            chosen.append(statistic)
    return tuple(chosen)
