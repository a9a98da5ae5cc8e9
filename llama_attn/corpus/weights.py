"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, types, shapes and values of all weights and buffers of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if isinstance(tensor, DTensor):
        # Each process has a part of it; all of them ask for the whole.
        tensor = tensor.full_tensor()
    if hasattr(tensor, "__tensor_flatten__"):
        # Quantised weights are made of several tensors.
        for part in tensor.__tensor_flatten__()[0]:
            _add(digest, part, getattr(tensor, part))
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
