"""``llama-attn corpus`` and ``llama-attn merge``: the statistics of many texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import distributed

from llama_attn.cli.folder import REPORT
from llama_attn.cli.layers import Choice
from llama_attn.cli.loading import load_model, load_tokenizer, plan
from llama_attn.cli.measuring import Subject, check_length, context_of, refusals
from llama_attn.cli.options import (
    Adapter,
    Attn,
    Device,
    Dtype,
    GgufFile,
    Model,
    TrustRemoteCode,
    check_loading,
    check_statistics,
    names_of,
    refuse,
)
from llama_attn.cli.progress import reading
from llama_attn.cli.terminal import TABLES, fail, first_line, how_to_draw, missing, say
from llama_attn.demo import Checkpoint
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.labels import Label
from llama_attn.stats.table import default_statistics, statistics_table

if TYPE_CHECKING:
    from llama_attn.corpus.records import Source
    from llama_attn.corpus.summary import CorpusSummary

# Shards of a corpus if nobody says how large they are, and the smallest of them [records].
SHARDS, SMALLEST_SHARD = 256, 64
MAX_TOKENS = 512
FIELD, SPLIT = "text", "train"
# What a shell reports of a command that Ctrl-C has ended.
STOPPED = 130


def corpus(
    model: Model,
    data: Annotated[
        list[str],
        typer.Argument(
            help="Files of texts, one on each line (.txt), JSON lines (.jsonl) or tables (.parquet), folders of them, or ids "
            "of datasets on the hub.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; run again, the command goes on in it.")],
    field: Annotated[
        str | None,
        typer.Option(help="Field of JSON lines, or column of tables, that holds the text.", show_default=FIELD),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset of the hub.", show_default=SPLIT)] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a dataset of the hub that has several.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"What longer texts are cut to; by default {MAX_TOKENS}, or the context of the model if that is shorter.",
            show_default=False,
        ),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a batch at most; texts of similar length are read together.")
    ] = 4096,
    limit: Annotated[int | None, typer.Option(min=1, help="Records that are read at most.")] = None,
    shard_records: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Records that are measured and written at once; by default as many as make {SHARDS} shards, and "
            f"{SMALLEST_SHARD} or more.",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Texts that are kept of each head and statistic.")] = 4,
    statistics: Annotated[
        str | None,
        typer.Option(help="Statistics besides the default ones, with commas, e.g. induction,weight_count,weight_mass."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers to measure: 0-9, 3,5,7 or all.")] = "all",
    heads: Annotated[str, typer.Option(help="Query heads to measure, likewise.")] = "all",
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="All processes of the launcher share one model, split by heads.")
    ] = False,
    attn: Attn = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    adapter: Adapter = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Measure every head over many texts, on any number of processes.

    Start it several times, with `torchrun -m llama_attn.corpus` or on several machines that share the folder: each
    measures what no other does. Killed and started again, it goes on. What cannot be read is counted and named in
    skipped.jsonl.
    """
    check_loading(attn, dtype, device, adapter)
    if lacking := missing(TABLES):
        fail(f"a summary needs {', '.join(lacking)}: pip install 'llama_attn[corpus]'")
    from llama_attn.corpus.batches import Reader
    from llama_attn.corpus.hub import HubDataset, is_hub_dataset
    from llama_attn.corpus.records import find_files, survey
    from llama_attn.corpus.run import SKIPPED, SUMMARY, Run
    from llama_attn.corpus.weights import fingerprint

    check_statistics(statistics)
    config = _config(statistics, layers, heads)
    datasets = [one for one in data if is_hub_dataset(one)]
    try:
        noted = shard_records or SMALLEST_SHARD
        files = find_files([one for one in data if one not in datasets])
        if not datasets:
            refuse({"split": split, "subset": subset}, "it is of datasets on the hub, and DATA names none")
            if all(path.suffix == ".txt" for _, path in files):
                refuse({"field": field}, "it is of JSON lines and tables, and DATA has lines of plain text alone")
        sources = [survey(name, path, noted) for name, path in files]
        sources += [HubDataset(one, subset, split or SPLIT).survey(noted, limit) for one in datasets]
    except (ValueError, ImportError, OSError) as error:
        fail(first_line(error))
    every, sources = (shard_records, sources) if shard_records else _in_shards(sources, limit)
    chosen = plan(Checkpoint(model, gguf_file), trust_remote_code)
    tokenizer = load_tokenizer(chosen)
    group = _group() if tensor_parallel else None
    loaded = load_model(
        chosen,
        attn=attn,
        dtype=dtype,
        device=_own_device(device),
        adapter=adapter,
        split=0 if group is None else group.size(),
    )
    subject = Subject.of(loaded, generates=False)
    if subject.adds_tokens:
        fail("--adapter: it adds tokens of its own before the text, which no position of a text is of")
    if max_tokens is None:
        max_tokens = min(MAX_TOKENS, context_of(loaded) or MAX_TOKENS)
    check_length(loaded, max_tokens)
    reader = Reader(subject.part, tokenizer, config, fingerprint(loaded), max_tokens, batch_tokens, examples)
    settings = {"model": chosen.checkpoint.title, "dtype": str(next(loaded.parameters()).dtype), "attn": attn}
    run = Run(out, reader, sources, FIELD if field is None else field, every, limit, settings, group)
    records = sum(shard.records for shard in run.shards)
    if not records:
        lost = [source for source in sources if source.unreadable]
        reasons = "".join(f"; {source.name}: {source.unreadable}" for source in lost[:3])
        fail(f"DATA: there is no text in {', '.join(source.name for source in sources[:3])}{reasons}")
    try:
        run.begin()
        summary = run.finished()
        ending = "is" if summary is None else "was finished before,"
        if summary is None:
            if (done := run.complete) and _speaks():
                say(f"{done} of {len(run.shards)} shards are complete in {out}; going on from there")
            with reading(records, shown=_speaks()) as advance, refusals(loaded):
                summary = run.measure(advance)
    except OSError as error:
        fail(
            f"--out: cannot write to {out}: {first_line(error)}; what is done stays, and the command goes on from there"
        )
    except ValueError as error:
        fail(first_line(error))
    except KeyboardInterrupt:
        if _speaks():
            say(
                f"stopped; {run.complete} of {len(run.shards)} shards are complete in {out}, and the same command goes on "
                "from there"
            )
        raise typer.Exit(STOPPED) from None
    if summary is None:
        fail(f"DATA: none of {records:,} records could be read; {out / SKIPPED} says why")
    if not _speaks():
        return
    say(subject.name)
    say(f"{_told(summary, _places(summary.files))}; {SUMMARY} {ending} in {out}")
    _report(summary, out / REPORT, out / SUMMARY)


