"""Text that somebody else wrote, as a person reads it: in terminals, pictures, tables and notebooks.

Tokens, and names and units that come from a file, are data wherever they are shown: `printable` for terminals,
`drawn` for pictures, and behind either of them `html.escape` or rich's ``escape`` for pages and tables.
"""

from __future__ import annotations

from functools import cache

LONGEST = 14


def readable(token: str, longest: int = LONGEST) -> str:
    """A token as a person reads it: spaces and line breaks of the tokenizer's alphabet made visible, long ones cut.

    Args:
        token: As the tokenizer writes it.
        longest: More characters than this are cut.
    """
    token = _decoded(token)
    for character, sign in ((" ", "␣"), ("Ġ", "␣"), ("▁", "␣"), ("\n", "⏎"), ("Ċ", "⏎"), ("\t", "⇥"), ("ĉ", "⇥")):
        token = token.replace(character, sign)
    return drawn(token, longest)


def drawn(text: str, longest: int) -> str:
    """A text on one line: a dot for every character that cannot be printed, and a long one cut."""
    text = "".join(character if character.isprintable() else "·" for character in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def printable(text: str) -> str:
    r"""A text on one line in which nothing tells a terminal what to do: an escape character becomes ``\x1b``.

    Characters that turn the direction of writing, and halves of characters, are written out too.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@cache
def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: Ġ for a space, Ċ for a line break, Ã© for é."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _decoded(token: str) -> str:
    """The text that a byte-level token stands for; what is not one, or only part of a character, stays as it is."""
    alphabet = byte_alphabet()
    if not all(character in alphabet for character in token):
        return token
    try:
        return bytes(alphabet[character] for character in token).decode()
    except UnicodeDecodeError:
        return token
