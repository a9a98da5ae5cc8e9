"""The three figures per layer that this library began with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llama_attn.analysis import as_dataset, require
from llama_attn.stats.files import complete_file
from llama_attn.viz.figures.attention import KINDS, check_kind, plot_attention_map
from llama_attn.viz.figures.norms import plot_hidden_norms, plot_kv_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama_attn.analysis.dataset import Source


DEFAULT_LAYERS = range(10)


def save_seed_figures(
    stats: Source,
    directory: str | os.PathLike[str],
    layers: Iterable[int] = DEFAULT_LAYERS,
    *,
    batch: int = 0,
    kind: Literal["weights", "logits"] = "weights",
    partly: bool = False,
    on_saved: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write ``layer_{i}_attention.png``, ``hidden_states_{i}_norm.png`` and ``kv_{i}_norm.png`` for some layers.

    Colours of the maps are linear, as in the figures that this library began with. So are the names of its default
    set, ``range(10)``; of any other, layers have as many digits as the last one of the model, so that names sort.

    Args:
        stats: Statistics with the map of ``kind`` and ``norms=True``.
        directory: Where to; made if it does not exist.
        layers: Which layers, by default 0 to 9; those that were not measured are skipped.
        batch: Row of the batch.
        kind: What the attention map shows.
        partly: Leave out the figures that need a statistic that is missing, in place of an error.
        on_saved: Called with every finished file, e.g. to move a progress bar.

    Returns:
        The files, in the order of writing.

    Raises:
        ValueError: A statistic is missing; nothing has been written then.
    """
    check_kind(kind)
    dataset = as_dataset(stats)
    drawn: dict[str, tuple[Callable[..., Figure], tuple[str, ...]]] = {
        "layer_{}_attention.png": (partial(plot_attention_map, kind=kind, scale="linear"), (KINDS[kind],)),
        "hidden_states_{}_norm.png": (plot_hidden_norms, ("hidden_norm",)),
        "kv_{}_norm.png": (plot_kv_norms, ("key_norm", "value_norm", "key_mean_norm", "value_mean_norm")),
    }
    if partly:
        drawn = {name: figure for name, figure in drawn.items() if all(needed in dataset for needed in figure[1])}
    require(dataset, *(name for _, needed in drawn.values() for name in needed))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    measured = set(dataset.layer.values.tolist())
    digits = 1 if layers == DEFAULT_LAYERS else len(str(dataset.attrs["num_layers"] - 1))
    written = []
    for layer in (layer for layer in layers if layer in measured):
        for name, (plot, _) in drawn.items():
            path = directory / name.format(f"{layer:0{digits}}")
            with complete_file(path) as unfinished:
                plot(dataset, layer=layer, batch=batch).savefig(unfinished, format="png", dpi=100)
            written.append(path)
            if on_saved is not None:
                on_saved(path)
    return written
