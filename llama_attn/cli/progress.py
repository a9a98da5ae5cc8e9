"""One bar while a model is measured, or runs again and again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import nn

from llama_attn.cli.terminal import console


@contextmanager
def measuring(attention: Collection[nn.Module], num_layers: int | None, num_queries: int) -> Iterator[None]:
    """Show how far a forward, or generating, has come: layers × queries, whenever attention of a layer is done.

    Nothing is shown, and nothing watched, where no terminal is written to. Inputs and outputs are looked at, not
    touched.

    Args:
        attention: The attention modules of the layers.
        num_layers: How many layers run; None if that shows only when they do.
        num_queries: Tokens that go through them.
    """
    if not console.is_terminal:
        yield
        return
    with _bar() as progress:
        layers = "" if num_layers is None else f"{num_layers} layers × "
        total = None if num_layers is None else num_layers * num_queries
        task = progress.add_task(f"running {layers}{num_queries:,} queries", total=total)

        def advance(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output if hasattr(output, "shape") else output[0]
            progress.advance(task, states.shape[1])

        hooks = [module.register_forward_hook(advance) for module in attention]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how many of ``total`` are done; gives what to call after each. Nothing is shown where no terminal is.

    Args:
        what: What is counted, e.g. heads.
        total: How many there are.
    """
    if not console.is_terminal:
        yield lambda: None
        return
    with _bar() as progress:
        task = progress.add_task(f"trying {total:,} {what}", total=total)
        yield lambda: progress.advance(task)


@contextmanager
def reading(records: int, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show how many texts are read, tokens per second and the time left; gives what to tell texts and tokens.

    Args:
        records: How many texts there are.
        shown: Nothing is shown if not.
    """
    if not shown or not console.is_terminal:
        yield lambda texts, tokens: None
        return
    columns = (TextColumn("reading texts"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=records, tokens=0)

        def advance(texts: int, tokens: int) -> None:
            progress.update(task, advance=texts, tokens=progress.tasks[0].fields["tokens"] + tokens)

        yield advance


class _Speed(ProgressColumn):
    """Tokens per second."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed or 0
        return Text(f"{task.fields['tokens'] / seconds:,.0f} tokens/s" if seconds else "")


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True)
