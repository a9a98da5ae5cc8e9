"""The strings of a chat, and a chat with its strings changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TOOLS, TOOL_CALL, DOCUMENTS = "tools", "tool_call", "documents"

# What a speaker says; all other entries of a message (name, tool_call_id …) are headers.
_SPOKEN = ("content", "reasoning_content", "reasoning", "thinking", "tool_plan")

# Entries that templates compare or measure, and that no one says.
_FIXED = ("type", "id")


@dataclass(frozen=True)
class Words:
    """One string of a chat.

    Args:
        speaker: Number of the message it stands in, or of the first that is equal to it; −1 for tools and documents.
        label: What the string is part of: a role, ``tool_call``, ``tools`` or ``documents``.
        text: The string, or the JSON of a number.
        kind: Whether it is said, or part of a structure, or a number in one.
    """

    speaker: int
    label: str
    text: str
    kind: Literal["said", "part", "number"]


Change = Callable[[Words], str | int]


def changed(
    messages: Sequence[Mapping[str, Any]], tools: Any, documents: Any, change: Change, *, alike: bool
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Messages, tools and documents after a ``change`` of their strings, and of the numbers in calls.

    Templates may compare messages, so equal ones should be changed ``alike``, as one speaker.
    """
    first: dict[str, int] = {}
    new = []
    for number, message in enumerate(messages):
        speaker = first.setdefault(repr(message), number) if alike else number
        role = str(message.get("role"))
        said = {key: _said(message[key], change, speaker, role) for key in _SPOKEN if key in message}
        if "tool_calls" in message:
            said["tool_calls"] = _mapped(message["tool_calls"], change, speaker, TOOL_CALL)
        new.append({**message, **said})
    return new, _mapped(tools, change, -1, TOOLS), _mapped(documents, change, -1, DOCUMENTS)


def structures(messages: Sequence[Mapping[str, Any]], tools: Any, documents: Any) -> dict[str, list[Any]]:
    """The mappings and lists that a template may write as a whole, by label, outer ones before those in them."""
    found: dict[str, list[Any]] = {TOOLS: [tools], DOCUMENTS: [documents], TOOL_CALL: []}
    for message in messages:
        found[TOOL_CALL].append(message.get("tool_calls"))
        found.setdefault(str(message.get("role")), []).extend(map(message.get, _SPOKEN))
    nested = {label: [inner for value in values for inner in _nested(value)] for label, values in found.items()}
    return {label: values for label, values in nested.items() if values}


def _said(content: Any, change: Change, speaker: int, label: str) -> Any:
    """What a message says, changed: a string, parts with texts among them, or what a tool returned."""
    if isinstance(content, str):
        return change(Words(speaker, label, content, "said"))
    if isinstance(content, list | tuple):
        return [_said(part, change, speaker, label) for part in content]
    if isinstance(content, Mapping) and isinstance(content.get("text"), str) and "type" in content:
        return {**content, "text": _said(content["text"], change, speaker, label)}
    return _mapped(content, change, speaker, label, open_ended=isinstance(content, Mapping) and "type" not in content)


def _mapped(value: Any, change: Change, speaker: int, label: str, *, open_ended: bool = False) -> Any:
    """A structure with its strings changed; in open-ended ones, as arguments are, also names and numbers."""
    if isinstance(value, str):
        return change(Words(speaker, label, value, "part"))
    if isinstance(value, Mapping):
        entries = {}
        for name, entry in value.items():
            if open_ended or name not in _FIXED or not isinstance(entry, str):
                entry = _mapped(entry, change, speaker, label, open_ended=open_ended or name == "arguments")
            entries[_mapped(name, change, speaker, label) if open_ended else name] = entry
        return entries
    if isinstance(value, list | tuple):
        return [_mapped(entry, change, speaker, label, open_ended=open_ended) for entry in value]
    if open_ended and isinstance(value, int | float):
        digits = json.dumps(value)
        new = change(Words(speaker, label, digits, "number"))
        return value if new == digits else new
    return value


def written(piece: str) -> tuple[str, ...]:
    """The ways in which a template may write a string: as it is, or within a structure."""
    return piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1], repr(piece)[1:-1]


def leaves(value: Any, *, keys: bool) -> Iterator[str | float]:
    """Strings and numbers in a JSON value, with the names of entries or without; strings of JSON are looked into."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if keys:
                yield name
            yield from leaves(entry, keys=keys)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from leaves(entry, keys=keys)
    elif isinstance(value, str):
        yield value
        if keys and value.lstrip().startswith(("{", "[")):
            try:
                yield from leaves(json.loads(value), keys=keys)
            except (ValueError, RecursionError):
                return
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _nested(value: Any) -> Iterator[Any]:
    """The mappings and lists in a value, outer ones first, without empty ones."""
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if entries:
        yield value
    for entry in entries:
        yield from _nested(entry)
