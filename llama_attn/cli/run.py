"""The commands that measure and draw a model: ``llama-attn demo`` and ``run``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from llama_attn import demo as demo_model
from llama_attn.backends.registry import get_backend
from llama_attn.cli.loading import DTYPES, check_adapter, load_model, load_tokenizer, plan
from llama_attn.cli.measuring import Subject
from llama_attn.cli.showing import folder, show, table_of_documents
from llama_attn.cli.terminal import check_pictures, console, fail, first_line
from llama_attn.cli.texts import Texts, chat_of, read_texts, tokenize
from llama_attn.demo import Checkpoint
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.segments import Segments
from llama_attn.stats.table import default_statistics, statistics_table

SEED_LAYERS = range(10)
MOST_LAYERS = 9999
# What the report shows besides the default statistics.
OF_REPORT = (
    "weights_map", "topk_weight", "topk_position", "distance_histogram", "previous_token", "duplicate_token", "induction",
)  # fmt: skip

# Those of them that need to know which token each is.
OF_IDS = tuple(name for name in OF_REPORT if statistics_table()[name].needs == "tokens")

Out = Annotated[Path, typer.Option(help="Folder for the pictures, report.html and stats.safetensors.")]


def demo(out: Out = Path("llama_attn_demo")) -> None:
    """See the attention sinks of a real small Llama, SmolLM2-135M-Instruct."""
    check_pictures()
    try:
        checkpoint = demo_model.demo_checkpoint()
    except ImportError as error:
        fail(str(error))
    texts = Texts(chat=chat_of(demo_model.SYSTEM, demo_model.USER))
    chosen = plan(checkpoint, None, advice=demo_model.how_to_get_it())
    tokenizer = load_tokenizer(chosen)
    prompt = tokenize(texts, tokenizer)
    with folder(out):
        subject = Subject.of(load_model(chosen, attn="streaming", dtype="float32", device="cpu"), generates=False)
        stats, _ = subject.measure(prompt, tokenizer, _stats_config(None, "weights", None), 0)
        show(stats, out, list(SEED_LAYERS), "weights")


def run(
    model: Annotated[str, typer.Argument(help="A local folder or an id on the Hugging Face hub.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    user: Annotated[str | None, typer.Option(help="User message.")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON file with a list of {role, content}.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Plain text, no chat template.")] = None,
    file: Annotated[
        list[Path] | None, typer.Option(help="File with plain text, no chat template; several are rows of a batch.")
    ] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="The files are documents of one prompt: how much attention gets each?")
    ] = False,
    generate: Annotated[
        int | None, typer.Option(help="Generate so many tokens, greedily, and measure these too.", metavar="N")
    ] = None,
    attn: Annotated[
        str,
        typer.Option(
            help="Attention backend, see `llama-attn backends`; auto: streaming for a Llama, else the model's."
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[
        str, typer.Option(help="auto spreads the model over what is there; else cpu, cuda, cuda:1 …")
    ] = "auto",
    layers: Annotated[str, typer.Option(help="Layers to draw and measure: 0-9, 3,5,7 or all.")] = "0-9",
    statistics: Annotated[
        str | None, typer.Option(help="Names with commas, or all; added to those of the pictures and the report.")
    ] = None,
    kind: Annotated[str, typer.Option(help="What the attention map shows: weights or logits.")] = "weights",
    adapter: Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter to put on the model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file in the folder.")] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code",
            help="For a model with code of its own: run that, or transformers' class in its place.",
            show_default=False,
        ),
    ] = None,
    out: Out = Path("llama_attn_run"),
) -> None:
    """Measure and draw any model that reads text. Without a text, the chat of the demo."""
    check_pictures()
    if kind not in ("weights", "logits"):
        fail(f"--kind: expected weights or logits, got {kind!r}")
    if dtype not in DTYPES:
        fail(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if generate is not None and generate < 1:
        fail(f"--generate: expected 1 or more, got {generate}")
    try:
        if attn != "auto":
            get_backend(attn)
        place = torch.device("cpu" if device == "auto" else device)
        if place.type == "meta" or (place.type == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device: {device} is not there; try auto or cpu")
    except (ValueError, ImportError, RuntimeError) as error:
        fail(first_line(error))
    if adapter is not None:
        check_adapter(adapter)
    texts = read_texts(system, user, messages, prompt, file or [], documents)
    wanted = _parse_layers(layers)
    if "segment_mass" in _names(statistics) and not documents:
        fail("--statistics: segment_mass needs segments; give several --file with --documents")
    _stats_config(statistics, kind, wanted)

    chosen = plan(Checkpoint(model, gguf_file), trust_remote_code)
    if generate is not None and not chosen.generates:
        fail(f"--generate: {model} is no model that generates text ({chosen.name})")
    if wanted is not None and chosen.num_layers is not None and not any(layer < chosen.num_layers for layer in wanted):
        fail(f"--layers: {layers} names none of the model's layers 0 to {chosen.num_layers - 1}")
    tokenizer = load_tokenizer(chosen)
    tokens = tokenize(texts, tokenizer)
    chosen.check_tokens(tokens.rows)
    with folder(out):
        loaded = load_model(chosen, attn=attn, dtype=dtype, device=device, adapter=adapter)
        subject = Subject.of(loaded, generates=generate is not None)
        there = subject.layers
        chosen_layers = None if there is None else _choose_layers(wanted, there, layers)
        config = _stats_config(statistics, kind, chosen_layers, tokens.segments, has_ids=not subject.adds_tokens)
        stats, ids = subject.measure(tokens, tokenizer, config, generate or 0)
        drawn = chosen_layers or _choose_layers(wanted, stats.layers, layers)
        stats = stats.select(layers=drawn)
        weights = next(loaded.parameters())
        about = f"{subject.name}: {stats.backend} attention, measured by {stats.engine}, {weights.dtype} on {weights.device}"
        if adapter is not None:
            about += f"; the adapter was made for {subject.made_for}"
        if subject.adds_tokens:
            about += f"; {' and '.join(OF_IDS)} are left out, since the tokens that it adds have no ids"
        show(stats, out, drawn, kind, tokens.names, about=about.replace("torch.", ""))
    if tokens.segments is not None:
        console.print(table_of_documents(stats, tokens.length))
    if generate is not None:
        for row in ids[:, 0 if chosen.config.is_encoder_decoder else tokens.length :].tolist():
            text = tokenizer.decode(row, skip_special_tokens=True)
            # A model may write what a terminal would obey.
            shown = "".join(character for character in text if character.isprintable() or character in "\n\t")
            console.print(f"generated: {shown}", highlight=False, markup=False)


def _parse_layers(layers: str) -> list[int] | None:
    """``0-9``, ``3,5,7`` or a mixture; None for all."""
    if layers == "all":
        return None
    chosen: list[int] = []
    for part in layers.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or not int(first) <= int(last) <= MOST_LAYERS:
            fail(f"--layers: expected something like 0-9, 3,5,7 or all, got {layers!r}")
        chosen.extend(range(int(first), int(last) + 1))
    return list(dict.fromkeys(chosen))


def _choose_layers(wanted: list[int] | None, there: Sequence[int], asked: str) -> list[int]:
    """Those of the layers with attention that are wanted. Ends the command if there is none."""
    chosen = [layer for layer in there if wanted is None or layer in wanted]
    if not chosen:
        fail(f"--layers: {asked} names no layer with attention; there are {', '.join(map(str, there))}")
    return chosen


def _stats_config(
    statistics: str | None,
    kind: str,
    layers: list[int] | None,
    segments: Segments | None = None,
    *,
    has_ids: bool = True,
) -> AttentionStatsConfig:
    """What the pictures, the report and the table need, and what was asked for besides."""
    needed = [*default_statistics(), f"{kind}_map", *OF_REPORT]
    if segments is not None:
        needed.append("segment_mass")
    if not has_ids:
        needed = [name for name in needed if name not in OF_IDS]
    asked = "all" if statistics == "all" else tuple(dict.fromkeys([*needed, *_names(statistics)]))
    try:
        return AttentionStatsConfig(
            statistics=asked, norms=True, layers=None if layers is None else tuple(layers), segments=segments
        )
    except ValueError as error:
        fail(f"--statistics: {error}")


def _names(statistics: str | None) -> list[str]:
    return [name.strip() for name in (statistics or "").split(",") if name.strip()]
