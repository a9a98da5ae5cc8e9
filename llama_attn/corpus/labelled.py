"""A summary with named axes, and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_attn.analysis.part import measured_part
from llama_attn.corpus.bins import position_starts, value_bins
from llama_attn.stats.weight_bins import NUM_WEIGHT_BINS

if TYPE_CHECKING:
    import pandas
    import xarray

    from llama_attn.corpus.moments import Moments
    from llama_attn.corpus.summary import CorpusSummary

# What is told of moments, and in words.
TOLD = {
    "count": "how many", "mean": "mean", "std": "standard deviation", "min": "smallest", "max": "largest",
}  # fmt: skip


def to_xarray(summary: CorpusSummary) -> xarray.Dataset:
    """Everything per head; see `CorpusSummary.to_xarray`."""
    import xarray

    about = summary.about
    variables: dict[str, Any] = {}
    coordinates: dict[str, Any] = {"layer": list(about.layers), "head": list(about.heads), "role": list(about.roles)}
    for name, moments in summary.by_position.items():
        label = about.labels[name]
        of_heads = tuple(dim for dim in label.dims if dim not in ("batch", "query", "key"))
        dims = (*of_heads, "position_bin")
        coordinates["position_bin"] = position_starts(2 ** moments.count.shape[-1] - 1)
        for dim, size in zip(of_heads, moments.count.shape, strict=False):
            coordinates.setdefault(
                dim, [*about.layers, about.num_layers] if dim == "hidden_layer" else list(range(size))
            )
        bins = f"{name}_bin"
        coordinates[bins] = [-np.inf, *value_bins(label.unit).edges.tolist()]
        for told, array in _told(moments).items():
            variables[f"{name}_{told}"] = (dims, array, _attrs(label, told, "of all queries or keys"))
        variables[f"{name}_histogram"] = (
            (*dims, bins), moments.histogram, {"units": "1", "long_name": f"{label.meaning}: how many in each bin"},
        )  # fmt: skip
        for told, array in _told(summary.by_text[name]).items():
            variables[f"{name}_text_{told}"] = (of_heads, array, _attrs(label, told, "of the means over each text"))
    of_heads = ("layer", "head")
    sinks, known = summary.first_key[..., 0], summary.first_key[..., 1]
    variables["sink_rate"] = (
        of_heads,
        np.where(known > 0, sinks / np.maximum(known, 1), np.nan),
        {
            "units": "fraction",
            "long_name": "share of texts whose first token is a sink",
            "source": "Gu et al., arXiv 2410.10781",
        },
    )
    counted = summary.roles.sum(0)
    variables["role_share"] = (
        ("role", *of_heads),
        np.where(counted > 0, summary.roles / np.maximum(counted, 1), np.nan),
        {"units": "fraction", "long_name": "share of texts in which the head has the role most"},
    )
    if summary.weight_mass.size:
        coordinates["weight_bin"] = list(range(NUM_WEIGHT_BINS))
        queries = np.maximum(summary.queries, 1)[:, None, None]
        for name in ("weight_count", "weight_mass"):
            label = about.labels[name]
            attrs = {"units": label.unit, "long_name": label.meaning, "source": label.source}
            variables[name] = ((*of_heads, "weight_bin"), getattr(summary, name) / queries, attrs)
    about_all: dict[str, Any] = {
        "texts": summary.texts, "tokens": summary.tokens, "cut": summary.cut, "skipped": summary.skipped,
        "model": about.model, "num_layers": about.num_layers, "num_heads": about.num_heads,
        "direction": about.direction, "config": about.config, "max_tokens": about.max_tokens,
    }  # fmt: skip
    dataset = xarray.Dataset(variables, coordinates, about_all)
    return dataset.assign_attrs(part=measured_part(dataset))


def to_pandas(summary: CorpusSummary) -> pandas.DataFrame:
    """One line per head; see `CorpusSummary.to_pandas`."""
    import pandas

    about = summary.about
    layers, heads = np.meshgrid(about.layers, about.heads, indexing="ij")
    columns: dict[str, Any] = {"layer": layers.ravel(), "head": heads.ravel()}
    for name in about.scores:
        told = _told(summary.by_text[name])
        columns[name], columns[f"{name}_std"] = told["mean"].ravel(), told["std"].ravel()
    dataset = to_xarray(summary)
    columns["sink_rate"] = dataset.sink_rate.values.ravel()
    share = dataset.role_share.values.reshape(len(about.roles), -1)
    known = np.isfinite(share).all(0)
    columns["role"] = [
        about.roles[at] if there else None for at, there in zip(np.nan_to_num(share).argmax(0), known, strict=True)
    ]
    for role, values in zip(about.roles, share, strict=True):
        columns[f"{role}_share"] = values
    frame = pandas.DataFrame(columns)
    frame.attrs |= {
        "texts": summary.texts,
        "tokens": summary.tokens,
        "model": about.model,
        "part": dataset.attrs["part"],
    }
    return frame


def _told(moments: Moments) -> dict[str, np.ndarray]:
    """Count, mean, std, min and max; NaN where there are no numbers."""
    known = moments.count > 0
    numbers = {"mean": moments.mean, "std": moments.std, "min": moments.low, "max": moments.high}
    return {"count": moments.count} | {name: np.where(known, array, np.nan) for name, array in numbers.items()}


def _attrs(label: Any, told: str, of: str) -> dict[str, str]:
    unit = "1" if told == "count" else label.unit
    return {"units": unit, "long_name": f"{label.meaning}: {TOLD[told]} {of}", "source": label.source}
