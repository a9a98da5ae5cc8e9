"""The statistics of many texts: what a run over a corpus gives, in memory that does not grow with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from llama_attn.corpus import labelled, store
from llama_attn.corpus.bins import value_bins
from llama_attn.corpus.examples import NO_TOKEN, Sample, Strongest
from llama_attn.corpus.header import COUNTS, VERSION, check_arrays, read_header
from llama_attn.corpus.moments import Moments
from llama_attn.corpus.statistics import of_positions
from llama_attn.corpus.table import Table
from llama_attn.stats.hub import HubMixin
from llama_attn.stats.labels import Label
from llama_attn.stats.token_text import printable

if TYPE_CHECKING:
    import pandas
    import xarray
    from transformers import PreTrainedTokenizerBase

# Fields of `CorpusSummary` by how they are kept in a file.
ARRAYS = ("first_key", "roles", "weight_count", "weight_mass", "queries")
GROUPS = ("by_position", "by_text")
PARTS: dict[str, type[Any]] = {"sinks": Table, "massive": Table, "strongest": Strongest, "sample": Sample}


@dataclass(frozen=True)
class About:
    """What summaries must have in common to be merged.

    Args:
        model: Name or path of the model.
        weights: Hash of its weights; empty if nobody asked.
        config: What was measured of every text, `AttentionStatsConfig` in JSON.
        labels: Axes, unit, meaning and source of each statistic.
        layers: Indices of the measured layers.
        heads: Indices of the measured query heads.
        num_layers: Layers of the model.
        num_heads: Query heads of a layer.
        direction: Whether queries see keys before them, or on both sides.
        max_tokens: What longer texts are cut to.
        examples: Texts that are kept of each head and statistic.
        scores: Statistics of heads, the means of which over each text are sampled.
        examples_of: Those that have examples.
        roles: Roles that are counted, and "mixed".
    """

    model: str
    weights: str
    config: str
    labels: Mapping[str, Label]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    num_layers: int
    num_heads: int
    direction: str
    max_tokens: int
    examples: int
    scores: tuple[str, ...]
    examples_of: tuple[str, ...]
    roles: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CorpusSummary(HubMixin):
    """Statistics of a corpus, per head, and the texts that show them.

    Summaries of parts merge into that of the whole, in any order: counts, extremes and examples are equal, means and
    spreads to rounding in float64.

    Args:
        about: What was measured, of which model.
        texts: How many texts.
        tokens: Their tokens, as far as they were read.
        cut: How many were longer than what is read of a text.
        skipped: Records that could not be read.
        files: Names of the files of all examples, sorted.
        by_position: Of each statistic, the numbers of all queries or keys, (layer, head, position_bin); KV heads for
            norms of keys and values, no heads for hidden states.
        by_text: Its mean over each text, (layer, head).
        first_key: Texts whose first token is a sink of the head, and all those of which that is known,
            (layer, head, 2).
        roles: Texts in which the head has each role most, (role, layer, head).
        weight_count: Keys per query in each bin of weights, summed over queries, (layer, head, weight_bin); empty if
            not measured.
        weight_mass: What they hold, likewise.
        queries: Real queries of each layer.
        sinks: By token: heads and texts to which it is a sink as their first token, and further behind; how often it
            comes first, and further behind.
        massive: By hidden layer and channel: tokens with a massive activation there, and texts that have such.
        strongest: Texts with the highest scores of each head.
        sample: Random texts, for all heads the same.
        strings: What the tokens are called that are named anywhere above.

    Source: Gu et al., arXiv 2410.10781 (sinks); Sun et al., arXiv 2402.17762 (massive activations).
    """

    hub_filename: ClassVar[str] = "summary.safetensors"

    about: About
    texts: int
    tokens: int
    cut: int
    skipped: int
    files: tuple[str, ...]
    by_position: Mapping[str, Moments]
    by_text: Mapping[str, Moments]
    first_key: Int[np.ndarray, "layer head 2"]
    roles: Int[np.ndarray, "role layer head"]
    weight_count: Float[np.ndarray, "layer head weight_bin"]
    weight_mass: Float[np.ndarray, "layer head weight_bin"]
    queries: Int[np.ndarray, " layer"]
    sinks: Table
    massive: Table
    strongest: Strongest
    sample: Sample
    strings: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CorpusSummary:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, damaged, or was not written by `save`; of statistics of one run, what takes
                them.
        """
        header, arrays = store.read(path)
        try:
            return _unpacked(header, arrays)
        except ValueError as error:
            raise ValueError(store.damaged(path, error)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, with a checksum of all that is in it.

        The file appears under its name only once it is complete.

        Raises:
            FileNotFoundError: The folder does not exist.
        """
        store.write(path, *_packed(self))

    @classmethod
    def merge(cls, summaries: Iterable[CorpusSummary]) -> CorpusSummary:
        """The summary of all texts of some summaries; one at a time, so that they may come from files.

        Raises:
            ValueError: There is none, or they differ in what was measured, of which model; the message has both.
        """
        summaries = iter(summaries)
        first = next(summaries, None)
        if first is None:
            raise ValueError("summaries: expected one or more, got none")
        return reduce(CorpusSummary.merged, summaries, first)

    def merged(self, other: CorpusSummary) -> CorpusSummary:
        """The summary of the texts of both.

        Raises:
            ValueError: They differ in what was measured, of which model; the message has both.
        """
        check_same(self.about, other.about)
        for name, moments in self.by_text.items():
            # Of KV heads nothing else says how many there are.
            if moments.count.shape != (there := other.by_text[name].count.shape):
                raise ValueError(f"{name}: expected summaries of the same heads, got {moments.count.shape} and {there}")
        files = tuple(sorted({*self.files, *other.files}))
        one, two = (summary._numbered(files) for summary in (self, other))
        positions = max(_positions(one.by_position), _positions(two.by_position))
        return CorpusSummary(
            about=self.about,
            texts=one.texts + two.texts,
            tokens=one.tokens + two.tokens,
            cut=one.cut + two.cut,
            skipped=one.skipped + two.skipped,
            files=files,
            by_position={
                name: moments.padded(positions).merged(two.by_position[name].padded(positions))
                for name, moments in one.by_position.items()
            },
            by_text={name: moments.merged(two.by_text[name]) for name, moments in one.by_text.items()},
            first_key=one.first_key + two.first_key,
            roles=one.roles + two.roles,
            weight_count=one.weight_count + two.weight_count,
            weight_mass=one.weight_mass + two.weight_mass,
            queries=one.queries + two.queries,
            sinks=one.sinks.merged(two.sinks),
            massive=one.massive.merged(two.massive),
            strongest=one.strongest.merged(two.strongest, self.about.examples),
            sample=one.sample.merged(two.sample),
            strings={**one.strings, **two.strings},
        )

    def with_strings(self, tokenizer: PreTrainedTokenizerBase) -> CorpusSummary:
        """A copy that knows what its tokens are called; those that the tokenizer does not know are ``<id:50000>``."""
        from llama_attn.stats.token_ids import token_strings

        missing = sorted(self.named_tokens() - {*self.strings})
        names = dict(zip(missing, token_strings(tokenizer, missing), strict=True))
        return replace(self, strings={**self.strings, **names})

    def named_tokens(self) -> set[int]:
        """Ids of all tokens that it names."""
        named = (self.sinks.keys[self.sinks.counts[:, :2].any(1)], self.strongest.ids, self.sample.ids)
        return {int(token) for array in named for token in np.unique(array)} - {NO_TOKEN}

    def to_xarray(self) -> xarray.Dataset:
        """Everything per head with named axes.

        ``<statistic>_{count,mean,std,min,max}`` are by position, ``<statistic>_histogram`` too, over
        ``<statistic>_bin``, the lower edges of the bins; ``<statistic>_text_{count,mean,std,min,max}`` of the means over each
        text. ``sink_rate`` is the share of texts whose first token is a sink of the head, ``role_share`` that in which
        it has each role most; ``weight_count`` and ``weight_mass`` are per query. ``attrs`` hold ``texts``, ``tokens``,
        ``model`` and ``part``, what was measured of the model if not all of it.

        Raises:
            ImportError: xarray is not installed.
        """
        return labelled.to_xarray(self)

    def to_pandas(self) -> pandas.DataFrame:
        """One line per (layer, head): mean and standard deviation over texts of every statistic, sink rate, roles.

        Raises:
            ImportError: pandas is not installed.
        """
        return labelled.to_pandas(self)

    def __repr__(self) -> str:
        """What it is of."""
        layers, heads = len(self.about.layers), len(self.about.heads)
        # Names may come from a file.
        return printable(
            f"CorpusSummary: {self.texts:,} texts, {self.tokens:,} tokens of {self.about.model}, {layers} layers × "
            f"{heads} heads, {', '.join(self.by_position)}"
        )

    def _numbered(self, files: Sequence[str]) -> CorpusSummary:
        """With its examples' files numbered as in a longer list."""
        if tuple(files) == self.files:
            return self
        place = {name: number for number, name in enumerate(files)}
        numbers = np.array([place[name] for name in self.files], np.int32)
        return replace(
            self,
            files=tuple(files),
            strongest=replace(self.strongest, file=numbers[self.strongest.file]),
            sample=replace(self.sample, file=numbers[self.sample.file]),
        )


def summary_of(name: str, source: CorpusSummary | str | os.PathLike[str]) -> CorpusSummary:
    """A summary, or the one in a file.

    Args:
        name: What the argument is called.
        source: Either.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither a summary nor the path of one.
    """
    if isinstance(source, CorpusSummary):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{name}: expected a CorpusSummary or the path of one, got a {type(source).__name__}")
    return CorpusSummary.load(source)


def check_same(one: About, two: About) -> None:
    """Check that two summaries can be merged.

    Raises:
        ValueError: They differ; the message names the field and has both values.
    """
    for known in fields(About):
        here, there = getattr(one, known.name), getattr(two, known.name)
        if here != there:
            raise ValueError(f"{known.name}: expected summaries of the same, got {here!r} and {there!r}")


def _packed(summary: CorpusSummary) -> tuple[dict[str, Any], store.Arrays]:
    """What a file holds of it."""
    header: dict[str, Any] = {"version": VERSION, "about": asdict(summary.about), "files": summary.files}
    header |= {name: getattr(summary, name) for name in COUNTS}
    header["strings"] = sorted(summary.strings.items())
    arrays = {name: getattr(summary, name) for name in ARRAYS}
    for name, of in PARTS.items():
        arrays |= {f"{name}/{part.name}": getattr(getattr(summary, name), part.name) for part in fields(of)}
    for group in GROUPS:
        for name, moments in getattr(summary, group).items():
            arrays |= {f"{group}/{name}/{part}": array for part, array in moments.packed().items()}
    return header, arrays


def _unpacked(header: Any, arrays: store.Arrays) -> CorpusSummary:
    """What `_packed` makes; anything else is an error."""
    read = read_header(header)
    check_arrays(read, arrays)
    about = About(**read.pop("about"))
    known: dict[str, Any] = {name: arrays[name] for name in ARRAYS}
    for name, of in PARTS.items():
        known[name] = of(**{part.name: arrays[f"{name}/{part.name}"] for part in fields(of)})
    for group in GROUPS:
        known[group] = {
            name: Moments.unpacked(arrays, f"{group}/{name}/", value_bins(label.unit))
            for name, label in of_positions(about.labels).items()
        }
    return CorpusSummary(about=about, **read, **known)


def _positions(by_position: Mapping[str, Moments]) -> int:
    return max((moments.count.shape[-1] for moments in by_position.values()), default=0)
