"""Which checkpoints our classes read: those of their own architecture.

transformers reads any configuration with any class and warns. A Qwen checkpoint then loses the biases of its
projections, a Mistral one its window, and the numbers are those of another model.
"""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import LlamaConfig


def refuse_other_architectures(config: PreTrainedConfig) -> None:
    """Refuse a configuration that describes another architecture than Llama.

    Subclasses of ``LlamaConfig`` pass, with files of their own type and of every type they derive from. So do
    configurations that nobody has registered with transformers: whoever writes one knows what it is for.

    Args:
        config: The configuration that a Llama is about to be built from. One that was read from a file still says
            which ``model_type`` the file has.

    Raises:
        ValueError: It was read from the file of another type, or is the configuration of another type.
    """
    stated = config.model_type
    inherited = {getattr(base, "model_type", "") for base in type(config).__mro__}
    foreign = stated in CONFIG_MAPPING and stated != LlamaConfig.model_type and not isinstance(config, LlamaConfig)
    if stated not in inherited or foreign:
        raise ValueError(
            f"config: model_type {stated!r} is not {LlamaConfig.model_type!r}, and a Llama would drop in silence what it "
            "has besides (biases, windows, norms); load it with transformers' AutoModelForCausalLM and measure it "
            "with llama_attn.record(model)"
        )
