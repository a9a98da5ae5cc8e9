"""``llama-attn budget``: how much of the attention a smaller cache keeps, and what the model loses with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from llama_attn.analysis.keep_mask import POLICIES, Policy
from llama_attn.cli.engine import how_to_be_faster
from llama_attn.cli.folder import BUDGET, BUDGET_PICTURE, clear, folder
from llama_attn.cli.loading import load_model, load_tokenizer, plan
from llama_attn.cli.losses import Continuation
from llama_attn.cli.measuring import Subject, refusals
from llama_attn.cli.options import Adapter, Attn, Device, Dtype, GgufFile, Model, Out, TrustRemoteCode, check_loading
from llama_attn.cli.terminal import TABLES, console, fail, how_to_draw, missing, new_table, number, say
from llama_attn.cli.texts import read_texts, tokenize
from llama_attn.demo import Checkpoint
from llama_attn.observe.interventions import block_keys
from llama_attn.observe.recording import record
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.files import complete_file
from llama_attn.stats.shares import percent

if TYPE_CHECKING:
    import pandas
    import xarray
    from rich.table import Table

    from llama_attn.stats.container import AttentionStats

# Queries whose weights the policies look at, and tokens that read what was kept.
WINDOW, MOST_READERS = 64, 512
BUDGETS = "64,256,1024"


def budget(
    model: Model,
    file: Annotated[Path, typer.Option(help="File with plain text.", show_default=False)],
    budgets: Annotated[
        str | None,
        typer.Option(help="Keys that are kept per KV head, with commas.", show_default=f"those of {BUDGETS} that fit"),
    ] = None,
    policies: Annotated[str, typer.Option(help=f"Some of {', '.join(POLICIES)}.")] = "streaming,h2o,snapkv",
    readers: Annotated[
        int | None,
        typer.Option(
            min=2, help=f"Tokens at the end that read the kept keys; a quarter of the text, at most {MOST_READERS}."
        ),
    ] = None,
    attn: Attn = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    adapter: Adapter = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = None,
    out: Out = Path("llama_attn_budget"),
) -> None:
    """Tell how much of the cache can go: attention kept, and the loss of the model that sees nothing else.

    The text is read up to its last part, and each policy chooses from what was measured there. The last part then reads
    it: once whole, which tells how much of its attention lies on the kept keys, and once seeing only these and itself.
    """
    check_loading(attn, dtype, device, adapter)
    names, sizes = _named(policies), _sizes(BUDGETS if budgets is None else budgets)
    if lacking := missing(TABLES):
        fail(f"--policies: choosing keys needs {', '.join(lacking)}: pip install 'llama_attn[analysis]'")
    chosen = plan(Checkpoint(model, gguf_file), trust_remote_code)
    if not chosen.generates:
        fail(f"{chosen.checkpoint.name} is no model that generates text ({chosen.name}), so it has no loss")
    tokenizer = load_tokenizer(chosen)
    tokens = tokenize(read_texts(None, None, None, None, [file], False), tokenizer)
    chosen.check_tokens(tokens.rows)
    length = tokens.length
    if length < (shortest := 8 if readers is None else 4):
        fail(f"--file: expected a text of {shortest} tokens or more, got {length}")
    last = min(MOST_READERS, length // 4) if readers is None else readers
    first = length - last
    if first < 2:
        fail(f"--readers: the text has {length:,} tokens, so expected 2 to {length - 2}, got {last}")
    if budgets is None and min(sizes) > first:
        *others, last_size = (f"{size:,}" for size in sizes)
        fail(
            f"none of the default budgets {', '.join(others)} and {last_size} fits, since {first} of {length} tokens are "
            f"read before; give --budgets of 1 to {first} keys"
        )
    if budgets is None and first < max(sizes):
        say(f"budgets: {', '.join(f'{size:,}' for size in sizes if size > first)} left out, of {first:,} tokens")
        sizes = [size for size in sizes if size <= first]
    if max(sizes) > first:
        fail(
            f"--budgets: expected 1 to {first} keys, since {first} of {length} tokens are read before, got {max(sizes)}"
        )
    if "snapkv" in names and min(sizes) < 2:
        fail("--budgets: snapkv keeps the last key and others besides, so expected 2 or more, got 1")
    with folder(out):
        loaded = load_model(chosen, attn=attn, dtype=dtype, device=device, adapter=adapter)
        subject = Subject.of(loaded, generates=True)
        if subject.adds_tokens:
            fail("--adapter: it adds keys of its own before the text, which no policy knows")
        ids = torch.tensor([list(tokens.rows[0])], device=subject.device)
        with refusals(loaded), torch.no_grad():
            read, stats = read_before(loaded, ids, first, names)
            frame = curves(read, stats.to_xarray(), names, sizes)
        clear(out)
        frame.attrs |= {
            "model": chosen.checkpoint.title,
            "text": f"{file.name}, {first:,} tokens kept from, {last:,} readers",
        }
        written = _write(frame, out)
    console.print(table_of_budgets(frame))
    say(
        f"loss of the last {last - 1:,} tokens when the {last:,} readers see all {first:,} before them: "
        f"{number(frame.attrs['full_loss'])} nat"
    )
    say(subject.about(stats))
    say(f"{' and '.join(written)} {'are' if len(written) > 1 else 'is'} in {out}")
    if (how := how_to_draw()) is not None:
        say(how)
    if (hint := how_to_be_faster(stats, subject.device)) is not None:
        say(hint)


def read_before(model: Any, ids: Tensor, first: int, policies: Sequence[Policy]) -> tuple[Continuation, AttentionStats]:
    """Read a text up to its last part: what reads on from there, and what the policies choose by.

    Args:
        model: A causal language model.
        ids: Its text, (1, token).
        first: Tokens that are read now; the others read them.
        policies: Names of policies.
    """
    rows = slice(max(0, first - WINDOW), None) if {"snapkv", "tova"} & set(policies) else None
    names = ["received_total", *(["key_norm"] if "knorm" in policies else [])]
    with record(model, AttentionStatsConfig(statistics=tuple(names), rows=rows)) as recording:
        read = Continuation.of(model, ids, first)
    return read, recording.stats


def curves(
    read: Continuation, dataset: xarray.Dataset, policies: Sequence[Policy], budgets: Sequence[int]
) -> pandas.DataFrame:
    """What each policy keeps with each budget, and the loss with that.

    Args:
        read: The end of the text, which reads what comes before.
        dataset: Statistics of what comes before.
        policies: Names of policies.
        budgets: Keys kept per KV head.

    Returns:
        Columns ``policy``, ``budget`` [keys], ``layer``, ``kept`` [probability]: the mean over the readers and heads of
        the attention on kept keys, readers themselves among them, and ``loss`` [nat] of the readers that see nothing
        else, the same in all layers; ``attrs["full_loss"]`` is that of readers that see everything.
    """
    import pandas

    from llama_attn.analysis import keep_mask

    first, lines = int(dataset["key"].values[-1]) + 1, []
    for policy in policies:
        for size in budgets:
            # It keeps the keys of the queries that it observes, so that these may be half of the budget at most.
            recent = min(WINDOW, size // 2, first - 1) if policy == "snapkv" else None
            keep = keep_mask(dataset, policy, size, recent=recent)
            layers, mask = keep["layer"].values.tolist(), torch.as_tensor(keep.values)
            config = AttentionStatsConfig(statistics="kept_mass", keep=mask, layers=tuple(layers))
            with record(read.model, config) as recording:
                full = float(read.losses().mean())
            kept = recording.stats["kept_mass"][:, 0].double().mean((1, 2)).tolist()
            with block_keys(read.model, keep, first_query=first):
                loss = float(read.losses().mean())
            lines += [(policy, size, layer, mass, loss) for layer, mass in zip(layers, kept, strict=True)]
    frame = pandas.DataFrame(lines, columns=["policy", "budget", "layer", "kept", "loss"])
    frame.attrs["full_loss"] = full
    return frame


def table_of_budgets(frame: pandas.DataFrame) -> Table:
    """Attention kept, and the loss and its change, by policy and budget."""
    table = new_table("policy", "keys", "attention kept", "least layer", "loss", "change", fold="policy")
    full = frame.attrs["full_loss"]
    for policy in dict.fromkeys(frame.policy):
        of_policy = frame[frame.policy == policy]
        for size in dict.fromkeys(of_policy.budget):
            part = of_policy[of_policy.budget == size].reset_index(drop=True)
            least, loss = int(part.kept.argmin()), float(part.loss[0])
            table.add_row(
                str(policy), f"{size:,}", f"{percent(part.kept.mean(), 1)}", f"{percent(part.kept[least], 1)} (layer {part.layer[least]})",
                number(loss), number(loss - full, 3, "+"),
            )  # fmt: skip
    return table


def _write(frame: pandas.DataFrame, out: Path) -> list[str]:
    with complete_file(out / BUDGET) as unfinished:
        frame.to_csv(unfinished, index=False)
    if how_to_draw() is not None:
        return [BUDGET]
    from llama_attn.viz import plot_budget

    with complete_file(out / BUDGET_PICTURE) as unfinished:
        plot_budget(frame).savefig(unfinished, format="png", dpi=120)
    return [BUDGET, BUDGET_PICTURE]


def _named(policies: str) -> list[Policy]:
    names = list(dict.fromkeys(name.strip() for name in policies.split(",") if name.strip()))
    chosen = [policy for policy in POLICIES if policy in names]
    if not names or len(chosen) < len(names):
        fail(f"--policies: expected some of {', '.join(POLICIES)}, got {policies!r}")
    return chosen


def _sizes(budgets: str) -> list[int]:
    parts = [part.strip() for part in budgets.split(",")]
    if not all(part.isdecimal() and 0 < int(part) < 2**31 for part in parts):
        fail(f"--budgets: expected numbers of keys from 1 up, with commas, got {budgets!r}")
    return sorted({int(part) for part in parts})
