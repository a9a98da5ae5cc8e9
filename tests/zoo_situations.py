"""How the models of the zoo are run, and what is known of every token: its id, whether it is real, its sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from conftest import CACHE
from transformers import PreTrainedModel, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from zoo_base import Entry
from zoo_other import IMAGE_PLACE, IMAGE_TOKEN

BATCH, TOKENS, NEW = 2, 12, 5
# Past a full window of 5, one token and several at a time.
CHUNKS = {
    "cached": (8, 1, 1, 3, 1),
    "cached_left": (8, 1, 1, 3, 1),
    "cached_one": (8, 1, 1),
    "chunked": (4, 4, 3),
    "static": (8, 1, 1, 3),
}
PACKED = ((5, 7), (3, 9))


@dataclass(frozen=True)
class Axis:
    """What is known of the tokens of a sequence, at absolute positions.

    Args:
        ids: Their ids, (batch, token); None for what is not text.
        real: Whether they are tokens rather than padding, (batch, token).
        sequence: Number of the document they belong to, (batch, token).
    """

    ids: torch.Tensor | None
    real: torch.Tensor
    sequence: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None = None, sequence: torch.Tensor | None = None) -> Axis:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return cls(ids, real, torch.zeros_like(ids) if sequence is None else sequence)

    @classmethod
    def plain(cls, batch: int, length: int) -> Axis:
        return cls(None, torch.ones(batch, length, dtype=torch.bool), torch.zeros(batch, length, dtype=torch.long))

    def upto(self, length: int) -> Axis:
        ids = None if self.ids is None else self.ids[:, :length]
        return Axis(ids, self.real[:, :length], self.sequence[:, :length])


@dataclass
class Run:
    """A situation, ready to be run with one model.

    Args:
        forwards: Calls the model, a forward at a time (or ``generate`` once), and gives what came out.
        axes: What is known of each axis of the model: ``"ids"``, and ``"decoder"`` of a pair.
        one: Whether it is one forward, so that what came out can be compared with a forward.
    """

    forwards: Callable[[], Iterator[Any]]
    axes: dict[str, Axis]

    def play(self) -> list[Any]:
        with torch.no_grad():
            return list(self.forwards())


def draw(length: int, seed: int = 1) -> torch.Tensor:
    """Few different ids, so that there are repetitions."""
    return torch.randint(3, 30, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def padding(length: int, side: str | None, width: int = 4) -> torch.Tensor | None:
    if side is None:
        return None
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, slice(0, width) if side == "left" else slice(length - width + 1, length)] = 0
    return mask


def prepare(entry: Entry, model: PreTrainedModel, situation: str) -> Run:
    """The situation, for this model."""
    if entry.family in ("vision", "audio"):
        inputs = _cast(entry.inputs(BATCH), model)
        return Run(lambda: iter([model(**inputs)]), {})
    if entry.family == "pair":
        return _pair(entry, model, situation)
    return _text(entry, model, situation)


def _cast(inputs: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _text(entry: Entry, model: PreTrainedModel, situation: str) -> Run:
    length = sum(CHUNKS.get(situation, (TOKENS,)))
    ids = draw(length)
    side = next((side for side in ("left", "right") if situation.endswith(side)), None)
    mask = padding(length, side)
    extra: dict[str, Any] = {}
    if entry.family == "joint":
        if "language_model" in entry.stacks[0].path:
            ids[:, IMAGE_PLACE] = IMAGE_TOKEN
            is_image = ids == IMAGE_TOKEN
            extra |= {"token_type_ids": is_image.long()} if entry.name == "gemma3" else {}
            extra |= {"mm_token_type_ids": is_image.int()} if "qwen" in entry.name else {}
        extra |= _cast(entry.inputs(BATCH), model)
    given = {} if mask is None else {"attention_mask": mask}
    if situation == "packed":
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in PACKED])
        sequence = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in PACKED])
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        return Run(lambda: iter([model(**inputs)]), {"ids": Axis.of(ids, None, sequence)})
    if situation == "generated":
        mask = padding(length, "left")
        axes = {"ids": Axis.of(ids, mask)}

        def generate() -> Iterator[Any]:
            sequences = model.generate(input_ids=ids, attention_mask=mask, **extra, **GREEDY)
            # The last token was never fed.
            fed = sequences[:, :-1]
            axes["ids"] = Axis.of(fed, torch.nn.functional.pad(mask, (0, fed.shape[1] - length), value=1))
            yield sequences

        return Run(generate, axes)
    if situation not in CHUNKS:
        inputs = {"input_ids": ids, **given, **extra}
        return Run(lambda: iter([model(**inputs)]), {"ids": Axis.of(ids, mask)})

    def forwards() -> Iterator[Any]:
        cache = StaticCache(model.config, max_cache_len=16) if situation == "static" else None
        start = 0
        for size in CHUNKS[situation]:
            inputs = {"input_ids": ids[:, start : start + size], CACHE: cache, "use_cache": True}
            if mask is not None:
                inputs["attention_mask"] = mask[:, : start + size]
            for name, value in extra.items():
                if name.endswith("token_type_ids"):
                    inputs[name] = value[:, start : start + size]
                elif start == 0:
                    inputs[name] = value
            output = model(**inputs)
            cache, start = output.past_key_values, start + size
            yield output

    return Run(forwards, {"ids": Axis.of(ids, mask)})


GREEDY = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def _pair(entry: Entry, model: PreTrainedModel, situation: str) -> Run:
    ids, decoder = draw(10), draw(7, seed=3)
    mask = padding(10, "left", 3) if situation in ("left", "generated") and not entry.inputs else None
    decoder_mask = padding(7, "left", 2) if situation == "left" else None
    axes = {"ids": Axis.of(ids, mask), "decoder": Axis.of(decoder, decoder_mask)}
    source = _cast(entry.inputs(BATCH), model) if entry.inputs else {"input_ids": ids}
    if mask is not None:
        source["attention_mask"] = mask
    if situation == "generated":

        def generate() -> Iterator[Any]:
            # Some do not return all that they fed.
            fed: list[torch.Tensor] = []
            hook = model.register_forward_pre_hook(
                lambda module, args, kwargs: fed.append(kwargs["decoder_input_ids"]), with_kwargs=True
            )
            try:
                yield model.generate(**source, decoder_input_ids=decoder[:, :3], **GREEDY)
            finally:
                hook.remove()
            axes["decoder"] = Axis.of(torch.cat(fed, 1))

        return Run(generate, axes)
    if situation != "cached":
        given = {} if decoder_mask is None else {"decoder_attention_mask": decoder_mask}
        return Run(lambda: iter([model(**source, decoder_input_ids=decoder, **given)]), axes)

    def forwards() -> Iterator[Any]:
        inputs, cache, start = dict(source), None, 0
        for size in (5, 1, 1):
            inputs |= {"decoder_input_ids": decoder[:, start : start + size], CACHE: cache}
            output = model(**inputs, use_cache=True)
            cache, start = output.past_key_values, start + size
            inputs = {name: value for name, value in source.items() if name == "attention_mask"}
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
            yield output

    return Run(forwards, axes)
