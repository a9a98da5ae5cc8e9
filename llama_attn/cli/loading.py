"""Load what was asked for, all of it, or nothing: models, their tokenizers and adapters.

transformers warns about weights that are missing or left over, and goes on with random ones or without them. Here
that is an error. The class is the one that the checkpoint names, as the AutoModel classes know it.
"""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig
from transformers.distributed import DistributedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from llama_attn import demo as demo_model
from llama_attn.cli.places import has_file, locate
from llama_attn.cli.terminal import fail, first_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llama_attn.demo import Checkpoint

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What reading a damaged folder raises.
DAMAGED = (
    OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, EOFError, RuntimeError,
    SafetensorError, StrictDataclassError, pickle.UnpicklingError,
)  # fmt: skip
# Models that see, and read as well without a picture.
SEEING = "AutoModelForImageTextToText"
# AutoModel classes that take text. The first that has the class that a checkpoint names is taken.
FAMILIES = (
    SEEING,
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForPreTraining",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForTextEncoding",
    "AutoModel",
)
# Heads that a checkpoint may have besides, by the names of their modules: no attention depends on them.
HEADS = (
    "classifier", "cls", "discriminator_predictions", "generator_lm_head", "generator_predictions", "lm_head", "pooler",
    "pre_classifier", "predictions", "qa_outputs", "score", "vocab_layer_norm", "vocab_projector", "vocab_transform",
)  # fmt: skip
SHOWN = 3


@dataclass(frozen=True)
class Plan:
    """A checkpoint, and what it will be loaded as. Only its configuration has been read.

    Args:
        checkpoint: Where it lies.
        config: Its configuration.
        family: Name of the AutoModel class.
        model_class: The class that comes of it; None for one that the checkpoint brings.
        trust: Whether code that the checkpoint brings is run.
    """

    checkpoint: Checkpoint
    config: PreTrainedConfig
    family: str
    model_class: type[PreTrainedModel] | None
    trust: bool

    @property
    def is_llama(self) -> bool:
        """Whether it becomes this library's own class."""
        return (
            type(self.config) is LlamaConfig and self.family == "AutoModelForCausalLM" and self.model_class is not None
        )

    @property
    def name(self) -> str:
        """The class, in words."""
        return "a class of its own" if self.model_class is None else self.model_class.__name__

    @property
    def generates(self) -> bool:
        """Whether it can generate text; what a class of its own can, only it knows."""
        return self.model_class is None or bool(self.model_class.can_generate())

    @property
    def num_layers(self) -> int | None:
        """Layers that text goes through, where the configuration says it of one stack alone."""
        return (
            None
            if self.config.is_encoder_decoder
            else getattr(self.config.get_text_config(), "num_hidden_layers", None)
        )

    def check_tokens(self, rows: Sequence[Sequence[int]]) -> None:
        """End the command for tokens that the model has no embedding for."""
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        largest = max(map(max, rows))
        if vocabulary is not None and largest >= vocabulary:
            fail(
                f"the tokenizer of {self.checkpoint.name} is not that of the model: it gives the token {largest}, and "
                f"the model knows {vocabulary}"
            )


def plan(checkpoint: Checkpoint, trust_remote_code: bool | None) -> Plan:
    """Decide what a checkpoint is loaded as. Ends the command if it cannot be.

    Args:
        checkpoint: A folder or an id on the hub.
        trust_remote_code: Whether to run code that it brings, or transformers' own class in its place; None if the
            user did not say, which is enough for checkpoints without.
    """
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        # In a log every step of a bar is a line.
        transformers_logging.disable_progress_bar()
    checkpoint = locate(checkpoint)
    name, gguf_file = checkpoint.name, checkpoint.gguf_file
    trust = bool(trust_remote_code)
    try:
        # A GGUF file brings no code, and reading one takes seconds.
        settings = {} if gguf_file else PreTrainedConfig.get_config_dict(name)[0]
        brings = dict(settings.get("auto_map") or {})
    except DAMAGED as error:
        fail(f"cannot load {name}: {first_line(error)}{_advice(checkpoint)}")
    if brings and trust_remote_code is None:
        fail(
            f"{name} brings code of its own ({', '.join(sorted(brings))}), which is not run unasked: "
            "--trust-remote-code runs it, --no-trust-remote-code takes transformers' own class"
        )
    try:
        config = AutoConfig.from_pretrained(name, gguf_file=gguf_file, trust_remote_code=trust)
    except DAMAGED as error:
        fail(f"cannot load {name}: {first_line(error)}{_advice(checkpoint)}")
    if trust and (own := [family for family in FAMILIES if family in brings]):
        named = [family for family in own if brings[family].endswith(f".{_architecture(config)}")]
        return Plan(checkpoint, config, (named or own)[0], None, trust)
    family, model_class = _choose(config)
    if family is None:
        fail(f"cannot load {name}: transformers has no class that reads text for the model_type {config.model_type!r}")
    return Plan(checkpoint, config, family, model_class, trust)