def _report(summary: CorpusSummary, path: Path, saved: Path) -> None:
    """Write the report, if nobody has, or say what it needs."""
    if (reason := how_to_draw()) is not None:
        say(f"no report: {reason}; then llama-attn report {saved}")
        return
    if not path.exists():
        from llama_attn.viz import corpus_report

        try:
            corpus_report(summary, path)
        except (ValueError, OSError) as error:
            fail(f"no report: {first_line(error)}")
    say(str(path))


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or files of summaries.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File for the summary of all of them.")],
) -> None:
    """Merge the results of several runs of the same model over different texts.

    Texts that several of them have count each time, and are warned of as far as they are known: a summary keeps a sample
    of its texts, all of them only where there are few.
    """
    from llama_attn.corpus.examples import SAMPLED
    from llama_attn.corpus.run import SHARDS as PARTS, SUMMARY
    from llama_attn.corpus.summary import CorpusSummary

    files: list[Path] = []
    # Which of the folders each file is of.
    origins: list[Path] = []
    for given in folders:
        parts = sorted((given / PARTS).glob("*.safetensors"))
        found = [given] if given.is_file() else [given / SUMMARY] if (given / SUMMARY).is_file() else parts
        if not found:
            fail(f"FOLDERS: there is no {SUMMARY} and no shard in {given}")
        if {file.resolve() for file in found} & {file.resolve() for file in files}:
            fail(f"FOLDERS: {given} is given twice, and its texts would count twice")
        files += found
        origins += [given] * len(found)
    known: dict[int, Path] = {}
    twice: set[int] = set()
    # Whether a summary has texts that are not in its sample.
    sampled = False

    def loaded(file: Path, origin: Path) -> CorpusSummary:
        """A summary, after a look at which of its sampled texts another folder has too."""
        nonlocal sampled
        summary = CorpusSummary.load(file)
        sampled |= summary.texts > SAMPLED
        for digest in summary.sample.digest.tolist():
            if known.setdefault(digest, origin) != origin:
                twice.add(digest)
        return summary

    try:
        summary = CorpusSummary.merge(map(loaded, files, origins))
        summary.save(out)
    except (ValueError, OSError) as error:
        fail(first_line(error))
    if twice:
        say(
            f"warning: of {len(known):,} sampled texts {len(twice):,} are in more than one of FOLDERS, and count each time"
        )
    elif sampled and len({*origins}) > 1:
        say(f"no text is in more than one of FOLDERS, as far as a sample of {len(known):,} texts tells")
    say(f"{_told(summary)}; merged from {len(files)} {'file' if len(files) == 1 else 'files'} into {out}")


