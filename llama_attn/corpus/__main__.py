"""``python -m llama_attn.corpus``, which launchers start: the same as ``llama-attn corpus``."""

import typer

from llama_attn.cli.corpus import corpus

typer.run(corpus)
