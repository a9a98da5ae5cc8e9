"""Pipeline parallelism: models run as they do upstream, statistics are refused.

Every process holds some of the layers, and what transformers wraps around the forward lets nothing but logits and
cache through.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from llama_attn.stats.config import AttentionStatsConfig


def refuse_pipeline(model: nn.Module) -> None:
    """Say that ``model`` cannot be measured if it is one stage of a pipeline.

    Raises:
        ValueError: It is.
    """
    if getattr(model, "_pp_stage", None) is not None:
        raise ValueError(
            "output_attention_stats: not with pipeline parallelism (pp_size > 1), whose processes hold some of the "
            "layers each and return nothing but logits and cache; use tp_size or FSDP"
        )


class RefusesInPipelines:
    """Refuses statistics on every stage, before the stages wait for one another; a mixin of `LlamaForCausalLM`."""

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Upstream's, which replaces the forward of a stage; a hook is called before it."""
        stage: nn.Module = super().maybe_distribute_model(model, *args, **kwargs)  # type: ignore[misc]
        if getattr(stage, "_pp_stage", None) is not None:
            stage.register_forward_pre_hook(_refuse_statistics, with_kwargs=True)
        return stage


def _refuse_statistics(stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if AttentionStatsConfig.from_argument(kwargs.get("output_attention_stats")) is not None:
        refuse_pipeline(stage)
