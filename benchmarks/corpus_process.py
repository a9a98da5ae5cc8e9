"""A corpus of random texts, measured in a process of its own: its peak memory after some texts and after all.

A script: ``python benchmarks/corpus_process.py FOLDER 200 2000``; it prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from check import shrunk
from fresh_process import NUM_LAYERS, VOCABULARY, peak_mib
from transformers import LlamaConfig

from llama_attn import AttentionStatsConfig, LlamaForCausalLM
from llama_attn.corpus.batches import Reader
from llama_attn.corpus.records import survey
from llama_attn.corpus.run import Run

LENGTH, BATCH_TOKENS, EVERY = shrunk(512), 4096, shrunk(50)


class Numbers:
    """Tokens that are written as numbers."""

    def __call__(self, text: str, truncation: bool, max_length: int, verbose: bool) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"input_ids": list(map(int, text.split()))[:max_length]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """What tokens are called."""
        return list(map(str, ids))


def main(folder: Path, some: int, all_of_them: int) -> None:
    """Measure so many texts, and note the peak after some of them."""
    draw = torch.Generator().manual_seed(0)
    data = folder / "texts.txt"
    with data.open("w") as file:
        for _ in range(all_of_them):
            file.write(" ".join(map(str, torch.randint(VOCABULARY, (LENGTH,), generator=draw).tolist())) + "\n")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=shrunk(NUM_LAYERS),
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="streaming").eval()
    reader = Reader(model, Numbers(), AttentionStatsConfig(offload="cpu"), "", LENGTH, BATCH_TOKENS, 4)
    run = Run(folder / "out", reader, [survey(data.name, data, EVERY)], "text", EVERY, None, {})
    run.begin()
    done, peaks = 0, []

    def progress(texts: int, tokens: int) -> None:
        nonlocal done
        done += texts
        if done >= some and not peaks:
            peaks.append(peak_mib())

    summary = run.measure(progress)
    peaks.append(peak_mib())
    print(json.dumps({"texts": summary.texts, "tokens": summary.tokens, "peaks": peaks}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
