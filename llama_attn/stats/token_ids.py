"""Token ids as callers hand them over, and the text that they spell."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llama_attn.stats.token_text import byte_alphabet

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Span = tuple[int, int]


def read_ids(ids: Any, name: str = "input_ids") -> Int[Tensor, "batch key"]:
    """Token ids as a tensor.

    Args:
        ids: Whatever a tokenizer returns: ids (batch, key) or (key) as a tensor, an array or lists, or a mapping
            that holds them, as ``BatchEncoding`` is.
        name: What they are called in errors and in a mapping.

    Raises:
        ValueError: A mapping without them, rows of different lengths, or what is no integer.
    """
    if isinstance(ids, Mapping):
        if name not in ids:
            raise ValueError(f"{name}: expected ids or a mapping with {name!r}, got one with {list(ids)}")
        ids = ids[name]
    try:
        numbers = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected integers (batch, key), all rows of one length ({error})") from error
    numbers = numbers[None] if numbers.ndim == 1 else numbers
    if numbers.ndim != 2 or numbers.is_floating_point() or numbers.is_complex():
        raise ValueError(f"{name}: expected integers (batch, key), got {numbers.dtype} {tuple(numbers.shape)}")
    return numbers


@dataclass(frozen=True)
class Row:
    """One row of ids.

    Args:
        ids: The ids, padding included.
        real: Where those that are not padding stand, if an attention mask says so.
    """

    ids: list[int]
    real: range | None

    def without_padding(self, pad: int | None, chat: Sequence[int]) -> range:
        """Where the ids stand that are not padding.

        Args:
            pad: The id that pads.
            chat: What stands there, of which the first or last ids may be the padding's too.
        """
        (ahead, behind), (kept_ahead, kept_behind) = _runs(pad, self.ids), _runs(pad, chat)
        return range(max(ahead - kept_ahead, 0), len(self.ids) - max(behind - kept_behind, 0))


def read_rows(ids: Any) -> list[Row]:
    """The rows of what a tokenizer returns: ids, or a mapping that may hold an ``attention_mask`` with them.

    Raises:
        ValueError: As `read_ids`, or a mask of another shape.
    """
    rows = read_ids(ids)
    if not isinstance(ids, Mapping) or ids.get("attention_mask") is None:
        return [Row(row, None) for row in rows.tolist()]
    mask = read_ids(ids, "attention_mask")
    if mask.shape != rows.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(rows.shape)}, got {tuple(mask.shape)}")
    real = [row.nonzero()[:, 0].tolist() or [0, -1] for row in mask]
    return [Row(row, range(at[0], at[-1] + 1)) for row, at in zip(rows.tolist(), real, strict=True)]


def _runs(pad: int | None, ids: Sequence[int]) -> tuple[int, int]:
    """How many ids at the beginning and at the end are ``pad``."""
    ahead = next((i for i, token in enumerate(ids) if token != pad), len(ids))
    behind = next((i for i, token in enumerate(reversed(ids)) if token != pad), len(ids))
    return ahead, min(behind, len(ids) - ahead)


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The tokenizer's string of every id; ``<id:50000>`` where it has none, as models with a padded vocabulary do."""
    strings = {}
    for token in set(ids):
        try:
            (string,) = tokenizer.convert_ids_to_tokens([token])
        except (IndexError, OverflowError):
            string = None
        strings[token] = f"<id:{token}>" if string is None else string
    return [strings[token] for token in ids]


def token_spans(tokenizer: Any, text: str, ids: Sequence[int]) -> list[Span] | None:
    """First character of ``text`` that every token holds a part of, and the first one behind.

    The strings of the tokens are laid along the text, byte by byte, so that it does not matter how the text was cut
    into tokens. Where they do not spell it, as under a normalizer that composes accents, the tokenizer's own offsets
    are taken.

    Returns:
        One span per token, empty where a token holds nothing of the text; None if the ids do not make the text.
    """
    added = set(getattr(tokenizer, "added_tokens_decoder", ())) | set(getattr(tokenizer, "all_special_ids", ()))
    special = [token in added for token in ids]
    for spelling in _spellings(token_strings(tokenizer, ids), special):
        spans = _laid_along(text, spelling, special)
        if spans is not None:
            return spans
    return _offsets(tokenizer, text, ids) if getattr(tokenizer, "is_fast", False) else None


def _spellings(tokens: list[str], special: list[bool]) -> Iterator[list[bytes]]:
    """The bytes that every token stands for, by the two alphabets in use; special tokens are text in both."""
    alphabet = byte_alphabet()

    def byte_level(token: str) -> bytes:
        known = all(character in alphabet for character in token)
        return bytes(alphabet[character] for character in token) if known else token.encode()

    def sentence_piece(token: str) -> bytes:
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    for read in (byte_level, sentence_piece):
        yield [token.encode() if raw else read(token) for token, raw in zip(tokens, special, strict=True)]


def _laid_along(text: str, spelling: list[bytes], special: list[bool]) -> list[Span] | None:
    """Spans of characters, or None if the tokens do not spell the text.

    Two liberties: the first token, or one behind a special token, may begin with a space that the text does not have
    (SentencePiece puts it there); and spaces beside a special token that no token has (it may swallow them) go to the
    token before.
    """
    whole = text.encode(errors="surrogatepass")
    character = [i for i, letter in enumerate(text) for _ in letter.encode(errors="surrogatepass")] + [len(text)]
    spans: list[Span] = []
    at = 0
    # Behind the last token stands nothing.
    for piece, before, here in zip([*spelling, b""], [True, *special], [*special, False], strict=True):
        end = len(spans) == len(spelling)
        if not end and before and not whole.startswith(piece, at) and whole.startswith(piece.removeprefix(b" "), at):
            piece = piece.removeprefix(b" ")
        if spans and (before or here):
            skipped = at
            while whole[skipped : skipped + 1].isspace() and (end or not whole.startswith(piece, skipped)):
                skipped += 1
            spans[-1] = (spans[-1][0], character[skipped]) if skipped > at else spans[-1]
            at = skipped
        if end:
            break
        if not whole.startswith(piece, at):
            return None
        last = at + len(piece)
        # A token may hold a part of a character only; then it and its neighbour share that character.
        spans.append((character[at], character[last - 1] + 1 if piece else character[at]))
        at = last
    return spans if at == len(whole) else None


def _offsets(tokenizer: Any, text: str, ids: Sequence[int]) -> list[Span] | None:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoding["input_ids"]) != list(ids):
        return None
    spans = [tuple(span) for span in encoding["offset_mapping"]]
    # Offsets may leave out spaces, which belong to the token that follows.
    ends = itertools.accumulate((end for _, end in spans), max, initial=0)
    return [(min(begin, before), end) for (begin, end), before in zip(spans, ends, strict=False)]
