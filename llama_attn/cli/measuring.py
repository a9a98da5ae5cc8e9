"""Run a model over a prompt and measure it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_attn.cli.progress import measuring
from llama_attn.cli.terminal import fail, first_line
from llama_attn.cli.texts import batch
from llama_attn.observe.options import known_options
from llama_attn.observe.recording import record
from llama_attn.observe.stacks import candidates, is_cross, stack_of
from llama_attn.stats.config import AttentionStatsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llama_attn.cli.texts import Prompt
    from llama_attn.observe.forward import Stack
    from llama_attn.stats.container import AttentionStats

# What a model that cannot do what is asked of it answers with.
REFUSALS = (
    ValueError, RuntimeError, IndexError, KeyError, AttributeError, ImportError, NotImplementedError, TypeError,
)  # fmt: skip
# A table of positions may have a few more lines than the context has tokens.
SPARE_POSITIONS = 8


@dataclass(frozen=True)
class Subject:
    """What of a model is measured.

    Args:
        model: The model.
        part: The module that is run, unless text is generated.
        generates: Whether text is generated.
    """

    model: Any
    part: Any
    generates: bool

    @classmethod
    def of(cls, model: nn.Module, *, generates: bool) -> Subject:
        """The whole model, if it makes text; the encoder of one that would need a text to decode; else the base.

        The head of an encoder costs memory that grows with the vocabulary, and no attention depends on it.
        """
        own = _without_adapter(model)
        part = model
        if not generates and own is model and isinstance(model, PreTrainedModel):
            if model.config.is_encoder_decoder:
                part = model.get_encoder()
            elif not model.can_generate():
                part = model.base_model
        return cls(model, part, generates)

    @property
    def name(self) -> str:
        """What it is called."""
        own = _without_adapter(self.model)
        name = type(own).__name__ if own is self.model else f"{type(own).__name__} with {_kind_of_adapter(self.model)}"
        whole = self.part in (self.model, getattr(self.model, "base_model", None))
        return name if whole else f"the encoder of {name}"

    @property
    def decodes(self) -> bool:
        """Whether what is generated follows the prompt in one row."""
        return self.generates and not _without_adapter(self.model).config.is_encoder_decoder

    @property
    def device(self) -> torch.device:
        """Where its first weights lie."""
        return next(self.model.parameters()).device

    def about(self, stats: AttentionStats) -> str:
        """What ran, for the terminal."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return f"{self.name}: {stats.backend} attention, measured by {stats.engine}, {dtype} on {self.device}"

    @property
    def made_for(self) -> str:
        """The model that an adapter says it is for."""
        return str(self.model.active_peft_config.base_model_name_or_path)

    @property
    def adds_tokens(self) -> bool:
        """Whether an adapter puts tokens of its own before the text: they have no ids."""
        adapter = getattr(self.model, "active_peft_config", None)
        return adapter is not None and bool(adapter.is_prompt_learning)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layers with attention, in the stacks that text goes through; None if that shows only when they run.

        So it is in models some of whose layers have no attention, or that use a layer several times. Ends the command
        if there is no attention to observe.
        """
        with refusals(self.model):
            record(self.part).check()
        layers = tuple(sorted({index for stack in self._stacks for index in stack.indices}))
        own = _without_adapter(self.model)
        return layers if len(layers) >= getattr(own.config.get_text_config(), "num_hidden_layers", 0) else None

    @property
    def _stacks(self) -> list[Stack]:
        """Stacks of self-attention that text goes through."""
        own = _without_adapter(self.model)
        part = self.part
        if part is self.model and isinstance(own, PreTrainedModel):
            part = own.get_decoder()
        return [stack_of(part, module) for name, module in candidates(part).items() if not is_cross(name)]

    def measure(
        self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, config: AttentionStatsConfig, new_tokens: int
    ) -> tuple[AttentionStats, Tensor]:
        """The statistics, with their tokens, and the ids that were read and written. Ends the command if it cannot be.

        Args:
            prompt: What to read.
            tokenizer: Its tokenizer.
            config: What to measure.
            new_tokens: How many tokens to generate; greedy.
        """
        own, decodes = _without_adapter(self.model), self.decodes
        with refusals(own):
            vocabulary = getattr(own.get_input_embeddings(), "num_embeddings", None)
        inputs = batch(prompt, tokenizer, "left" if decodes else "right", vocabulary)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        check_length(own, prompt.length + (new_tokens if decodes else 0))
        attention = [module for stack in self._stacks for module in stack.layers]
        there = self.layers
        # The last token that is generated is read by nobody; the decoder behind an encoder begins with one of its own.
        queries = prompt.length + new_tokens - 1 if decodes else new_tokens if self.generates else prompt.length
        bar = measuring(attention, None if there is None else len(there), queries)
        with refusals(own), torch.no_grad(), record(self.part, config) as recording, bar:
            ids = self._generate(inputs, new_tokens) if self.generates else self._forward(inputs)
        with refusals(own):
            return _with_tokens(recording.stats, tokenizer, ids), ids

    def _generate(self, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
        padding = inputs["input_ids"][inputs["attention_mask"] == 0]
        given: dict[str, Any] = {"pad_token_id": int(padding[0])} if len(padding) else {}
        return self.model.generate(**inputs, **given, max_new_tokens=new_tokens, do_sample=False, num_beams=1)

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        self.part(**inputs, **known_options(_without_adapter(self.part), use_cache=False, logits_to_keep=1))
        return inputs["input_ids"]


@contextmanager
def refusals(model: nn.Module) -> Iterator[None]:
    """End the command with what a model says that cannot be measured."""
    try:
        yield
    except typer.Exit:
        # A RuntimeError too, of a command that has said why it ends.
        raise
    except REFUSALS as error:
        fail(f"cannot measure {type(model).__name__}: {first_line(error)}")


def context_of(model: Any) -> int | None:
    """Tokens that a model is made for; None if its configuration does not say."""
    return getattr(_without_adapter(model).config.get_text_config(), "max_position_embeddings", None)


def check_length(model: Any, length: int) -> None:
    """Warn of a text beyond the context; end the command where the model has no positions for it."""
    context = context_of(model)
    if context is None or length <= context:
        return
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    if any(
        context <= table.num_embeddings < context + SPARE_POSITIONS
        for table in tables
        if table.num_embeddings != model.config.get_text_config().vocab_size
    ):
        fail(f"the text has {length} tokens, and the model positions for {context}")
    warnings.warn(f"the text has {length} tokens, more than the model's context of {context}", stacklevel=2)


def _with_tokens(stats: AttentionStats, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> AttentionStats:
    """Statistics that know their tokens; those of an adapter, which come first, have no name."""
    missing = stats.num_keys - ids.shape[1]
    if missing <= 0:
        return stats.with_tokens(tokenizer, ids)
    rows = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    return replace(stats, tokens=[["<adapter>"] * missing + row for row in rows])


def _without_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _kind_of_adapter(model: Any) -> str:
    return str(model.active_peft_config.peft_type.value)
