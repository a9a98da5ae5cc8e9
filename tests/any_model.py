"""What the tests of `record` on any model share."""

from __future__ import annotations

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo_situations import draw, padding

__all__ = ["draw", "left_padding", "state"]


def left_padding(length):
    """Four tokens of padding before the first row."""
    return padding(length, "left")


def state(model):
    """Whatever a recording could leave behind."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs), sorted(vars(m)))
        for m in model.modules()
    ]
    mapping = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ALL_MASK_ATTENTION_FUNCTIONS}
    local = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    return hooks, mapping, local, sorted(vars(ALL_ATTENTION_FUNCTIONS)), model.config.to_dict()
