"""Checks for attention backends and statistics, also for those written elsewhere.

Examples:
    >>> from llama_attn import register_backend, register_statistic
    >>> from llama_attn.testing import assert_matches_reference, assert_statistic_matches
    >>> register_backend("mine", my_attention)
    >>> assert_matches_reference("mine")
    >>> assert_statistic_matches(register_statistic(my_statistic))
"""

from __future__ import annotations

from llama_attn.testing.backends import assert_matches_reference
from llama_attn.testing.comparing import relative_error
from llama_attn.testing.inputs import FEATURES, SITUATIONS, AttentionInputs, Feature, Padding, make_inputs
from llama_attn.testing.statistics import MEASURED, assert_statistic_matches

__all__ = [
    "FEATURES",
    "MEASURED",
    "SITUATIONS",
    "AttentionInputs",
    "Feature",
    "Padding",
    "assert_matches_reference",
    "assert_statistic_matches",
    "make_inputs",
    "relative_error",
]
