"""Texts that show what a head does: those with its highest scores, and the same random few for all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Float, Int

# Tokens that are shown of a text, around the one of the highest value.
AROUND = 24
# Random texts, of which each decile of a head's scores takes its own.
SAMPLED = 128
NO_TOKEN = -1
# Probabilities that differ by less are equal.
ROUNDING = 1e-5
Places = int | Int[np.ndarray, "..."]


@dataclass(frozen=True, eq=False)
class Text:
    """One text of a corpus, as it is read.

    Args:
        file: Name of the file, relative to what was given.
        line: Line, or row of a table, from 1.
        digest: Hash of its characters, by which random texts are chosen: the same ones in any order.
        ids: Its tokens, as far as they are read.
    """

    file: str
    line: int
    digest: int
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Strongest:
    """The texts with the highest scores of each head, the highest first; empty places have a score of −∞.

    Scores that are equal to five digits are ordered by digest, file and line, so that no order of reading matters.

    Args:
        score: The mean of the statistic over the text.
        digest: Which text.
        file: Place of its file in ``files`` of the summary.
        line: Its line.
        position: Where the statistic is highest in it, of the tokens that see more than one key [token].
        start: First of the tokens that are shown, around there [token].
        ids: These tokens, −1 behind the end of the text.
        values: The statistic of these.
    """

    score: Float[np.ndarray, "statistic layer head rank"]
    digest: Int[np.ndarray, "statistic layer head rank"]
    file: Int[np.ndarray, "statistic layer head rank"]
    line: Int[np.ndarray, "statistic layer head rank"]
    position: Int[np.ndarray, "statistic layer head rank"]
    start: Int[np.ndarray, "statistic layer head rank"]
    ids: Int[np.ndarray, "statistic layer head rank around"]
    values: Float[np.ndarray, "statistic layer head rank around"]

    def merged(self, other: Strongest, count: int) -> Strongest:
        """The strongest of both, ``count`` of each head; their files must be numbered alike."""
        both = {
            field.name: np.concatenate([getattr(self, field.name), getattr(other, field.name)], 3)
            for field in fields(self)
        }
        # The same text may come twice, and its score may differ by rounding.
        keys = (both["line"], both["file"], both["digest"], -(both["score"] / ROUNDING).round())
        order = np.lexsort(keys, axis=-1)[..., :count]
        return Strongest(
            **{
                name: np.take_along_axis(array, order if array.ndim == 4 else order[..., None], 3)
                for name, array in both.items()
            }
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """Random texts with the scores of every head: those with the smallest digests.

    Two corpora that hold the same texts sample the same of them, so that they can be compared text by text.

    Args:
        digest: Which text, ascending.
        file: Place of its file in ``files`` of the summary.
        line: Its line.
        ids: Its tokens, −1 behind its end.
        means: Mean of every statistic of heads over each text.
        position: Where each statistic with examples is highest, as in `Strongest` [token].
        values: The statistic of the tokens around there.
    """

    digest: Int[np.ndarray, " text"]
    file: Int[np.ndarray, " text"]
    line: Int[np.ndarray, " text"]
    ids: Int[np.ndarray, "text token"]
    means: Float[np.ndarray, "text mean layer head"]
    position: Int[np.ndarray, "text statistic layer head"]
    values: Float[np.ndarray, "text statistic layer head around"]

    def merged(self, other: Sample) -> Sample:
        """The sample of both; their files must be numbered alike."""
        longest = max(self.ids.shape[1], other.ids.shape[1])
        both = {
            field.name: np.concatenate([getattr(part.padded(longest), field.name) for part in (self, other)])
            for field in fields(self)
        }
        order = np.lexsort((both["line"], both["file"], both["digest"]))[:SAMPLED]
        return Sample(**{name: array[order] for name, array in both.items()})

    def padded(self, length: int) -> Sample:
        """With room for longer texts."""
        more = length - self.ids.shape[1]
        return replace(self, ids=np.pad(self.ids, ((0, 0), (0, more)), constant_values=NO_TOKEN)) if more else self

    def window(
        self, text: Places, statistic: Places, layer: Places, head: Places
    ) -> tuple[Int[np.ndarray, ...], Int[np.ndarray, "... around"]]:
        """The tokens that ``values`` are of: the first of them, and their ids; by places on the axes."""
        text = np.asarray(text)
        return _cut(self.ids, text, self.position[text, statistic, layer, head])


def _cut(
    ids: Int[np.ndarray, "text token"], text: Int[np.ndarray, ...], position: Int[np.ndarray, ...]
) -> tuple[Int[np.ndarray, ...], Int[np.ndarray, "... around"]]:
    """The tokens that are shown of each text around a position: the first of them, and their ids, −1 behind the end."""
    length = (ids != NO_TOKEN).sum(1)[text]
    start = np.clip(position - AROUND // 2, 0, np.maximum(length - AROUND, 0)).astype(np.int32)
    shown = start[..., None] + np.arange(AROUND)
    inside = shown < length[..., None]
    return start, np.where(inside, ids[text[..., None], np.where(inside, shown, 0)], NO_TOKEN)


def examples_of(
    values: Float[np.ndarray, "statistic layer text head query"],
    choosing: Bool[np.ndarray, "layer text query"],
    scores: Float[np.ndarray, "text mean layer head"],
    of: Sequence[int],
    texts: Sequence[Text],
    files: Sequence[str],
    count: int,
) -> tuple[Strongest, Sample]:
    """What a batch of texts gives.

    Args:
        values: Statistics with examples, of every query; NaN behind the end of a text.
        choosing: Queries that see more than one key: one that does not attends to it whatever it is.
        scores: Means over each text of all statistics of heads.
        of: Which of ``scores`` are those of ``values``.
        texts: The texts, from the first token of each row on.
        files: Names of all files, of which the texts are.
        count: How many strongest texts of each head are kept.
    """
    ids = np.full((len(texts), max(len(text.ids) for text in texts)), NO_TOKEN, np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text.ids)] = text.ids
    # (text, statistic, layer, head, query), as both keep them.
    by_text = values.transpose(2, 0, 1, 3, 4)
    known = np.where(np.isnan(by_text) | ~choosing.transpose(1, 0, 2)[:, None, :, None], -np.inf, by_text)
    # The first of those that are equal but for rounding.
    position = (known >= known.max(-1, keepdims=True) - ROUNDING).argmax(-1).astype(np.int32)
    start, tokens = _cut(ids, np.arange(len(texts))[:, None, None, None], position)
    inside = tokens != NO_TOKEN
    around = np.take_along_axis(by_text, np.where(inside, start[..., None] + np.arange(AROUND), 0), -1)
    around = np.where(inside, around, np.nan).astype(np.float16)
    digest = np.array([text.digest for text in texts], np.int64)
    place = {name: number for number, name in enumerate(files)}
    file = np.array([place[text.file] for text in texts], np.int32)
    line = np.array([text.line for text in texts], np.int64)

    def of_heads(array: np.ndarray) -> np.ndarray:
        """(text, statistic, layer, head, …) with the texts behind the heads."""
        return np.moveaxis(array, 0, 3)

    def for_each(array: np.ndarray) -> np.ndarray:
        """(text), for all statistics and heads."""
        return of_heads(np.broadcast_to(array[:, None, None, None], position.shape))

    everyone = Strongest(
        score=of_heads(np.nan_to_num(scores[:, list(of)], nan=-np.inf).astype(np.float64)),
        digest=for_each(digest),
        file=for_each(file),
        line=for_each(line),
        position=of_heads(position),
        start=of_heads(start),
        ids=of_heads(tokens),
        values=of_heads(around),
    )
    nobody = Strongest(**{field.name: getattr(everyone, field.name)[:, :, :, :0] for field in fields(everyone)})
    sample = Sample(digest, file, line, ids, scores.astype(np.float32), position, around)
    nothing = Sample(**{field.name: getattr(sample, field.name)[:0] for field in fields(sample)})
    return nobody.merged(everyone, count), nothing.merged(sample)
