"""The zoo: a tiny random model of every type whose attention uses transformers' interface, and some that do not.

An entry says what a model is and which situations it is tested in. What attention really got in them is captured from
the model itself, see ``any_oracle``.
"""

from __future__ import annotations

from zoo_other import JOINT, PAIRS, REFUSED, SOUNDS, TOWERS
from zoo_text import DECODERS, ENCODERS, HYBRIDS

from llama_attn.backends import _streaming

ENTRIES = {entry.name: entry for entry in (*DECODERS, *HYBRIDS, *ENCODERS, *TOWERS, *SOUNDS, *PAIRS, *JOINT)}
NOT_SERVED = {entry.name: entry for entry in REFUSED}
# Those that streaming refuses when they are loaded.
NOT_STREAMED = [name for name in ENTRIES if name in _streaming.NOT_SERVED]