def _advice(checkpoint: Checkpoint) -> str:
    """The way out where a model was not found."""
    if checkpoint.name == demo_model.HUB_ID:
        return f"; {demo_model.how_to_get_it()}"
    if checkpoint.gguf_file is not None or Path(checkpoint.name).exists():
        return ""
    return f"; nor is there a folder {checkpoint.name} here; in a repository of GGUF files, name one with --gguf-file"


def load_tokenizer(chosen: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Ends the command if there is none."""
    name, gguf_file = chosen.checkpoint.name, chosen.checkpoint.gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file, trust_remote_code=chosen.trust)
    except DAMAGED as error:
        lacking = "" if gguf_file or has_file(name, "tokenizer.json") else ", which has no tokenizer.json"
        fail(f"cannot load the tokenizer of {name}{lacking}: {first_line(error)}")
    # Without files, transformers makes an empty one for some types, to which every word is unknown.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if gguf_file is None and tokenizer.vocab_files_names and not any(has_file(name, file) for file in files):
        fail(f"cannot load the tokenizer of {name}: there is none ({', '.join(sorted(files))})")
    return tokenizer


def load_model(
    chosen: Plan, *, attn: str, dtype: str, device: str, adapter: Path | None = None, split: int = 0
) -> nn.Module:
    """The model of a checkpoint, ready to measure. Ends the command if it is not complete.

    Args:
        chosen: What it is loaded as.
        attn: Attention backend; auto is streaming for a Llama, else what the model itself would take.
        dtype: One of `DTYPES`.
        device: Where to; auto spreads it over what is there.
        adapter: Folder of a PEFT adapter.
        split: Over how many processes the model is split by heads; 0 for a whole one, which ``device`` is for.
    """
    wanted: dict[str, Any] = {"attn_implementation": attn}
    if attn == "auto":
        wanted = {"attn_implementation": "streaming"} if chosen.is_llama else {}
    placed: dict[str, Any] = {}
    if split:
        placed = {"distributed_config": DistributedConfig(tp_size=split)}
    elif device == "auto" and importlib.util.find_spec("accelerate") is not None:
        placed = {"device_map": "auto"}
    try:
        # transformers draws the progress bar of loading itself.
        model, info = getattr(modeling_auto, chosen.family).from_pretrained(
            chosen.checkpoint.name,
            config=chosen.config,
            gguf_file=chosen.checkpoint.gguf_file,
            dtype=DTYPES[dtype],
            trust_remote_code=chosen.trust,
            output_loading_info=True,
            **wanted,
            **placed,
        )
    except DAMAGED as error:
        fail(f"cannot load {chosen.checkpoint.name}: {first_line(error)}")
    if (wrong := what_is_wrong(model, info)) is not None:
        fail(f"cannot load {chosen.checkpoint.name} as {type(model).__name__}: {wrong}")
    if chosen.checkpoint.hub_id is not None:
        model.config._name_or_path = chosen.checkpoint.title
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if not placed:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(best if device == "auto" else device)
    return model.eval()


def what_is_wrong(model: nn.Module, info: dict[str, Any]) -> str | None:
    """Which weights do not fit, in words; None if what is loaded is what is in the files.

    Weights of heads that the class does not have are left over without harm, and so is what the class declares
    ignorable, which transformers has taken out.

    Args:
        model: What was loaded.
        info: transformers' ``output_loading_info``.
    """
    modules = {name for name, _ in model.named_modules()}
    left_over = [key for key in info["unexpected_keys"] if not _is_of_a_head(key, model, modules)]
    mismatched = [str(key[0]) if isinstance(key, tuple) else str(key) for key in info["mismatched_keys"]]
    parts = [
        _count(info["missing_keys"], "missing and would be random"),
        _count(left_over, "in the files and not in the model"),
        _count(mismatched, "of another shape than the model's"),
    ]
    parts += [str(message).splitlines()[0] for message in info.get("error_msgs") or ()]
    return "; ".join(part for part in parts if part) or None


def _is_of_a_head(key: str, model: nn.Module, modules: Collection[str]) -> bool:
    parts = key.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.").split(".")
    return parts[0] in HEADS and key.rpartition(".")[0] not in modules


def _count(keys: Collection[str], what: str) -> str:
    if not keys:
        return ""
    names = sorted(keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s are' if len(names) > 1 else ' is'} {what}: {', '.join(names[:SHOWN])}{more}"


def _choose(config: PreTrainedConfig) -> tuple[str, type[PreTrainedModel]] | tuple[None, None]:
    """The AutoModel class that gives the class that the checkpoint names, else the one for models of its kind."""
    known = {family: classes for family in FAMILIES if (classes := _classes_of(family, config))}
    for family, classes in known.items():
        for model_class in classes:
            if model_class.__name__ == _architecture(config):
                return family, model_class
    order = [SEEING]
    if config.is_encoder_decoder:
        order += ["AutoModelForSeq2SeqLM"]
    elif "AutoModelForMaskedLM" in known and not config.is_decoder:
        order += ["AutoModel"]
    else:
        order += ["AutoModelForCausalLM", "AutoModelForTextEncoding"]
    for family in order:
        if family in known:
            return family, known[family][0]
    return None, None


def _classes_of(family: str, config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes of a family that read text of such a model."""
    mapping = getattr(modeling_auto, family)._model_mapping
    if type(config) not in mapping:
        return []
    found = mapping[type(config)]
    classes = found if isinstance(found, (list, tuple)) else [found]
    reads = [one for one in classes if one.main_input_name == "input_ids"]
    # The base of a model that sees takes nothing without a picture.
    is_base = family in ("AutoModel", "AutoModelForPreTraining")
    return [one for one in reads if not (is_base and "pixel_values" in inspect.signature(one.forward).parameters)]


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]


