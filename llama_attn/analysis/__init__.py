"""Questions asked of the statistics: xarray in, xarray or pandas out."""

from __future__ import annotations

from llama_attn.analysis.dataset import as_dataset, require
from llama_attn.analysis.summary import summarize_layers

__all__ = ["as_dataset", "require", "summarize_layers"]
