"""What a model is given: chats, texts and files, and their tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from llama_attn import demo as demo_model
from llama_attn.cli.terminal import fail, first_line
from llama_attn.stats.segments import GENERATED, SPECIAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands between documents where the tokenizer has no token for it.
PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Texts:
    """What was asked to be read.

    Args:
        chat: Messages for the chat template.
        plain: Texts without one.
        names: A name for each of them.
        joined: Whether they are documents of one prompt, else rows of a batch.
    """

    chat: tuple[dict[str, str], ...] = ()
    plain: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    joined: bool = False


@dataclass(frozen=True)
class Prompt:
    """The tokens of every row.

    Args:
        rows: Token ids.
        names: A name for each row, where there are several.
        segments: Which document each token is of, (row, token), and their names.
    """

    rows: tuple[list[int], ...]
    names: tuple[str, ...] = ()
    segments: tuple[Tensor, tuple[str, ...]] | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))

    def with_own_segment(self) -> Prompt:
        """The same as one segment, so that what is generated behind it can be told apart; padded on the left."""
        labels = [[-1] * (self.length - len(row)) + [0] * len(row) for row in self.rows]
        return replace(self, segments=(torch.tensor(labels), ("prompt",)))


def read_texts(
    system: str | None,
    user: str | None,
    messages: Path | None,
    prompt: str | None,
    files: Sequence[Path],
    documents: bool,
    *,
    prompt_option: str = "--prompt",
) -> Texts:
    """What to measure, from the options of the command line. Nothing is loaded yet."""
    chat_given = system is not None or user is not None
    if sum([chat_given, messages is not None, prompt is not None, bool(files)]) > 1:
        fail("give one of --system/--user, --messages, --prompt or --file")
    if documents and len(files) < 2:
        fail(f"--documents: give --file for each of at least two, got {len(files)}")
    if messages is not None:
        return Texts(chat=_parse_messages(messages, _read(messages)))
    if files:
        return Texts(plain=tuple(map(_read, files)), names=_names(files), joined=documents)
    if prompt is not None:
        if not prompt.strip():
            fail(f"the text is empty: {prompt_option}")
        return Texts(plain=(prompt,), names=("prompt",))
    if user is not None and not user.strip():
        fail("the text is empty: --user")
    return Texts(chat=chat_of(system if chat_given else demo_model.SYSTEM, demo_model.USER if user is None else user))


def chat_of(system: str | None, user: str) -> tuple[dict[str, str], ...]:
    """The messages of a chat."""
    turns = [("system", system), ("user", user)]
    return tuple({"role": role, "content": content} for role, content in turns if content is not None)


def tokenize(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The tokens of what was read. Ends the command where there are none."""
    if texts.chat:
        rows: tuple[list[int], ...] = (_tokens_of_chat(texts.chat, tokenizer),)
    elif texts.joined:
        return _join(texts, tokenizer)
    else:
        rows = tuple(list(tokenizer(text)["input_ids"]) for text in texts.plain)
    for name, row in zip(texts.names or ("",), rows, strict=True):
        if not row:
            fail(f"the text has no tokens{f': {name}' if len(rows) > 1 else ''}")
    return Prompt(rows, texts.names if len(rows) > 1 else ())


def batch(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, side: str, vocabulary: int | None) -> dict[str, Tensor]:
    """The rows side by side, padded on one side, with a mask that hides the padding.

    Args:
        prompt: Their tokens.
        tokenizer: Knows which token is padding, if one is.
        side: left or right.
        vocabulary: How many tokens the model knows, if that is known; some tokenizers pad with one that it does not.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in candidates if token is not None and (vocabulary is None or token < vocabulary))
    inputs = torch.full((len(prompt.rows), prompt.length), padding)
    mask = torch.zeros_like(inputs)
    for line, row in enumerate(prompt.rows):
        start = prompt.length - len(row) if side == "left" else 0
        inputs[line, start : start + len(row)] = torch.tensor(row)
        mask[line, start : start + len(row)] = 1
    return {"input_ids": inputs, "attention_mask": mask}


def _join(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Documents one after another, between them the token that the tokenizer has for it, or an empty line."""
    special = tokenizer("")["input_ids"]
    opening = list(
        itertools.takewhile(lambda token: token in (tokenizer.bos_token_id, tokenizer.cls_token_id), special)
    )
    between = next((token for token in (tokenizer.sep_token_id, tokenizer.eos_token_id) if token is not None), None)
    separator = tokenizer(PARAGRAPH, add_special_tokens=False)["input_ids"] if between is None else [between]
    ids, labels = list(opening), [0] * len(opening)
    for number, (name, text) in enumerate(zip(texts.names, texts.plain, strict=True), 1):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            fail(f"the text has no tokens: {name}")
        if number > 1:
            ids, labels = ids + separator, labels + [0] * len(separator)
        ids, labels = ids + tokens, labels + [number] * len(tokens)
    closing = special[len(opening) :]
    return Prompt(
        rows=(ids + closing,),
        segments=(torch.tensor([labels + [0] * len(closing)]), (SPECIAL, *texts.names)),
    )


def _tokens_of_chat(chat: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template makes, with every word of the system and the user in it."""
    if not tokenizer.chat_template:
        fail("the tokenizer has no chat template; give plain text with --prompt or --file")
    reasons = []
    # Templates of models that also see take a list of parts, and leave out in silence what is a mere string.
    for in_parts in (False, True):
        turns: list[dict[str, Any]] = [dict(turn) for turn in chat]
        if in_parts:
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError) as error:
            reasons.append(f"refuses this chat: {first_line(error)}")
            continue
        lost = [turn["role"] for turn in chat if turn["role"] != "assistant" and turn["content"].strip() not in text]
        if not lost:
            return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
        reasons.append(f"leaves out what the {lost[0]} says")
    return fail(f"the chat template {reasons[0]}")


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {first_line(error)}")
    if not content.strip():
        fail(f"the text is empty: {path}")
    return content


def _parse_messages(path: Path, content: str) -> tuple[dict[str, str], ...]:
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
    return tuple(chat)


def _names(files: Sequence[Path]) -> tuple[str, ...]:
    """The names of the files; with a number where they repeat or name another segment."""
    names: list[str] = []
    for file in files:
        taken = [*names, SPECIAL, GENERATED]
        tries = itertools.chain([file.name], (f"{file.stem}-{number}{file.suffix}" for number in itertools.count(2)))
        names.append(next(name for name in tries if name not in taken))
    return tuple(names)