def check_adapter(adapter: Path) -> None:
    """End the command if an adapter cannot be one. Nothing is loaded."""
    if importlib.util.find_spec("peft") is None:
        fail("--adapter: adapters need peft: pip install peft")
    if not adapter.is_dir():
        fail(f"--adapter: there is no folder {adapter}")
    for files in (("adapter_config.json",), ("adapter_model.safetensors", "adapter_model.bin")):
        if not any((adapter / file).is_file() for file in files):
            fail(f"--adapter: there is no {' or '.join(files)} in {adapter}")


def _with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    """The model with an adapter around it, every weight of which has found its place."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            # Between PEFT and transformers, which nobody here can change.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(adapter))
            # The same once more, since only this says which weights the model has no place for.
            result = adapted.load_adapter(str(adapter), adapted.active_adapter)
    except DAMAGED as error:
        fail(f"cannot load the adapter {adapter}: {first_line(error)}")
    parts = [
        # PEFT counts what it keeps elsewhere: banks that layers share, and prompts.
        _count([key for key in result.missing_keys if "vector_bank" not in key], "missing and would be random"),
        _count(
            [key for key in result.unexpected_keys if key != "prompt_embeddings"], "in the file and not in the model"
        ),
    ]
    if wrong := "; ".join(part for part in parts if part):
        fail(f"cannot load the adapter {adapter}, which is for another model: {wrong}")
    return adapted
