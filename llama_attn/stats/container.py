"""The statistics of one run, labelled: what ``outputs.attention_stats`` is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.counts import Direction
from llama_attn.stats.display import as_html, as_text
from llama_attn.stats.files import complete_file
from llama_attn.stats.formats import STATS, existing, header_of
from llama_attn.stats.header import FORMAT_VERSION, check_against_tensors, read_header
from llama_attn.stats.hub import HubMixin
from llama_attn.stats.joining import joined
from llama_attn.stats.labels import SEGMENT_LABELS, VISIBILITY_LABELS, Label
from llama_attn.stats.part import part_of
from llama_attn.stats.token_ids import read_ids, token_strings
from llama_attn.stats.token_text import printable
from llama_attn.stats.weight_bins import NUM_WEIGHT_BINS

if TYPE_CHECKING:
    import xarray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class AttentionStats(HubMixin):
    """Statistics of every measured head, with what is needed to read them.

    ``stats["entropy"]`` is the tensor; `to_xarray` gives the same with named axes, coordinates and units.
    Positions that are padding are NaN, or −1 in integer statistics.

    Args:
        values: The tensors by name, ``visible_keys`` and ``visible_queries`` among them, and ``key_segment`` (batch,
            key) where segments were given: which one each token belongs to, −1 for none.
        labels: Dims, unit, meaning and source of each.
        config: What was asked for.
        layers: Indices of the measured layers, in the order of the layer axis.
        heads: Indices of the measured query heads, in the order of the head axis.
        num_layers: Layers of the model; the last entry of the ``hidden_layer`` axis is the output of the last.
        first_query: Position of the first measured query [token].
        tokens: Token strings of every row of the key axis; set by `with_tokens`.
        segments: Names of the segments.
        backend: Attention backend that computed the output.
        engine: Engine that measured; several are joined by "+".
        model: Name or path of the model.
        replayed: Whether the numbers come from an extra forward over what `generate` returned.
        first_key: Position of the first entry of the key axis [token]; above 0 in a cache that has dropped keys.
        stack: Path of the attention modules in the model, with # for the number of the layer.
        paths: Path of each measured layer's attention module.
        direction: ``"causal"``, ``"bidirectional"``, or ``"cross"`` for keys of another sequence.
        length: Positions that the bins of maps are laid out for [token]; 0 for those of the keys.
        without_attention: Layers of the model that have no attention, and so no numbers.
        selected_queries: Positions of the queries that `select` has left [token]; None for all that were measured.
        rows: Positions of the queries of ``row_weights`` [token].
        num_heads: Query heads of a layer of the model, the most of any; 0 if an older file does not say.
        num_kv_heads: KV heads, likewise.
    """

    values: dict[str, Tensor]
    labels: dict[str, Label]
    config: AttentionStatsConfig
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    num_layers: int
    first_query: int
    tokens: list[list[str]] | None = None
    segments: tuple[str, ...] | None = None
    backend: str = ""
    engine: str = ""
    model: str = ""
    replayed: bool = field(default=False)
    first_key: int = 0
    stack: str = ""
    paths: tuple[str, ...] = ()
    direction: Direction = "causal"
    length: int = 0
    without_attention: tuple[int, ...] = ()
    selected_queries: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    num_heads: int = 0
    num_kv_heads: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the statistics, in the order of the table."""
        return tuple(name for name in self.values if name not in VISIBILITY_LABELS | SEGMENT_LABELS)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Coordinates of the ``hidden_layer`` axis: inputs of the measured layers, then the last layer's output."""
        return (*self.layers, self.num_layers)

    @property
    def queries(self) -> Sequence[int]:
        """Absolute positions of the measured queries [token]."""
        if self.selected_queries is not None:
            return self.selected_queries
        stride = self.config.query_stride
        return range(self.first_query, self.first_query + stride * self.visible_keys.shape[-1], stride)

    @property
    def keys(self) -> range:
        """Absolute positions of the keys [token]."""
        return range(self.first_key, self.first_key + self.num_keys)

    @property
    def visible_keys(self) -> Tensor:
        """Real keys that each measured query sees, (batch, query), int32; (layer, …) if layers differ."""
        return self.values["visible_keys"]

    @property
    def visible_queries(self) -> Tensor:
        """Measured real queries that see each key, (batch, key), int32; (layer, …) if layers differ."""
        return self.values["visible_queries"]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.visible_queries.shape[-2]

    @property
    def num_keys(self) -> int:
        """Length of the key axis."""
        return self.visible_queries.shape[-1]

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.values[name]
        except KeyError:
            left = "" if self.selected_queries is None else "; select(queries=…) left out what sums up all queries"
            raise KeyError(f"no statistic {name!r}; there are {list(self.values)}{left}") from None

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def with_tokens(self, tokenizer: PreTrainedTokenizerBase, input_ids: Any) -> AttentionStats:
        """A copy that knows its token strings, which pictures use as labels.

        Args:
            tokenizer: Turns ids into strings; those that it does not know become ``<id:50000>``.
            input_ids: Ids of the key axis, (batch, key) or (key), or the ``BatchEncoding`` that holds them. After
                ``generate`` the returned sequences may be given: the one token at the end that was never fed is
                dropped.

        Raises:
            ValueError: Another shape, or no integers.
        """
        ids = read_ids(input_ids)
        if ids.shape[1] == self.num_keys + 1:
            ids = ids[:, :-1]
        if ids.shape != (self.batch, self.num_keys):
            raise ValueError(f"input_ids: expected shape {(self.batch, self.num_keys)}, got {tuple(ids.shape)}")
        return replace(self, tokens=[token_strings(tokenizer, row) for row in ids.tolist()])

    def select(
        self,
        layers: Sequence[int] | int | None = None,
        heads: Sequence[int] | int | None = None,
        batch: Sequence[int] | int | None = None,
        queries: Sequence[int] | int | slice | None = None,
    ) -> AttentionStats:
        """Some layers, heads, rows and queries, by the indices that ``layers``, ``heads`` and ``queries`` name.

        Every axis stays, with length 1 for a single index. KV heads are not filtered.

        Of some of the queries, only what is of single queries is left, ``visible_queries`` counts them alone, and
        norms of keys stay. What sums up all queries (``received``, maps, histograms, medians of a layer) is not there.

        Args:
            layers: Indices of measured layers.
            heads: Indices of measured query heads.
            batch: Rows.
            queries: Positions of measured queries [token], or a slice of positions; they stay in the order of the row.

        Raises:
            ValueError: An index or a position that was not measured, or a negative one; queries of a run that has
                nothing of single queries; some queries behind a mask of the user's own, whose counts do not tell who
                sees whom.
        """
        return part_of(self, layers, heads, batch, queries)

    @classmethod
    def concat(cls, stats: Sequence[AttentionStats], dim: str = "batch") -> AttentionStats:
        """Several texts as rows of one batch, padded on the right.

        Everything is as if they had been measured together: behind the end of shorter texts stand NaN, −1, counts
        of 0 and empty token strings. Segments go by name. ``row_weights`` are of all rows that some text has, NaN
        where a text has others. What was kept and how segments were given is no longer known to ``config``.

        Args:
            stats: The same statistics of the same layers and heads of one model, measured in the same way.
            dim: The axis; "batch".

        Raises:
            ValueError: An empty list, something else than `AttentionStats`, another axis; or they differ in what they
                hold or in how they were measured, or their maps in the width of bins.
        """
        return joined(stats, dim)

    def coordinates(self) -> dict[str, Sequence[int] | Sequence[str]]:
        """The values of every axis: indices, positions in tokens, left edges of bins, names of segments."""
        length = self.length or self.keys.stop
        edges = range(0, length, self.config.bin_width(length))
        coordinates: dict[str, Sequence[int] | Sequence[str]] = {
            "layer": self.layers,
            "hidden_layer": self.hidden_layers,
            "batch": range(self.batch),
            "head": self.heads,
            "query": self.queries,
            "row": self.rows,
            "key": self.keys,
            "query_bin": edges,
            "key_bin": edges,
            "distance_bin": [2**b - 1 for b in range(length.bit_length())],
            "weight_bin": range(NUM_WEIGHT_BINS),
            "rank": range(self.config.top_k),
        }
        if self.segments is not None:
            coordinates["segment"] = self.segments
        return coordinates

    def to_xarray(self) -> xarray.Dataset:
        """The same numbers as an ``xarray.Dataset`` with named axes, coordinates, units and sources.

        Raises:
            ImportError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise ImportError("to_xarray needs xarray: pip install 'llama_attn[analysis]'") from error
        variables = {}
        for name, tensor in self.values.items():
            if name in SEGMENT_LABELS:
                continue
            label = self.labels[name]
            attrs = {"units": label.unit, "long_name": label.meaning or name, "source": label.source}
            variables[name] = (label.dims, tensor.detach().cpu().numpy(), attrs)
        known = self.coordinates()
        sizes = {
            dim: size
            for name in self.values
            for dim, size in zip(self.labels[name].dims, self[name].shape, strict=True)
        }
        coords: dict[str, Any] = {dim: list(known.get(dim, range(size))) for dim, size in sizes.items()}
        if self.tokens is not None:
            coords["key_token"] = (("batch", "key"), self.tokens)
            if self.direction != "cross":
                rows = [[row[i - self.first_key] for i in self.queries] for row in self.tokens]
                coords["query_token"] = (("batch", "query"), rows)
        if "key_segment" in self:
            words = [*(self.segments or ()), ""]
            coords["key_segment"] = (
                ("batch", "key"),
                [[words[at] for at in row] for row in self["key_segment"].tolist()],
            )
        about = {
            "backend": self.backend,
            "engine": self.engine,
            "model": self.model,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "replayed": int(self.replayed),
            "stack": self.stack,
            "paths": json.dumps(self.paths),
            "direction": self.direction,
            "without_attention": json.dumps(self.without_attention),
            "config": json.dumps(self.config.to_json()),
        }
        return xarray.Dataset(variables, coords, about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file whose header holds everything that is not a tensor.

        The file appears under its name only once it is complete.

        Raises:
            FileNotFoundError: The folder does not exist.
        """
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "values"}
        header["version"] = FORMAT_VERSION
        header["config"] = self.config.to_json()
        header["labels"] = {name: asdict(label) for name, label in self.labels.items()}
        # Copies, since safetensors refuses tensors that share memory.
        tensors = {
            name: torch.clone(t.detach().cpu(), memory_format=torch.contiguous_format)
            for name, t in self.values.items()
        }
        with complete_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={STATS: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionStats:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, damaged, or was not written by `save`; of a summary of a corpus, what takes it.
        """
        path = existing(path)
        try:
            with safe_open(path, framework="pt") as file:
                header = header_of(path, file.metadata(), STATS)
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(
                f"path: {str(path)!r} is not a complete safetensors file, which AttentionStats.save writes "
                f"({printable(str(error))})"
            ) from error
        try:
            stats = cls(values, **read_header(header, values))
            check_against_tensors(stats)
        except ValueError as error:
            raise ValueError(f"path: the header of {str(path)!r} is damaged ({_said(error)})") from None
        # In the order of the run; the file has its tensors in another.
        return replace(stats, values={name: values[name] for name in stats.labels})


def _said(error: Exception) -> str:
    """What went wrong with a file, of which parts of it may be quoted: on one line, and no more than that."""
    return printable(str(error)[:500])


def _flatten(stats: AttentionStats) -> tuple[list[Tensor], tuple[tuple[str, ...], AttentionStats]]:
    return list(stats.values.values()), (tuple(stats.values), replace(stats, values={}))


def _unflatten(leaves: Any, context: tuple[tuple[str, ...], AttentionStats]) -> AttentionStats:
    names, stats = context
    return replace(stats, values=dict(zip(names, leaves, strict=True)))


torch.utils._pytree.register_pytree_node(AttentionStats, _flatten, _unflatten)