def _told(summary: CorpusSummary, places: str = "") -> str:
    cut = f", {summary.cut:,} of them cut to {summary.about.max_tokens:,}" if summary.cut else ""
    skipped = f", {summary.skipped:,} records skipped" if summary.skipped else ""
    return f"{summary.texts:,} texts{places}{cut}, {summary.tokens:,} tokens{skipped}"


def _places(files: Sequence[str]) -> str:
    """Where the texts stood, if not all in one file: whoever gave files may take each of them for a text."""
    if len(files) < 2:
        return ""
    suffixes = {Path(file).suffix for file in files}
    what = "lines" if suffixes <= {".txt", ".jsonl"} else "rows" if suffixes == {".parquet"} else "records"
    return f" ({what} of {len(files):,} files)"


def _config(statistics: str | None, layers: str, heads: str) -> AttentionStatsConfig:
    """What is measured. Ends the command for what does not add up over texts."""
    from llama_attn.corpus.statistics import check_statistics

    names = tuple(dict.fromkeys([*default_statistics(), *names_of(statistics)]))
    try:
        config = AttentionStatsConfig(
            statistics=names, layers=_indices("--layers", layers), heads=_indices("--heads", heads), offload="cpu"
        )
        wanted = {name: statistics_table()[name] for name in names}
        whole = [name for name, statistic in wanted.items() if statistic.dtype is not None]
        check_statistics({name: Label.of(statistic) for name, statistic in wanted.items()}, whole)
    except ValueError as error:
        fail(first_line(error))
    return config


def _indices(option: str, text: str) -> tuple[int, ...] | None:
    wanted = Choice.parse(option, text).wanted
    return None if wanted is None else tuple(sorted(wanted))


def _in_shards(sources: Sequence[Source], limit: int | None) -> tuple[int, list[Source]]:
    """Records of a shard, so that there are neither too many nor too small ones, and the files with these starts."""
    records = sum(source.records for source in sources)
    smallest = -(-min(records, limit or records) // (SHARDS * SMALLEST_SHARD)) or 1
    return smallest * SMALLEST_SHARD, [replace(source, starts=source.starts[::smallest]) for source in sources]


def _group() -> distributed.ProcessGroup:
    """The processes of the launcher. Ends the command if nobody has launched it."""
    if "RANK" not in os.environ:
        fail("--tensor-parallel: start it with torchrun --nproc-per-node N -m llama_attn.corpus …")
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return distributed.distributed_c10d._get_default_group()


def _speaks() -> bool:
    """Whether this process says what all of its launcher did: the first one, or one that nobody has launched."""
    return os.environ.get("RANK", "0") == "0"


def _own_device(device: str) -> str:
    """Each process of a launcher has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "auto" and rank is not None and torch.cuda.is_available() else device
