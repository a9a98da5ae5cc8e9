"""Attention backends: one file is one name for ``attn_implementation``.

A backend file holds

- ``attend``: an attention function with transformers' signature, called
  ``attend(module, query, key, value, attention_mask, scaling=…, dropout=…, **kwargs)`` with query
  (batch, head, query, channel) and key, value (batch, kv_head, key, channel) after RoPE and cache, which returns
  the output (batch, query, head, channel) and the weights or None;
- ``mask``: the function that makes its ``attention_mask``, or None where transformers already has one;
- ``ACCEPTS_MASKS_OF``: the backends whose masks it reads as well as its own;
- ``unavailable()``: None if it runs here, else the reason and what to install;
- ``sees``: its rule, who sees whom in a call of it;
- ``ENGINE``, optional: the engine it runs on, which then measures too.
"""
