"""Who wrote which character of a rendered chat.

A chat template is a program: it trims, folds, drops and repeats what it is given, and looks into it. So nothing is
searched for in its output, where a message may hold anything, the template's own words included. Instead the chat is
rendered once more with marks, characters that occur nowhere else, put into its strings. If the output without its
marks is that of the chat itself, the template was not disturbed, and every mark stands where its place in the string
went. Marks that disturb it (in trimmed spaces, or inside ``</think>`` where it looks for one) are found by halving.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import TemplateError

from llama_attn.stats.chat_strings import Change, Words, changed, leaves, structures, written

# The planes of Unicode for private use; transformers itself uses characters of the first plane.
# In structures they may be written as Python's or JSON's escapes.
_MARK = re.compile(
    "[\U000f0000-\U000ffffd\U00100000-\U0010fffd]"
    + r"|\\U00(?:0f|10)[0-9a-f]{4}|\\udb[89a-f][0-9a-f]\\ud[c-f][0-9a-f]{2}"
)

# No number of a call is as large.
_UNLIKELY = 7_301_486_900_000_000

# What a template may raise about strings that it does not expect.
_COMPLAINTS = (TemplateError, TypeError, ValueError, LookupError)

Span = tuple[int, int]
Place = tuple[Words, int]


class Chat:
    """A chat and the text that a template makes of it.

    Args:
        render: The template: from messages, tools and documents to text.
        messages: The messages.
        tools: JSON schemas of tools, or None.
        documents: Documents, or None.
        alike: Whether equal messages are marked alike.

    Attributes:
        text: What the template makes of them.
    """

    def __init__(
        self,
        render: Callable[[Sequence[Mapping[str, Any]], Any, Any], str],
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        documents: Any = None,
        *,
        alike: bool = True,
    ) -> None:
        self._render, self._given, self._alike = render, (messages, tools, documents), alike
        self.text = render(messages, tools, documents)
        seen: dict[Words, None] = {}
        changed(messages, tools, documents, lambda words: seen.setdefault(words) or words.text, alike=alike)
        self._words = tuple(words for words in seen if words.text)
        strings = (self.text, *(words.text for words in self._words))
        taken = {_character(found[0]) for string in strings for found in _MARK.finditer(string)}
        self._marks = [mark for mark in _all_marks() if mark not in taken] if taken else _all_marks()

    def labels(self) -> list[str | None]:
        """The label of every character of `text`; None for what the template wrote.

        Raises:
            ValueError: A message cannot be marked anywhere, so closely does the template look at it.
        """
        labels: list[str | None] = [None] * len(self.text)
        strings = [words for words in self._words if words.kind != "number"]
        places = [(words, place) for words in strings for place in (0, len(words.text))]
        ends = self._survey(places)
        for words in strings:
            for begin, end in self._spans(words, ends):
                labels[begin:end] = [words.label] * (end - begin)
        for label, values in structures(*self._given).items():
            self._label_whole(labels, label, values)
        self._label_numbers(labels)
        messages = list(map(repr, self._given[0]))
        if self._alike and len(ends) < len(places) and len(set(messages)) < len(messages):
            # Of equal messages the template may trim one and not the other.
            try:
                apart = Chat(self._render, *self._given, alike=False).labels()
            except ValueError:
                # It compares them, and what differs between them cannot be told.
                return labels
            labels = [ours or other for ours, other in zip(labels, apart, strict=True)]
        return labels

    def _rendered(self, change: Change) -> str:
        return self._render(*changed(*self._given, change, alike=self._alike))

    def _marked(self, places: Sequence[Place]) -> dict[Place, list[int]] | None:
        """Where in `text` each of the places went, which may be nowhere; None if marks there disturb the template."""
        if len(places) > len(self._marks):
            return None
        marks = dict(zip(places, self._marks, strict=False))
        by_words: dict[Words, list[int]] = {}
        for words, place in places:
            by_words.setdefault(words, []).append(place)

        def change(words: Words) -> str:
            cuts = sorted(by_words.get(words, ()))
            pieces = [words.text[a:b] for a, b in itertools.pairwise([0, *cuts, len(words.text)])]
            return pieces[0] + "".join(marks[words, cut] + piece for cut, piece in zip(cuts, pieces[1:], strict=True))

        try:
            marked = self._rendered(change)
        except _COMPLAINTS:
            return None
        place_of = {mark: place for place, mark in marks.items()}
        offsets: dict[Place, list[int]] = {place: [] for place in places}
        unmarked, at = [], 0
        length = 0
        for found in _MARK.finditer(marked):
            mark = place_of.get(_character(found[0]))
            if mark is not None:
                unmarked.append(marked[at : found.start()])
                length += found.start() - at
                offsets[mark].append(length)
                at = found.end()
        return offsets if "".join([*unmarked, marked[at:]]) == self.text else None

    def _survey(self, places: Sequence[Place]) -> dict[Place, list[int]]:
        """Where each of the places went; those where a mark disturbs the template are left out."""
        offsets = self._marked(places) if places else {}
        if offsets is not None:
            return offsets
        if len(places) == 1:
            return {}
        middle = len(places) // 2
        return self._survey(places[:middle]) | self._survey(places[middle:])

    def _spans(self, words: Words, ends: dict[Place, list[int]]) -> list[Span]:
        """Where a string stands in `text`, given where its ends went."""
        text = words.text
        begun, ended = ends.get((words, 0)), ends.get((words, len(text)))
        spans = self._between(text, begun, ended)
        dropped = begun == [] == ended and words.kind == "part"
        if spans is not None or dropped or not text.strip():
            return spans or []
        # Trimmed: a mark disturbs in all spaces that are cut off, and behind the last of them no longer.
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        begin = 0 if begun is not None else self._edge(words, range(first + 1))
        end = len(text) if ended is not None else self._edge(words, range(len(text), last - 1, -1))
        if begin is not None and end is not None:
            inner = self._survey([(words, begin), (words, end)])
            spans = self._between(text[begin:end], inner.get((words, begin)), inner.get((words, end)))
        if spans is None:
            spans = self._pieces(words, first if begin is None else begin, last if end is None else end)
        return spans

    def _edge(self, words: Words, places: range) -> int | None:
        """The first of the places where a mark does not disturb, given that none behind it does."""
        index = bisect.bisect_left(places, True, key=lambda place: bool(self._survey([(words, place)])))
        return places[index] if index < len(places) else None

    def _between(self, piece: str, begun: list[int] | None, ended: list[int] | None) -> list[Span] | None:
        """The piece in every place where it begins, or None unless it stands there whole, to its end."""
        if not begun or not ended or len(begun) != len(ended):
            return None
        for form in written(piece):
            spans = [(begin, begin + len(form)) for begin in begun]
            if [end for _, end in spans] == ended and all(self.text[a:b] == form for a, b in spans):
                return spans
        return None

    def _pieces(self, words: Words, first: int, last: int) -> list[Span]:
        """Where the characters ``first`` to ``last`` of a string stand, of which the template drops or changes some."""
        text, places = words.text, range(first, last + 1)
        if exchanged := self._exchanged(words, first, last):
            return exchanged
        found = self._survey([(words, place) for place in places])
        kept = [place for place in places if found.get((words, place))]
        if not kept and len(found) < len(places) and words.kind == "said":
            raise ValueError(
                f"messages[{words.speaker}]: the chat template looks so closely at {text[:40]!r} that it cannot be told "
                "where it goes"
            )
        # Where it stands whole it counts as a whole, with what cannot be marked because the template looks for it.
        whole = text[first:last]
        starts = [at - kept[0] + first for at in found[words, kept[0]]] if kept else []
        stands = all(start >= 0 and self.text.startswith(whole, start) for start in starts)
        aligned = all([at - place + first for at in found[words, place]] == starts for place in kept)
        if starts and stands and aligned:
            return [(start, start + len(whole)) for start in starts]
        spans = []
        for begin, end in itertools.pairwise(kept):
            ends = set(found[words, end])
            for at in found[words, begin]:
                lengths = [len(form) for form in written(text[begin:end]) if self.text.startswith(form, at)]
                spans += [(at, at + length) for length in lengths if at + length in ends][:1]
        return spans

    def _exchanged(self, words: Words, first: int, last: int) -> list[Span]:
        """Where the characters ``first`` to ``last`` of a string stand, by exchanging all for others.

        For templates that count characters, as those that cut a content short; nothing if they look at them.
        """
        places = [place for place in range(first, last) if not words.text[place].isspace()]
        if len(places) > len(self._marks):
            return []
        marks = dict(zip(places, self._marks, strict=False))
        new = "".join(marks.get(place, letter) for place, letter in enumerate(words.text))
        try:
            exchanged = self._rendered(lambda these: new if these == words else these.text)
        except _COMPLAINTS:
            return []
        place_of = {mark: place for place, mark in marks.items()}
        if len(exchanged) != len(self.text):
            return []
        spans: list[Span] = []
        before = -1
        for at, (letter, ours) in enumerate(zip(exchanged, self.text, strict=True)):
            place = place_of.get(letter)
            if (letter if place is None else words.text[place]).casefold() != ours.casefold():
                return []
            if place is not None:
                begin = spans[-1][1] if spans else 0
                joined = spans and self.text[begin:at] == words.text[before + 1 : place]
                spans[-1:] = [(spans[-1][0], at + 1)] if joined else [*spans[-1:], (at, at + 1)]
                before = place
        return spans

    def _label_whole(self, labels: list[str | None], label: str, values: list[Any]) -> None:
        """Label what is written of structures as a whole, braces and numbers included: JSON or Python's notation.

        It must hold strings that were found to be of ``values``, and nothing besides.
        """

        def fill(begin: int, end: int) -> bool:
            ours = set(labels[begin:end]) - {None} == {label}
            if ours:
                labels[begin:end] = [label] * (end - begin)
            return ours

        known = set(leaves(values, keys=True))
        done = 0
        for bracket in re.finditer(r"[\[{]", self.text):
            begin = bracket.start()
            if begin >= done and labels[begin] in (None, label):
                try:
                    value, end = json.JSONDecoder().raw_decode(self.text, begin)
                except (ValueError, RecursionError):
                    continue
                if known.issuperset(leaves(value, keys=False)) and fill(begin, end):
                    done = end
        for notation in dict.fromkeys(map(repr, values)):
            for found in re.finditer(re.escape(notation), self.text):
                fill(*found.span())

    def _label_numbers(self, labels: list[str | None]) -> None:
        """Label the numbers of calls that the template writes outside JSON, by exchanging them for unlikely ones."""
        numbers = [words for words in self._words if words.kind == "number"]
        for _, group in itertools.groupby(numbers, key=lambda words: words.speaker):
            unlikely = {words: _UNLIKELY + i for i, words in enumerate(group)}
            by_digits = {str(number): words for words, number in unlikely.items()}
            try:
                exchanged = self._rendered(lambda words: unlikely.get(words, words.text))  # noqa: B023
            except _COMPLAINTS:
                continue
            at, spans = 0, []
            for piece in re.split(f"({'|'.join(by_digits)})", exchanged):
                words = by_digits.get(piece)
                # Python's True and JSON's true
                forms = [piece] if words is None else [words.text, words.text.capitalize()]
                form = next((form for form in forms if self.text.startswith(form, at)), None)
                if form is None:
                    break
                spans += [] if words is None else [(at, at + len(form), words.label)]
                at += len(form)
            else:
                for begin, end, label in spans if at == len(self.text) else ():
                    if set(labels[begin:end]) == {None}:
                        labels[begin:end] = [label] * (end - begin)


@cache
def _all_marks() -> tuple[str, ...]:
    return tuple(chr(code) for plane in (0xF0000, 0x100000) for code in range(plane, plane + 0xFFFE))


def _character(mark: str) -> str:
    """The character that stands behind an escape."""
    if mark.startswith("\\U"):
        return chr(int(mark[2:], 16))
    return str(json.loads(f'"{mark}"')) if len(mark) > 1 else mark
