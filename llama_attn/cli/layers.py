"""Which layers are measured, and which of them are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_attn.cli.terminal import fail

MOST_LAYERS = 9999
# Those of the figures that this library began with.
SEED_LAYERS = range(10)


@dataclass(frozen=True)
class Choice:
    """Layers that an option names.

    Args:
        option: The option, for messages.
        asked: What was written.
        wanted: Their indices; None for all.
    """

    option: str
    asked: str
    wanted: frozenset[int] | None

    @classmethod
    def parse(cls, option: str, asked: str) -> Choice:
        """``0-9``, ``3,5,7`` or a mixture, or ``all``. Ends the command for anything else."""
        if asked == "all":
            return cls(option, asked, None)
        wanted: set[int] = set()
        for part in asked.split(","):
            first, dash, last = part.strip().partition("-")
            last = last if dash else first
            if not first.isdecimal() or not last.isdecimal() or not int(first) <= int(last) <= MOST_LAYERS:
                fail(f"{option}: expected something like 0-9, 3,5,7 or all, got {asked!r}")
            wanted |= set(range(int(first), int(last) + 1))
        return cls(option, asked, frozenset(wanted))

    def check(self, num_layers: int) -> None:
        """End the command if the model has none of them."""
        if self.wanted is not None and min(self.wanted) >= num_layers:
            fail(f"{self.option}: {self.asked} names none of the model's layers 0 to {num_layers - 1}")

    def of(self, there: Sequence[int]) -> list[int]:
        """Those of the layers with attention that are chosen. Ends the command if there is none."""
        chosen = [layer for layer in there if self.wanted is None or layer in self.wanted]
        if not chosen:
            fail(f"{self.option}: {self.asked} names no layer with attention; there are {', '.join(map(str, there))}")
        return chosen


def choose(layers: str | None, measure_layers: str) -> tuple[Choice, Choice]:
    """What is drawn and what is measured. Ends the command for layers to draw that are not to be measured.

    Args:
        layers: What was asked to be drawn; None for the first ten, or for what is measured where that was said.
        measure_layers: What was asked to be measured.
    """
    measured = Choice.parse("--measure-layers", measure_layers)
    seed = f"{SEED_LAYERS[0]}-{SEED_LAYERS[-1]}"
    drawn = Choice.parse("--layers", layers or (seed if measured.wanted is None else measure_layers))
    if drawn.wanted is not None and measured.wanted is not None and (lost := sorted(drawn.wanted - measured.wanted)):
        named = ", ".join(map(str, lost[:10])) + (", …" if len(lost) > 10 else "")
        fail(f"--layers: {named} would not be measured, see --measure-layers {measure_layers}")
    return drawn, measured
