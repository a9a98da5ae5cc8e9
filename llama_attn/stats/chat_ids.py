"""Messages read from ids alone, for chats whose messages are not at hand.

What a template writes around messages is learned from chats of single characters. A chat is read as messages only if
every border between them holds a special token, and only if the messages, rendered again, are exactly the ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError

from llama_attn.stats.token_ids import Row

# The beginning of a chat, and its end without and with a prompt for generation; other sides of a border are roles.
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


# Texts and who follows them, by who comes before.
Borders = dict[str, dict[tuple[str, str], None]]


def render_ids(tokenizer: Any, messages: Any, options: dict[str, Any]) -> list[int]:
    """The ids of a chat, without padding."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def read_chat(tokenizer: Any, row: Row, options: dict[str, Any]) -> tuple[Row, list[dict[str, str]], bool]:
    """The messages that one row of ids is made of.

    Args:
        tokenizer: The tokenizer that made the ids.
        row: The ids.
        options: What else ``apply_chat_template`` got.

    Returns:
        The row with its padding found, its messages, and whether a prompt for generation follows them.

    Raises:
        ValueError: No messages of which the template makes these ids were found.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ordered = sorted(special.union(tokenizer.all_special_tokens), key=len, reverse=True)
    specials = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
    borders = _borders(tokenizer, options)
    pad = tokenizer.pad_token_id
    # The token that pads may also begin or end a chat.
    chats = ([-1], [-1, pad], [pad, -1], [pad, -1, pad])
    real = [row.real] if row.real else [row.without_padding(pad, chat) for chat in chats]
    for place in dict.fromkeys(real):
        ids = row.ids[place.start : place.stop]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for messages, prompt in _readings(text, borders, specials):
            try:
                same = render_ids(tokenizer, messages, options | {"add_generation_prompt": prompt}) == ids
            except TemplateError:
                continue
            if same:
                return Row(row.ids, place), messages, prompt
    raise ValueError(
        "input_ids: from ids alone no messages can be read of which the chat template makes exactly these; "
        "give them too: chat_segments(tokenizer, messages, input_ids=…)"
    )


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


def _readings(text: str, borders: Borders, specials: re.Pattern[str]) -> Iterator[tuple[list[dict[str, str]], bool]]:
    """Messages that the text may be made of, and whether a prompt follows; with a system message first."""
    for head, role in borders.get(_START, ()):
        at, messages = len(head), []
        if not text.startswith(head):
            continue
        while role not in _ENDS:
            found = _next_border(text, at, borders.get(role, ()), specials)
            if found is None:
                break
            end, behind, following = found
            messages.append({"role": role, "content": text[at:end]})
            role, at = following, behind
        else:
            yield messages, role == _PROMPT


def _next_border(
    text: str, at: int, borders: Iterable[tuple[str, str]], specials: re.Pattern[str]
) -> tuple[int, int, str] | None:
    """Where the content that begins at ``at`` ends, where the next one begins, and whose that is.

    A content reaches to the next special token, but for what the border has in front of that.
    """
    found = specials.search(text, at)
    stop = found.start() if found else len(text)
    # The longest that is there; if it is the last, a prompt rather than a message without a content.
    for border, following in sorted(borders, key=lambda item: (-len(item[0]), item[1] not in _ENDS)):
        special = specials.search(border)
        if special is None and (border or found):
            continue
        begin = stop - (special.start() if special else 0)
        behind = begin + len(border)
        ends = following in _ENDS
        if begin >= at and text.startswith(border, begin) and (behind == len(text) or not ends):
            return begin, behind, following
    return None
