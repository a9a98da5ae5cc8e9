"""``llama-attn heads``: what each head of a model does, on a text made for finding that out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from llama_attn.cli.engine import how_to_be_faster
from llama_attn.cli.folder import ROLES, ROLES_PICTURE, STATS, clear, folder
from llama_attn.cli.loading import Plan, load_model, load_tokenizer, plan
from llama_attn.cli.measuring import Subject
from llama_attn.cli.options import (
    Adapter,
    Attn,
    Device,
    Dtype,
    GgufFile,
    Model,
    Out,
    TrustRemoteCode,
    check_loading,
    stats_config,
)
from llama_attn.cli.terminal import TABLES, console, fail, how_to_draw, missing, new_table, number, say
from llama_attn.cli.texts import Prompt
from llama_attn.demo import Checkpoint
from llama_attn.stats.files import complete_file

if TYPE_CHECKING:
    import pandas
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from llama_attn.stats.container import AttentionStats

# Heads that are named per role.
STRONGEST = 4


def heads(
    model: Model,
    length: Annotated[int, typer.Option(min=2, help="Random tokens, which the model reads twice.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    attn: Attn = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    adapter: Adapter = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = None,
    out: Out = Path("llama_attn_heads"),
) -> None:
    """Tell what each head does: induction, previous token, sink …, from a random sequence that comes twice.

    In ordinary text few tokens have an earlier copy, so that heads which look for copies have nothing to find. Here
    every token of the second half has one, and no head can know the text. Roles are those of the second half.
    """
    check_loading(attn, dtype, device, adapter)
    chosen = plan(Checkpoint(model, gguf_file), trust_remote_code)
    tokenizer = load_tokenizer(chosen)
    prompt = Prompt((repeated(tokenizer, chosen, length, seed),))
    chosen.check_tokens(prompt.rows)
    second = slice(prompt.length - length, None)
    with folder(out):
        subject = Subject.of(
            load_model(chosen, attn=attn, dtype=dtype, device=device, adapter=adapter), generates=False
        )
        if subject.adds_tokens:
            fail("--adapter: it adds tokens that have no ids, and roles rest on which tokens are copies of which")
        stats, _ = subject.measure(prompt, tokenizer, stats_config(), 0)
        _show(stats, out, second)
    say(subject.about(stats))
    say(
        f"roles are of queries {second.start} to {prompt.length - 1}, the second reading of {length} random tokens (seed {seed})"
    )
    if (hint := how_to_be_faster(stats, subject.device)) is not None:
        say(hint)


def repeated(tokenizer: PreTrainedTokenizerBase, chosen: Plan, length: int, seed: int) -> list[int]:
    """The token that begins a text, if there is one, and then random tokens twice; special ones are not among them.

    Source: Olsson et al., arXiv 2209.11895.
    """
    known = getattr(chosen.config.get_text_config(), "vocab_size", None) or len(tokenizer)
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(min(known, len(tokenizer))) if token not in special]
    drawn = torch.randint(len(ordinary), (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    half = [ordinary[at] for at in drawn]
    first = next((token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None), None)
    return [*([] if first is None else [first]), *half, *half]


def _show(stats: AttentionStats, out: Path, second: slice) -> None:
    """Print the table of roles, and save it with its picture and the statistics."""
    clear(out)
    stats.save(out / STATS)
    written = [STATS]
    if not (lacking := missing(TABLES)):
        from llama_attn.analysis import classify_heads

        frame = classify_heads(stats, second)
        with complete_file(out / ROLES) as unfinished:
            frame.to_csv(unfinished, index=False)
        console.print(table_of_roles(frame))
        say(
            "heads that rest on another sink than the first token are among the mixed ones: sinks are those of all queries,"
        )
        say(
            "and these roles of the second half; llama_attn.analysis.classify_heads without query_slice tells them apart"
        )
        written.append(ROLES)
    if (how := how_to_draw()) is None:
        from llama_attn.viz import plot_head_roles

        with complete_file(out / ROLES_PICTURE) as unfinished:
            plot_head_roles(stats, query_slice=second).savefig(unfinished, format="png", dpi=120)
        written.append(ROLES_PICTURE)
    say(f"{', '.join(written)} are in {out}" if len(written) > 1 else f"{STATS} is in {out}")
    if how is not None:
        say(f"{how}" if not lacking else f"the table needs {', '.join(lacking)}, and {how}")


def table_of_roles(frame: pandas.DataFrame) -> Table:
    """How many heads have each role, and which have it most: layer, head and score.

    Args:
        frame: What `classify_heads` returns.
    """
    last = "strongest: layer.head score"
    table = new_table("role", "heads", last, fold=last)
    for role, count in frame.role.value_counts().items():
        strongest = frame[(frame.role == role) & frame.score.notna()].nlargest(STRONGEST, "score")
        lines = strongest[["layer", "head", "score"]].itertuples(index=False)
        named = [f"{layer}.{head} {number(score, 2)}" for layer, head, score in lines]
        table.add_row(str(role).replace("_", " "), str(count), ", ".join(named))
    return table
