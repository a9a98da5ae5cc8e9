"""Attention patterns by TransformerLens in a process of its own: peak memory, and how long it took.

A script for the environment that ``make .venv-peers/.ready`` builds:
``.venv-peers/bin/python benchmarks/transformer_lens_process.py FOLDER --length 1024``; it prints JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence

import torch
from fresh_process import VOCABULARY, peak_mib
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, LlamaForCausalLM


def main(arguments: Sequence[str]) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of a checkpoint with its tokenizer")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1, help="forwards, after one that warms up if more than one")
    options = parser.parse_args(arguments)

    # Its patterns are those of eager attention, as from_pretrained of the bridge itself would choose.
    model = LlamaForCausalLM.from_pretrained(options.folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    bridge = TransformerBridge.boot_transformers(options.folder, hf_model=model.eval(), tokenizer=tokenizer)
    ids = torch.randint(VOCABULARY, (1, options.length), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(options.rounds + (options.rounds > 1)):
        # The patterns of the round before would count twice.
        cache = None
        start = time.perf_counter()
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
        seconds.append(time.perf_counter() - start)
    peak = peak_mib()
    # What every key of every head received on average, to compare.
    received = torch.stack([cache[name][0].sum(1) for name in cache]) / torch.arange(options.length, 0, -1)
    report = {
        "seconds": seconds[-options.rounds :],
        "peak_mib": peak,
        "shape": list(received.shape),
        "received": received.mean((0, 1)).tolist(),
        "version": importlib.metadata.version("transformer-lens"),
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
