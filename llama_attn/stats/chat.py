"""The spans of a chat, from the tokenizer's own chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_attn.stats.chat_ids import read_chat, render_ids
from llama_attn.stats.chat_text import Chat
from llama_attn.stats.segments import SPECIAL
from llama_attn.stats.token_ids import Row, read_rows, token_spans, token_strings

# Arguments of ``apply_chat_template`` that change the ids or their form; who uses them gives the ids.
_FORM = {
    "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
    "tokenizer_kwargs", "truncation",
}  # fmt: skip


def chat_segments(
    tokenizer: Any,
    messages: Any = None,
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    input_ids: Any = None,
    **template_kwargs: Any,
) -> tuple[Tensor, tuple[str, ...]]:
    """The spans of a chat: which tokens are the system's, the user's, the assistant's, or the template's.

    The chat is rendered by the tokenizer's template, with and without marks in its messages, so that nothing depends
    on what the messages say. A message's tokens are those of its content. A token that holds characters of a message
    and of the template is the message's; one that holds characters of two messages is of the one with more of them.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The chat as ``tokenizer.apply_chat_template`` takes it, or a list of chats. Ids alone are taken
            too, if plain messages render to exactly these ids. Messages are then assumed to hold no special tokens
            written out, and a system prompt that the template adds by itself counts as given.
        tools: As given to ``apply_chat_template``.
        documents: As given to ``apply_chat_template``.
        add_generation_prompt: As given to ``apply_chat_template``; read from the ids if they are all there is.
        input_ids: What ``apply_chat_template`` returned, (batch, key) or (key), padded on either side or not; or
            other ids that spell the same text. Without them the chat is tokenized here.
        **template_kwargs: As given to ``apply_chat_template``: ``enable_thinking`` and the like.

    Returns:
        Segment of every token, (batch, key), −1 for padding, and the names. ``special`` is what the template writes,
        such as headers with names, a default system prompt, the prompt for generation. The others stand in order of
        appearance: roles; ``tool_call`` for what ``tool_calls`` hold; ``tools`` and ``documents``.
        ``AttentionStatsConfig(segments=chat_segments(…))`` takes both.

    Raises:
        ValueError: The ids are not what the template makes of the messages, or no messages can be read from ids alone.
    """
    if form := sorted(_FORM & template_kwargs.keys()):
        raise ValueError(f"{form[0]}: not taken, it changes the ids; give those that came of it as input_ids=…")
    options = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    options |= template_kwargs
    rows: Sequence[Row | None]
    chats: Sequence[Any]
    if messages is None or _is_ids(messages):
        if (messages is None) == (input_ids is None):
            got = "nothing" if messages is None else "ids, and input_ids besides"
            raise ValueError(f"messages: expected a chat, got {got}")
        rows = read_rows(messages if input_ids is None else input_ids)
        rows, chats, prompts = zip(*(read_chat(tokenizer, row, options) for row in rows), strict=True)
        settings = [options | {"add_generation_prompt": prompt} for prompt in prompts]
    else:
        chats = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        settings = [options] * len(chats)
        rows = [None] * len(chats) if input_ids is None else read_rows(input_ids)
        if len(rows) != len(chats):
            raise ValueError(f"input_ids: expected one row for each of {len(chats)} chats, got {len(rows)}")
    labels = [
        _labels(tokenizer, chat, setting, row, number)
        for number, (chat, setting, row) in enumerate(zip(chats, settings, rows, strict=True))
    ]
    names = tuple(dict.fromkeys([SPECIAL, *(name for row in labels for name in row if name is not None)]))
    index = {name: i for i, name in enumerate(names)} | {None: -1}
    length = max(map(len, labels))
    segments = torch.full((len(labels), length), -1)
    for row, known in zip(segments, labels, strict=True):
        first = length - len(known) if tokenizer.padding_side == "left" else 0
        row[first : first + len(known)] = torch.tensor([index[name] for name in known])
    return segments, names


def _is_ids(value: Any) -> bool:
    """Whether this is what a tokenizer returns, and not a chat."""
    if isinstance(value, Mapping):
        return "input_ids" in value
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return not isinstance(value, Mapping | list | tuple) and not hasattr(value, "messages")


def _labels(tokenizer: Any, messages: Any, options: dict[str, Any], row: Row | None, number: int) -> list[str | None]:
    """The label of every token of one row of ids, or of the ids that the template gives; None for padding."""
    messages = getattr(messages, "messages", messages)
    rendered = render_ids(tokenizer, messages, options)
    row = Row(rendered, range(len(rendered))) if row is None else row
    real = row.real or row.without_padding(tokenizer.pad_token_id, rendered)
    ids = row.ids[real.start : real.stop]
    # What control tokens in messages become is decided when the text is tokenized.
    chat = _chat(
        tokenizer, messages, {name: value for name, value in options.items() if name != "sanitize_control_tokens"}
    )
    spans = token_spans(tokenizer, chat.text, ids)
    if spans is None and ids == rendered:
        raise ValueError("tokenizer: its tokens do not spell the text, and it knows no offsets; expected a fast one")
    if spans is None:
        raise ValueError(f"input_ids: {_difference(tokenizer, ids, rendered, number)}")
    written = chat.labels()
    if SPECIAL in written:
        raise ValueError(f"messages: the role {SPECIAL!r} is the name of what the template writes")
    labels: list[str | None] = [None] * len(row.ids)
    for at, (begin, end) in zip(real, spans, strict=True):
        said = Counter(label for label in written[begin:end] if label is not None)
        labels[at] = said.most_common(1)[0][0] if said else SPECIAL
    return labels


def _chat(tokenizer: Any, messages: Any, options: dict[str, Any]) -> Chat:
    tools, documents = options.pop("tools"), options.pop("documents")

    def render(messages: Any, tools: Any, documents: Any) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, documents=documents, tokenize=False, **options)

    if any(callable(tool) for tool in tools or ()):
        # The schemas that the tokenizer makes of functions, which it does not tell otherwise.
        as_json = options | {"chat_template": "{{ tools | tojson }}", "continue_final_message": False}
        tools = json.loads(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **as_json))
    return Chat(render, messages, tools, documents)


def _difference(tokenizer: Any, ids: list[int], rendered: list[int], number: int) -> str:
    """Where a row of ids leaves what the template renders, in words."""
    same = next(
        (i for i, (a, b) in enumerate(zip(ids, rendered, strict=False)) if a != b), min(len(ids), len(rendered))
    )
    got, expected = (
        repr(token_strings(tokenizer, tokens[same : same + 1])[0]) if same < len(tokens) else "the end"
        for tokens in (ids, rendered)
    )
    return (
        f"row {number} is not what the chat template makes of these messages: token {same} is {got}, expected "
        f"{expected}; tools, add_generation_prompt and all other arguments must be those that made the ids"
    )
