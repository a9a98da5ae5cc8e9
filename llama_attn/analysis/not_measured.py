"""The error of a question that needs more than what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class NotMeasuredError(ValueError):
    """Statistics lack what a question needs. The message says in Python how to measure it.

    Who advises in other words, as the command line does, words them from ``missing``.

    Args:
        found: What was expected and found, in words.
        missing: Names of the statistics that are missing; or of what else is: ``"generated"``, which tokens were
            generated, or a parameter of `AttentionStatsConfig`.
        advice: How to measure it, in Python; None for statistics that need no more than their names.
        there: Names of the statistics that there are; None if they do not matter.
    """

    def __init__(
        self, found: str, missing: Sequence[str], advice: str | None = None, there: Iterable[object] | None = None
    ) -> None:
        wanted = ", ".join(f'"{name}"' for name in missing)
        self.found, self.missing = found, tuple(missing)
        self.advice = advice or f"measure with AttentionStatsConfig(statistics=(…, {wanted}))"
        self.there = None if there is None else sorted(map(str, there))
        # What it can be made of again, so that it can be pickled.
        super().__init__(self.found, self.missing, self.advice, self.there)

    def __str__(self) -> str:
        return self.advising(self.advice)

    def advising(self, advice: str) -> str:
        """The message with other advice."""
        return "; ".join([self.found, advice, *([] if self.there is None else [f"there are {self.there}"])])
