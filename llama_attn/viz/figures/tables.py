"""What figures of tables ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_table(frame: Any, columns: Sequence[str], once: Sequence[str]) -> None:
    """Refuse what no figure can be made of.

    Args:
        frame: What was given for it.
        columns: Names of the columns that it must have.
        once: Those of them of which no line may say the same as another.

    Raises:
        TypeError: It is no table.
        ValueError: A column is missing, a thing is said twice, or there is no line.
    """
    import pandas

    if not isinstance(frame, pandas.DataFrame):
        raise TypeError(f"frame: expected a pandas.DataFrame, as pandas.read_csv gives it, got {type(frame).__name__}")
    if missing := [name for name in columns if name not in frame]:
        raise ValueError(f"frame: expected the columns {list(columns)}, got {list(frame.columns)} without {missing}")
    if frame.empty:
        raise ValueError("frame: expected at least one line, got none")
    if (twice := frame[frame.duplicated([*once])]).size:
        same = ", ".join(f"{name} {twice[name].iloc[0]}" for name in once)
        raise ValueError(f"frame: expected each {', '.join(once)} once, got {same} twice")
