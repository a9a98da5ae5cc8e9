"""Messages read from ids alone, for chats whose messages are not at hand.

What a template writes around messages is learned from chats of single characters. Messages are taken to hold no special
tokens, so that special tokens stand at their borders, and are rendered again: they must make exactly the ids, and no
others may. What cannot be told apart so is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError

from llama_attn.stats.token_ids import Row

# Before the first message, and behind the last without and with a prompt for generation; else a role follows a role.
_START, _END, _PROMPT = "start", "end", "prompt"
_ENDS = (_END, _PROMPT)

_CONVERSATIONS = [
    [*system, *turns]
    for system in (["system"], [])
    for turns in (
        ["user"],
        ["user", "assistant", "user"],
        ["user", "assistant", "user", "assistant"],
        ["user", "assistant", "tool"],
        ["user", "assistant", "tool", "assistant"],
    )
]

# Contents that stand for any: nothing that is trimmed or looked for.
_CONTENTS = [chr(0xF0000 + i) for i in range(max(map(len, _CONVERSATIONS)))]

# More ways to read a row are not tried.
_MOST_READINGS = 64

# Texts and who follows them, by who comes before.
Borders = dict[str, dict[tuple[str, str], None]]
Messages = list[dict[str, str]]


def render_ids(tokenizer: Any, messages: Any, options: dict[str, Any]) -> list[int]:
    """The ids of a chat, without padding."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def read_chat(tokenizer: Any, row: Row, options: dict[str, Any]) -> tuple[Row, Messages, bool]:
    """The messages that one row of ids is made of.

    Args:
        tokenizer: The tokenizer that made the ids.
        row: The ids.
        options: What else ``apply_chat_template`` got.

    Returns:
        The row with its padding found, its messages, and whether a prompt for generation follows them.

    Raises:
        ValueError: No messages make these ids, or several different ones do.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ordered = sorted(special.union(tokenizer.all_special_tokens), key=len, reverse=True)
    specials = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
    borders = _borders(tokenizer, options)
    pad = tokenizer.pad_token_id
    # The token that pads may also begin or end a chat.
    chats = ([-1], [-1, pad], [pad, -1], [pad, -1, pad])
    real = [row.real] if row.real else [row.without_padding(pad, chat) for chat in chats]
    made: dict[tuple[tuple[str, str], ...], tuple[Row, Messages, bool]] = {}
    for place in dict.fromkeys(real):
        ids = row.ids[place.start : place.stop]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for tried, (messages, prompt) in enumerate(_readings(text, borders, specials)):
            if tried == _MOST_READINGS:
                made.clear()
                break
            try:
                same = render_ids(tokenizer, messages, options | {"add_generation_prompt": prompt}) == ids
            except TemplateError:
                continue
            if same:
                # A system prompt that the template adds counts as given, and what says nothing makes no difference.
                said = tuple((m["role"], m["content"]) for m in messages if m["role"] != "system" and m["content"])
                made.setdefault(said, (Row(row.ids, place), messages, prompt))
    if len(made) != 1:
        raise ValueError(
            "input_ids: from ids alone no messages can be read, or not for certain, of which the chat template makes "
            "exactly these; give them too: chat_segments(tokenizer, messages, input_ids=…)"
        )
    return next(iter(made.values()))


def _borders(tokenizer: Any, options: dict[str, Any]) -> Borders:
    """What a template writes behind each role (and before the first): which role follows which text."""
    borders: Borders = {}
    for roles in _CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in zip(roles, _CONTENTS, strict=False)]
        for end in _ENDS:
            given = options | {"add_generation_prompt": end == _PROMPT, "tokenize": False}
            given.pop("sanitize_control_tokens", None)
            try:
                text = tokenizer.apply_chat_template(messages, **given)
            except (TemplateError, TypeError, LookupError):
                # Not every template takes every order of roles.
                continue
            pieces = re.split("|".join(_CONTENTS), text)
            if re.findall("|".join(_CONTENTS), text) == _CONTENTS[: len(roles)]:
                for role, following, piece in zip([_START, *roles], [*roles, end], pieces, strict=True):
                    borders.setdefault(role, {})[piece, following] = None
    return borders


def _readings(text: str, borders: Borders, specials: re.Pattern[str]) -> Iterator[tuple[Messages, bool]]:
    """All messages that the text may be made of, and whether a prompt follows; given system prompts come first."""
    plain = [
        border
        for role, following in borders.items()
        for border, role_after in following
        if role != _START and not specials.search(border) and (border or role_after not in _ENDS)
    ]
    # Where a border is ordinary text, what holds it may be two.
    begun: list[tuple[int, str, Messages]] = [
        (len(head), role, [])
        for head, role in reversed(borders.get(_START, {}))
        if text.startswith(head) and not any(border in head for border in plain)
    ]
    while begun:
        at, role, messages = begun.pop()
        if role in _ENDS:
            if not any(border in message["content"] for message, border in itertools.product(messages, plain)):
                yield messages, role == _PROMPT
            continue
        found = specials.search(text, at)
        stop = found.start() if found else len(text)
        for border, following in borders.get(role, ()):
            special = specials.search(border)
            if special is None and (border or found):
                continue
            # A content reaches to the next special token, but for what the border has in front of that.
            end = stop - (special.start() if special else 0)
            behind = end + len(border)
            whole = behind == len(text) or following not in _ENDS
            if end >= at and text.startswith(border, end) and whole:
                begun.append((behind, following, [*messages, {"role": role, "content": text[at:end]}]))
