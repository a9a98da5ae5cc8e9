"""One forward in a process of its own, on SmolLM2's shape: its peak memory, and how long it took.

A script: ``python benchmarks/fresh_process.py streaming --length 4096 --statistics``; it prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from check import shrunk

NUM_LAYERS, VOCABULARY = 30, shrunk(49152)


def run(
    *arguments: str | int, python: str = sys.executable, script: str = __file__, fixed_threshold: bool = False
) -> dict:
    """What a script of this kind prints.

    Args:
        *arguments: Of the script.
        python: The interpreter.
        script: The script.
        fixed_threshold: Whether memory from 1 MiB on comes from the system and goes back at once. By itself glibc moves
            that threshold, and what it keeps in between differs by a tenth of the peak from one process to the next.

    Raises:
        RuntimeError: It failed; the message holds its own.
    """
    command = [python, script, *map(str, arguments)]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(2**20)} if fixed_threshold else {})
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr.strip()[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def peak_mib() -> float:
    """Most memory that this process ever held at once.

    Read from /proc: what getrusage tells begins with the peak of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status: expected a line VmHWM")


def main(arguments: Sequence[str]) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--stock", action="store_true", help="transformers' own class, llama_attn not imported")
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--output-attentions", action="store_true")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1, help="of the batch")
    parser.add_argument("--padding", type=int, default=0, help="tokens of padding on the left of the first row")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument(
        "--folder", help="of a checkpoint; without it weights are random, which costs no memory to read"
    )
    parser.add_argument("--rounds", type=int, default=1, help="forwards, after one that warms up if more than one")
    options = parser.parse_args(arguments)

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not options.stock:
        from llama_attn import LlamaForCausalLM
    if options.folder:
        model = LlamaForCausalLM.from_pretrained(
            options.folder, dtype=torch.float32, attn_implementation=options.backend
        )
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=shrunk(options.layers),
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM._from_config(config, attn_implementation=options.backend)
    model.eval()
    options.length, options.padding = shrunk(options.length), options.padding and shrunk(options.padding)
    shape = (options.rows, options.length)
    inputs = {"input_ids": torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))}
    if options.padding:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        inputs["attention_mask"][0, : options.padding] = 0
    if options.statistics:
        inputs["output_attention_stats"] = True
    seconds = []
    for _ in range(options.rounds + (options.rounds > 1)):
        start = time.perf_counter()
        with torch.no_grad():
            output = model(
                **inputs, logits_to_keep=1, use_cache=False, output_attentions=options.output_attentions or None
            )
        seconds.append(time.perf_counter() - start)
    report = {"seconds": seconds[-options.rounds :], "peak_mib": peak_mib()}
    if not output.logits.isfinite().all():
        raise RuntimeError("logits: expected finite numbers")
    if options.output_attentions:
        report["weights"] = list(output.attentions[-1].shape)
    if options.statistics:
        stats = output.attention_stats
        total = (stats["received"] * stats.visible_queries[:, None]).nansum(-1)
        real = (stats.visible_keys > 0).sum(-1)[:, None].to(total.dtype).expand_as(total)
        torch.testing.assert_close(total, real, rtol=1e-4, atol=0)
        report["engine"] = stats.engine
        if options.folder:
            # Mean over layers and heads, to compare.
            report["received"] = stats["received"][:, 0].mean((0, 1)).tolist()
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
