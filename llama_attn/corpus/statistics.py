"""Which statistics add up over texts, and how each of them does."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from llama_attn.stats.labels import Label
from llama_attn.stats.table import WHOLE_HAVE_NO_MEAN

# Axes of a statistic that says something of every query or key of a text.
OF_HEADS = (("layer", "batch", "head", "query"), ("layer", "batch", "head", "key"))
BY_POSITION = (
    *OF_HEADS, ("layer", "batch", "kv_head", "key"), ("layer", "batch", "key"), ("hidden_layer", "batch", "query"),
)  # fmt: skip
# What enters as a count of its own.
COUNTED = (
    "weight_count",
    "weight_mass",
    "hidden_top",
    "hidden_top_channel",
    "hidden_max_channel",
    "hidden_layer_median",
)


def check_statistics(labels: Mapping[str, Label], whole: Collection[str] = ()) -> None:
    """Check that statistics can be summed up over texts.

    Args:
        labels: What they are.
        whole: Those of whole numbers.

    Raises:
        ValueError: One is neither of single queries or keys nor counted, or it is of whole numbers; the message names
            those that are.
    """
    other = [name for name, label in labels.items() if label.dims not in BY_POSITION and name not in COUNTED]
    if other:
        raise ValueError(
            f"statistics: {other} do not add up over texts; expected statistics of every query or key, or some of "
            f"{list(COUNTED)}"
        )
    if without_mean := [name for name in whole if name not in COUNTED]:
        raise ValueError(f"statistics: {without_mean} do not add up over texts: {WHOLE_HAVE_NO_MEAN}")


def of_positions(labels: Mapping[str, Label]) -> dict[str, Label]:
    """Those of every query or key."""
    return {name: label for name, label in labels.items() if label.dims in BY_POSITION and name not in COUNTED}


def of_heads(labels: Mapping[str, Label]) -> tuple[str, ...]:
    """Those of every query or key of a head, the means of which over each text are its scores."""
    return tuple(name for name, label in of_positions(labels).items() if label.dims in OF_HEADS)


def with_examples(labels: Mapping[str, Label]) -> tuple[str, ...]:
    """Those of which the texts are kept that show them."""
    return tuple(
        name for name in of_heads(labels) if labels[name].unit == "probability" and "query" in labels[name].dims
    )
