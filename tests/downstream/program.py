"""A user's program, type-checked as strictly as mypy can, see pyproject.toml; a type that got lost would be Any."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from transformers import LlamaConfig

from llama_attn import AttentionStats, AttentionStatsConfig, LlamaForCausalLM, available_backends, record
from llama_attn.analysis import classify_heads, sink_rate
from llama_attn.corpus import CorpusSummary, compare
from llama_attn.viz import corpus_report, plot_attention_map, report


def measured(model: LlamaForCausalLM, ids: torch.Tensor) -> AttentionStats:
    """The statistics of one forward, of the model itself."""
    config = AttentionStatsConfig(statistics="all", layers=(0, 1), norms=True)
    with torch.no_grad():
        outputs = model(ids, output_attention_stats=config)
    stats: AttentionStats = outputs.attention_stats
    return stats.select(heads=[0])


def observed(model: torch.nn.Module, ids: torch.Tensor) -> AttentionStats:
    """The same from outside, of any model."""
    with torch.no_grad(), record(model, AttentionStatsConfig(statistics="all")) as recording:
        model(ids)
    return recording.stats


def looked_at(stats: AttentionStats, folder: Path) -> dict[str, float]:
    """Numbers, pictures and a page."""
    entropy = assert_type(stats["entropy"], torch.Tensor)
    dataset = stats.to_xarray()
    rate = float(sink_rate(dataset).mean())
    roles = classify_heads(stats)
    plot_attention_map(stats, layer=0, head=0).savefig(folder / "map.png")
    page = assert_type(report(stats, folder / "report.html"), Path)
    stats.save(folder / "run.safetensors")
    again = AttentionStats.load(folder / "run.safetensors")
    return {
        "entropy": entropy.mean().item(), "sinks": rate, "roles": float(len(roles)), "layers": float(len(again.layers)),
        "bytes": float(page.stat().st_size),
    }  # fmt: skip


def of_a_corpus(files: list[Path], folder: Path) -> int:
    """Summaries that are merged, compared and shown."""
    summary = CorpusSummary.merge(CorpusSummary.load(file) for file in files)
    frame = compare(summary, summary)
    corpus_report(summary, folder / "corpus.html")
    return len(frame) + assert_type(summary.texts, int)


def main(files: list[Path], folder: Path) -> dict[str, float]:
    """Everything once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    missing = {name: reason for name, reason in available_backends().items() if reason is not None}
    ids = torch.arange(20)[None]
    numbers = looked_at(observed(model, ids), folder)
    numbers["mine"] = measured(model, ids)["entropy"].mean().item()
    return numbers | {"missing": float(len(missing)), "corpus": float(of_a_corpus(files, folder))}
