"""The commands that measure and draw a model: ``llama-attn demo`` and ``run``."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from jinja2 import TemplateError
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llama_attn import demo as demo_model
from llama_attn.backends.registry import get_backend
from llama_attn.cli.terminal import check_pictures, console, fail, first_line
from llama_attn.demo import Checkpoint
from llama_attn.modeling_llama import LlamaForCausalLM
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.table import default_statistics
from llama_attn.stats.token_text import readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SEED_LAYERS = range(10)
MOST_LAYERS = 9999
# What the report shows besides the default statistics.
OF_REPORT = (
    "weights_map", "topk_weight", "topk_position", "distance_histogram", "previous_token", "duplicate_token", "induction",
)  # fmt: skip

Out = Annotated[Path, typer.Option(help="Folder for the pictures, report.html and stats.safetensors.")]
Attn = Annotated[str, typer.Option(help="Attention backend, see `llama-attn backends`.")]
Layers = Annotated[str, typer.Option(help="Layers to draw and measure: 0-9, 3,5,7 or all.")]
Kind = Annotated[str, typer.Option(help="What the attention map shows: weights or logits.")]


def demo(out: Out = Path("llama_attn_demo")) -> None:
    """See the attention sinks of a real small Llama, SmolLM2-135M-Instruct."""
    check_pictures()
    try:
        checkpoint = demo_model.demo_checkpoint()
    except ImportError as error:
        fail(str(error))
    chat = [{"role": "system", "content": demo_model.SYSTEM}, {"role": "user", "content": demo_model.USER}]
    config = _stats_config(None, "weights", None)
    try:
        tokenizer, model = _load(checkpoint, "streaming", "float32", "cpu")
    except OSError as error:
        fail(f"the demo model is not here ({first_line(error)}): {demo_model.how_to_get_it()}")
    inputs = _chat_inputs(tokenizer, chat)
    _measure_and_show(model, tokenizer, inputs, config, out, list(SEED_LAYERS), "weights")


def run(
    model: Annotated[str, typer.Argument(help="A local folder or an id on the Hugging Face hub.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    user: Annotated[str | None, typer.Option(help="User message.")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON file with a list of {role, content}.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Plain text, no chat template.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with plain text, no chat template.")] = None,
    attn: Attn = "streaming",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[
        str, typer.Option(help="auto spreads the model over what is there; else cpu, cuda, cuda:1 …")
    ] = "auto",
    layers: Layers = "0-9",
    statistics: Annotated[
        str | None, typer.Option(help="Names with commas, or all; added to those of the pictures and the report.")
    ] = None,
    kind: Kind = "weights",
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file in the folder.")] = None,
    out: Out = Path("llama_attn_run"),
) -> None:
    """Measure and draw any Llama. Without a text, the chat of the demo."""
    check_pictures()
    if kind not in ("weights", "logits"):
        fail(f"--kind: expected weights or logits, got {kind!r}")
    if dtype not in DTYPES:
        fail(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        get_backend(attn)
        place = torch.device("cpu" if device == "auto" else device)
        if place.type == "meta" or (place.type == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device: {device} is not there; try auto or cpu")
    except (ValueError, ImportError, RuntimeError) as error:
        fail(first_line(error))
    text = _read_text(system, user, messages, prompt, file)
    wanted_layers = _parse_layers(layers)
    config = _stats_config(statistics, kind, wanted_layers)
    checkpoint = Checkpoint(model, gguf_file)
    try:
        count = AutoConfig.from_pretrained(model, gguf_file=gguf_file).num_hidden_layers
        if wanted_layers is not None and not any(layer < count for layer in wanted_layers):
            fail(f"--layers: {layers} names none of the model's layers 0 to {count - 1}")
        if wanted_layers is not None:
            wanted_layers = [layer for layer in wanted_layers if layer < count]
            config = _stats_config(statistics, kind, wanted_layers)
        tokenizer, loaded = _load(checkpoint, attn, dtype, device)
    except (OSError, ValueError, ImportError) as error:
        fail(f"cannot load {model}: {first_line(error)}")
    inputs = tokenizer(text, return_tensors="pt") if isinstance(text, str) else _chat_inputs(tokenizer, text)
    if inputs["input_ids"].shape[1] == 0:
        fail("the text has no tokens")
    _measure_and_show(loaded, tokenizer, inputs, config, out, wanted_layers or list(range(count)), kind)


def _read_text(
    system: str | None, user: str | None, messages: Path | None, prompt: str | None, file: Path | None
) -> str | list[dict[str, str]]:
    """The text to measure: plain, or a chat. Nothing is loaded yet."""
    chat_given = system is not None or user is not None
    if sum([chat_given, messages is not None, prompt is not None, file is not None]) > 1:
        fail("give one of --system/--user, --messages, --prompt or --file")
    path = messages or file
    content = prompt
    if path is not None:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read {path}: {first_line(error)}")
    if messages is not None:
        return _parse_messages(messages, content or "")
    if content is not None:
        if not content.strip():
            fail(f"the text is empty: {path or '--prompt'}")
        return content
    if user is not None and not user.strip():
        fail("the text is empty: --user")
    system = demo_model.SYSTEM if not chat_given else system
    turns = [("system", system), ("user", demo_model.USER if user is None else user)]
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _parse_messages(path: Path, content: str) -> list[dict[str, str]]:
    try:
        chat = json.loads(content)
    except ValueError as error:
        fail(f"{path} is not JSON: {first_line(error)}")
    valid = isinstance(chat, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in chat
    )
    if not valid or not chat:
        fail(f'{path}: expected a list like [{{"role": "user", "content": "…"}}]')
    return chat


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


def _stats_config(statistics: str | None, kind: str, layers: list[int] | None) -> AttentionStatsConfig:
    """What the pictures, the report and the table need, and what was asked for besides."""
    needed = [*default_statistics(), f"{kind}_map", *OF_REPORT]
    asked: tuple[str, ...] | str
    if "segment_mass" in (statistics or ""):
        fail("--statistics: segment_mass needs segments, which only the Python interface takes")
    if statistics == "all":
        asked = "all"
    else:
        asked = tuple(dict.fromkeys(needed + [name.strip() for name in (statistics or "").split(",") if name.strip()]))
    try:
        return AttentionStatsConfig(statistics=asked, norms=True, layers=None if layers is None else tuple(layers))
    except ValueError as error:
        fail(f"--statistics: {error}")


def _load(
    checkpoint: Checkpoint, attn: str, dtype: str, device: str
) -> tuple[PreTrainedTokenizerBase, LlamaForCausalLM]:
    transformers_logging.set_verbosity_error()
    placed: dict[str, Any] = {}
    if device == "auto" and importlib.util.find_spec("accelerate") is not None:
        placed["device_map"] = "auto"
    # transformers draws the progress bar of loading itself.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file)
    model = LlamaForCausalLM.from_pretrained(
        checkpoint.name,
        gguf_file=checkpoint.gguf_file,
        dtype=DTYPES[dtype],
        attn_implementation=attn,
        **placed,
    ).eval()
    if not placed:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(best if device == "auto" else device)
    return tokenizer, model


def _chat_inputs(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> Any:
    if not tokenizer.chat_template:
        fail("the tokenizer has no chat template; give plain text with --prompt or --file")
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except TemplateError as error:
        fail(f"the chat template refuses this chat: {first_line(error)}")


def _measure_and_show(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    config: AttentionStatsConfig,
    out: Path,
    layers: list[int],
    kind: str,
) -> None:
    from llama_attn.viz import report, save_seed_figures

    length, context = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length > context:
        warnings.warn(f"the text has {length} tokens, more than the model's context of {context}", stacklevel=2)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out: cannot make the folder {out}: {first_line(error)}")
    inputs = {
        name: tensor.to(model.device) for name, tensor in inputs.items() if name in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        outputs = model(**inputs, use_cache=False, logits_to_keep=1, output_attention_stats=config)
    stats = outputs.attention_stats.with_tokens(tokenizer, inputs["input_ids"])
    stats.save(out / "stats.safetensors")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("drawing", total=3 * len(layers))
        save_seed_figures(stats, out, layers, kind=kind, on_saved=lambda path: progress.advance(task))  # type: ignore[arg-type]
    report(stats, out / "report.html")
    console.print(_table(stats))
    console.print(
        f"{3 * len(layers)} pictures, report.html and stats.safetensors are in {out}", highlight=False, markup=False
    )


def _table(stats: AttentionStats) -> Table:
    from llama_attn.analysis import summarize_layers

    tokens = stats.tokens[0] if stats.tokens is not None else []
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("layer", "sink mass", "strongest, receives", "largest activation, × median"):
        table.add_column(heading, no_wrap=True)
    for layer, line in summarize_layers(stats).iterrows():
        sink, peak = int(line.sink_position), int(line.activation_position)
        table.add_row(
            str(layer),
            f"{line.sink_mass:.0%}",
            f"{sink} {escape(readable(tokens[sink]))}, {line.received:.0%}",
            f"{line.activation:,.0f}, {line.activation_over_median:,.0f} ×, {peak} {escape(readable(tokens[peak]))}",
        )
    return table
