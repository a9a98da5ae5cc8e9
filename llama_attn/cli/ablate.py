"""``llama-attn ablate``: what a model loses without each of its heads, and without its sink."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from llama_attn.cli.folder import ABLATION, ABLATION_PICTURE, ABLATION_TABLE, clear, folder
from llama_attn.cli.loading import load_model, load_tokenizer, plan
from llama_attn.cli.losses import losses_of
from llama_attn.cli.measuring import Subject, refusals
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
    refuse,
)
from llama_attn.cli.progress import counting
from llama_attn.cli.terminal import TABLES, console, fail, how_to_draw, missing, new_table, number, say
from llama_attn.cli.texts import read_texts, tokenize
from llama_attn.demo import Checkpoint
from llama_attn.observe.interventions import ablate_heads, block_keys
from llama_attn.observe.recording import record
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.files import complete_file

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

    from llama_attn.stats.container import AttentionStats

Mode = Literal["zero", "mean"]
# Heads that are listed in the terminal.
MOST_LISTED = 20
EVERY = "all"


def ablate(
    model: Model,
    file: Annotated[
        list[Path], typer.Option(help="File with plain text, no chat template; several are read one by one.")
    ],
    heads: Annotated[
        str | None,
        typer.Option(
            help="all, or layer.head with commas: 3.1,4.0; 3.all for those of a layer.",
            show_default="all, or none with --sinks",
        ),
    ] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="Also hide the first token from all later ones.")] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            help="What stands in place of a head: zero, or the mean of what it gives in the text.", show_default="zero"
        ),
    ] = None,
    attn: Attn = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    adapter: Adapter = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = None,
    out: Out = Path("llama_attn_ablation"),
) -> None:
    """Tell what each head is worth: the loss of the next token with all heads, and without one after the other.

    Every head takes one forward over the text. With --sinks alone no head is tried.
    """
    check_loading(attn, dtype, device, adapter)
    if mode not in (None, "zero", "mean"):
        fail(f"--mode: expected zero or mean, got {mode!r}")
    asked = _read_heads(heads if heads is not None or sinks else EVERY)
    if asked == {}:
        refuse({"mode": mode}, "with --sinks alone no head is tried; name some with --heads")
    mode = mode or "zero"
    if asked != {} and (lacking := missing(TABLES)):
        fail(f"--heads: the table needs {', '.join(lacking)}: pip install 'llama_attn[analysis]'")
    texts = read_texts(None, None, None, None, file, False)
    chosen = plan(Checkpoint(model, gguf_file), trust_remote_code)
    if not chosen.generates or chosen.config.is_encoder_decoder:
        fail(
            f"{chosen.checkpoint.name} does not predict the next token of a text ({chosen.name}), so it has no such loss"
        )
    tokenizer = load_tokenizer(chosen)
    prompt = tokenize(texts, tokenizer)
    chosen.check_tokens(prompt.rows)
    if short := [name for name, row in zip(texts.names, prompt.rows, strict=True) if len(row) < 3]:
        fail(f"--file: expected texts of three tokens or more, got {short[0]}")
    with folder(out):
        loaded = load_model(chosen, attn=attn, dtype=dtype, device=device, adapter=adapter)
        subject = Subject.of(loaded, generates=True)
        if subject.adds_tokens:
            fail("--adapter: it puts tokens of its own before the text, which would be the first")
        rows = [torch.tensor([row], device=subject.device) for row in prompt.rows]
        with refusals(loaded), torch.no_grad():
            stats = _measured(loaded, rows[0])
            tried = _chosen(asked, stats)
            # Refused here, before anything is run without a head.
            for layer, head in tried:
                ablate_heads(loaded, {layer: [head]}, _mode(mode))
            loss, frame, hidden = losses(loaded, rows, tried, _mode(mode), sinks=sinks)
        num_tokens = sum(len(row) - 1 for row in prompt.rows)
        text = f"{', '.join(texts.names)}, {num_tokens:,} predicted tokens"
        about = {"model": chosen.checkpoint.title, "text": text, "mode": mode, "loss": loss}
        clear(out)
        written = _write(out, about, num_tokens, frame, hidden)
    if frame is not None:
        console.print(table_of_heads(frame))
    say(f"loss of {num_tokens:,} tokens with all heads: {loss:.4f} nat")
    if hidden is not None:
        say(f"with the first token hidden from all later ones: {hidden:.4f} nat ({hidden - loss:+.4f})")
    say(subject.about(stats))
    say(f"{', '.join(written)} {'are' if len(written) > 1 else 'is'} in {out}")
    if frame is not None and (how := how_to_draw()) is not None:
        say(how)


def losses(
    model: Any, rows: Sequence[Tensor], heads: Sequence[tuple[int, int]], mode: Mode = "zero", *, sinks: bool = False
) -> tuple[float, pandas.DataFrame | None, float | None]:
    """The loss of a model as it is, without each of some heads, and without the first token.

    Args:
        model: A causal language model.
        rows: Its texts, (1, token) each.
        heads: Layer and head of those that are taken out, one at a time.
        mode: What stands in their place, see `ablate_heads`.
        sinks: Whether the first token is hidden from all later ones, too.

    Returns:
        The mean cross-entropy of the predicted tokens of all rows [nat]; columns ``layer``, ``head``, ``loss`` [nat] and ``change``
        [nat], None without heads; the loss without the first token [nat], None if it was not asked for.
    """

    def loss() -> float:
        return float(torch.cat([losses_of(model, ids)[0].double() for ids in rows]).mean())

    whole = loss()
    hidden = None
    if sinks:
        with block_keys(model, 0, first_query=1):
            hidden = loss()
    if not heads:
        return whole, None, hidden
    import pandas

    lines = []
    with counting("heads", len(heads)) as advance:
        for layer, head in heads:
            with ablate_heads(model, {layer: [head]}, mode):
                without = loss()
            lines.append((layer, head, without, without - whole))
            advance()
    return whole, pandas.DataFrame(lines, columns=["layer", "head", "loss", "change"]), hidden


def table_of_heads(frame: pandas.DataFrame) -> Table:
    """The heads whose change is largest, whichever way, those that the model misses most first."""
    most = frame.loc[frame.change.abs().nlargest(MOST_LISTED).index].sort_values("change", ascending=False)
    title = f"{len(most)} of {len(frame)} heads, those that change most" if len(most) < len(frame) else ""
    table = new_table("layer.head", "loss [nat]", "change [nat]", fold="layer.head", title=title)
    for layer, head, loss, change in most[["layer", "head", "loss", "change"]].itertuples(index=False):
        table.add_row(f"{layer}.{head}", number(loss, 4), number(change, 4, "+"))
    return table


def _measured(model: Any, ids: Tensor) -> AttentionStats:
    """Which layers and heads there are, from a forward over a few tokens."""
    with record(model, AttentionStatsConfig(statistics="entropy")) as recording:
        model(ids[:, :3], use_cache=False)
    return recording.stats


def _read_heads(heads: str | None) -> dict[int, set[int] | None] | None:
    """Heads by layer, None in place of all; an empty mapping for no head at all. Ends the command for anything else."""
    if heads is None:
        return {}
    if heads.strip() == EVERY:
        return None
    read: dict[int, set[int] | None] = {}
    for part in heads.split(","):
        layer, dot, head = part.strip().partition(".")
        if not layer.isdecimal() or not dot or not (head.isdecimal() or head == EVERY):
            fail(f"--heads: expected all, or layer.head with commas such as 3.1,4.0 or 3.all, got {heads!r}")
        known = read.setdefault(int(layer), set())
        if head == EVERY or known is None:
            read[int(layer)] = None
        else:
            known.add(int(head))
    return read


def _chosen(asked: dict[int, set[int] | None] | None, stats: AttentionStats) -> list[tuple[int, int]]:
    """Layer and head of those that were asked for. Ends the command for those that are not there."""
    there, count = list(stats.layers), int(stats["entropy"].shape[2])
    every = set(range(count))
    if asked is None:
        asked = dict.fromkeys(there)
    if unknown := sorted(set(asked) - set(there)):
        fail(f"--heads: there is no attention in layer {unknown[0]}; there is in {', '.join(map(str, there))}")
    wanted = {layer: every if heads is None else heads for layer, heads in asked.items()}
    for layer, heads in wanted.items():
        if unknown := sorted(heads - every):
            fail(f"--heads: layer {layer} has no head {unknown[0]}; there are 0 to {count - 1}")
    return [(layer, head) for layer in sorted(wanted) for head in sorted(wanted[layer])]


def _mode(mode: str) -> Mode:
    return "mean" if mode == "mean" else "zero"


def _write(
    out: Path, about: dict[str, Any], num_tokens: int, frame: pandas.DataFrame | None, hidden: float | None
) -> list[str]:
    """Save all numbers, and a picture of the heads."""
    content = {**about, "tokens": num_tokens, "first_token_hidden": None, "heads": []}
    if hidden is not None:
        content["first_token_hidden"] = {"loss": hidden, "change": hidden - about["loss"]}
    written = [ABLATION]
    if frame is not None:
        frame.attrs |= about
        content["heads"] = frame.to_dict("records")
        with complete_file(out / ABLATION_TABLE) as unfinished:
            frame.to_csv(unfinished, index=False)
        written.append(ABLATION_TABLE)
        if how_to_draw() is None:
            from llama_attn.viz import plot_ablation

            with complete_file(out / ABLATION_PICTURE) as unfinished:
                plot_ablation(frame).savefig(unfinished, format="png", dpi=120)
            written.append(ABLATION_PICTURE)
    with complete_file(out / ABLATION) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return written
