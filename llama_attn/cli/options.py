"""Options that several commands share, and what is asked of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from llama_attn.backends.registry import get_backend
from llama_attn.cli.advice import ELSEWHERE
from llama_attn.cli.loading import DTYPES, check_adapter
from llama_attn.cli.terminal import fail, first_line
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.row_positions import Rows, counts_from_end, read_rows
from llama_attn.stats.segments import GENERATED, Segments
from llama_attn.stats.table import default_statistics, statistics_table

# What the report shows besides the default statistics.
OF_REPORT = (
    "weights_map", "topk_weight", "topk_position", "distance_histogram", "previous_token", "duplicate_token", "induction",
)  # fmt: skip
# Those of them that need to know which token each is.
OF_IDS = tuple(name for name in OF_REPORT if "tokens" in statistics_table()[name].needed)

Model = Annotated[
    str,
    typer.Argument(help="A local folder, a GGUF file, or an id on the Hugging Face hub.", show_default=False),
]
Attn = Annotated[
    str,
    typer.Option(help="Attention backend, see `llama-attn backends`; auto: streaming for a Llama, else the model's."),
]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="auto spreads the model over what is there; else cpu, cuda, cuda:1 …")]
Adapter = Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter to put on the model.")]
GgufFile = Annotated[
    str | None, typer.Option(help="Name of the GGUF file in the folder or repository; one that is alone is found.")
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="For a model with code of its own: run that, or transformers' class in its place.",
        show_default=False,
    ),
]
Files = Annotated[
    list[Path] | None, typer.Option(help="File with plain text, no chat template; several are rows of a batch.")
]
Generate = Annotated[
    int | None, typer.Option(help="Generate so many tokens, greedily, and measure these too.", metavar="N")
]
RowsOf = Annotated[
    str | None,
    typer.Option(
        "--rows",
        help="Queries of which the weight of every key is kept, so that the report's answer is exact: generated, all, or "
        "positions such as 0,5,-1.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(help="Folder for all that is written; files of an older run in it are replaced."),
]


def check_loading(attn: str, dtype: str, device: str, adapter: Path | None) -> None:
    """End the command for what cannot be loaded so. Nothing is loaded yet."""
    if dtype not in DTYPES:
        fail(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        if attn != "auto":
            get_backend(attn)
    except (ValueError, ImportError, RuntimeError) as error:
        fail(f"--attn: {first_line(error)}")
    try:
        there = torch.empty(0, device="cpu" if device == "auto" else device).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        # What PyTorch says depends on how it was built.
        there = False
    if not there:
        fail(f"--device: {device} is not there; try auto or cpu")
    if adapter is not None:
        check_adapter(adapter)


def check_statistics(statistics: str | None, *, documents: bool = False, rows: Rows | None = None) -> None:
    """End the command for statistics that need more than their name."""
    there = {"segment_mass": documents, "row_weights": rows is not None}
    for name in names_of(statistics):
        if name in ELSEWHERE and not there.get(name):
            fail(f"--statistics: {name} {ELSEWHERE[name]}")


def refuse(options: Mapping[str, object], why: str) -> None:
    """End the command for an option that was given and would do nothing.

    Args:
        options: Values by the names of parameters; None for those that were not given.
        why: What it needs.
    """
    for name, value in options.items():
        if value is not None:
            fail(f"--{name.replace('_', '-')}: {why}")


def check_generate(generate: int | None) -> None:
    """End the command for a number of tokens that cannot be."""
    if generate is not None and generate < 1:
        fail(f"--generate: expected 1 or more, got {generate}")


def rows_of(rows: str | None, generate: int | None) -> Rows | None:
    """What ``--rows`` names. Ends the command for anything else."""
    if rows is None:
        return None
    if rows == GENERATED:
        if generate is None:
            fail(f"--rows: {GENERATED} needs --generate")
        return rows
    try:
        found = slice(None) if rows == "all" else read_rows([int(position) for position in rows.split(",")])
    except ValueError:
        fail(f"--rows: expected {GENERATED}, all, or distinct positions such as 0,5,-1, got {rows!r}")
    if generate is not None and counts_from_end(found):
        fail(
            f"--rows: with --generate the end is not known before, so that positions count from 0; {GENERATED} may be meant"
        )
    return found


def stats_config(
    statistics: str | None = None,
    kind: str = "weights",
    layers: list[int] | None = None,
    segments: Segments | None = None,
    *,
    rows: Rows | None = None,
    has_ids: bool = True,
) -> AttentionStatsConfig:
    """What the pictures, the report and the tables need, and what was asked for besides."""
    needed = [*default_statistics(), f"{kind}_map", *OF_REPORT]
    if segments is not None:
        needed.append("segment_mass")
    if not has_ids:
        needed = [name for name in needed if name not in OF_IDS]
    asked = "all" if statistics == "all" else tuple(dict.fromkeys([*needed, *names_of(statistics)]))
    try:
        return AttentionStatsConfig(
            statistics=asked, norms=True, layers=None if layers is None else tuple(layers), segments=segments, rows=rows
        )
    except ValueError as error:
        fail(f"--statistics: {error}")


def names_of(statistics: str | None) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in (statistics or "").split(",") if name.strip()]
