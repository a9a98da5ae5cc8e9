"""The weight of an output projection, whatever layer it is, read without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from llama_attn.stats.recorder import UnreadableError


def weight_of(
    layer: nn.Module, channels: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "hidden channels"]:
    """What ``layer`` does to each of ``channels`` input channels.

    Args:
        layer: Linear, adapted, quantised or offloaded.
        channels: Number of its inputs.
        device: Where it runs.
        dtype: In which it is asked, if it has to be.

    Raises:
        UnreadableError: Its weight is not there and it cannot be asked without changing something.
    """
    if (weight := _plain(layer)) is not None:
        return weight
    if (weight := _adapted(layer, channels, device, dtype)) is not None:
        return weight
    return _asked(layer, channels, device, dtype)


def by_head(layer: nn.Module, heads: int, value: Tensor) -> Callable[[torch.device], Tensor]:
    """What ``layer`` does to the channels of each of ``heads`` heads, (head, hidden, channel), for a device."""
    channels = value.shape[-1]

    def weight(device: torch.device) -> Float[Tensor, "head hidden channel"]:
        whole = weight_of(layer, heads * channels, device, value.dtype)
        return rearrange(whole, "hidden (head channel) -> head hidden channel", channel=channels)

    return weight


def _plain(layer: nn.Module) -> Tensor | None:
    if type(layer) not in (nn.Linear, Conv1D):
        return None
    weight: Any = layer.weight
    if isinstance(weight, DTensor):
        # Under tensor parallelism the part of it that belongs to the heads held here.
        weight = weight.to_local()
    # Subclasses of tensors are quantised, and offloaded weights are not here.
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return None
    return weight.T if type(layer) is Conv1D else weight


def _adapted(layer: Any, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The base's weight and what PEFT's LoRA adds to it, whose dropout is no part of the weight."""
    if not hasattr(layer, "get_delta_weight") or not hasattr(layer, "base_layer"):
        return None
    variants = getattr(layer, "lora_variant", {})
    active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]
    if any(name in variants for name in active):
        return None
    weight = weight_of(layer.base_layer, channels, device, dtype)
    if layer.disable_adapters or layer.merged:
        return weight
    for name in active:
        weight = weight + layer.get_delta_weight(name).to(weight)
    return weight


def _asked(layer: nn.Module, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Ask the layer itself, one unit vector per channel; not through its hooks, which are others'."""
    if any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in layer.modules()):
        raise UnreadableError(f"the weight of {type(layer).__name__} is not readable while its dropout is on")
    units = torch.eye(channels, device=device, dtype=dtype)
    sharded: Any = layer if isinstance(layer, FSDPModule) else None
    if sharded is not None:
        # Its weight is in parts until it runs.
        sharded.unshard()
    try:
        return (layer.forward(units) - layer.forward(torch.zeros_like(units[:1]))).T
    except (RuntimeError, TypeError, NotImplementedError, ValueError, AttributeError) as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise UnreadableError(
            f"the weight of {type(layer).__name__} is not readable, and asked it says: {message}"
        ) from error
    finally:
        if sharded is not None:
            sharded.reshard()
