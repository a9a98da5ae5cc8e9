"""``ablate_heads`` and ``block_keys``: what does a model do without some of its heads, or without looking at some tokens?

Nothing is written to the model. While the block runs its attention calls are others, and `llama_attn.record`, around it
or in it, measures what really happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from llama_attn.observe.ablation import Ablation, Heads
from llama_attn.observe.blocking import Blocking


def ablate_heads(
    module: nn.Module,
    heads: Heads,
    mode: Literal["zero", "mean"] | Float[Tensor, "*layer head value_channel"] = "zero",
    *,
    stack: str | None = None,
) -> Ablation:
    """Replace the output of some attention heads while a block of code runs: what does the model do without them?

    It happens between attention and the output projection, in forwards, training and ``generate``, on any attention
    backend and for every model that `llama_attn.record` serves. ``"zero"`` equals zeroing the columns of the output
    projection that belong to the heads. Weights that eager attention returns beside its output stay as they are. A
    `record` around it or in it sees what the layers behind make of it. With gradient checkpointing the backward belongs
    in the block too, since it runs the layers again.

    Args:
        module: A model, one of its modules, or what wraps it.
        heads: Query heads of each layer, one, several or all: ``{2: 1, 3: [0, 5], 4: "all"}``. Layers are numbered as
            `record` numbers them, by their place in the stack.
        mode: What their output becomes. ``"zero"``: 0. ``"mean"``: the head's mean output over the real queries of the
            same row and the same call [activation]. A tensor: these values, of all heads of a layer
            (head, value_channel) or of all layers, those without attention included (layer, head, value_channel).
        stack: Which attention layers, as for `record`.

    Returns:
        A context manager.

    Raises:
        ValueError: There is no such stack, layer or head, the values do not fit, ``"mean"`` was asked of a call with a
            single query, such as a step of ``generate``, or, when the block ends, a layer that was named did not run.

    Examples:
        >>> with ablate_heads(model, {18: [6]}):
        ...     loss = model(**inputs, labels=labels).loss

    Source: Michel et al., arXiv 1905.10650; "mean": Wang et al., arXiv 2211.00593.
    """
    return Ablation(module, heads, mode, stack)


def block_keys(
    module: nn.Module,
    keys: int | Iterable[int] | slice | Tensor | Any,
    *,
    first_query: int | None = None,
    stack: str | None = None,
) -> Blocking:
    """Hide tokens from attention while a block of code runs: what does the model do that may not look at them?

    Equal to giving the model a 4-D mask of what is left, in every layer or in each its own, on ``eager``, ``sdpa``,
    ``streaming`` and what is registered beside them; on what takes no 4-D mask it is refused. It works in forwards,
    training and ``generate``. The tokens stay where they are: their own queries, positions and caches are as before.
    A `record` around it or in it measures the attention that is left, where what is blocked is not visible. Where all
    queries see the same keys it takes no memory under ``streaming``; else a bool per query and key, and one per head if
    KV heads differ.

    Args:
        module: A model, one of its modules, or what wraps it.
        keys: Positions that no query sees, counted along the row with its padding: integers, or a slice that may be
            open at its end. Or a bool mask, True = may be seen, beyond whose length every key may be seen:
            (batch, key), (batch, query, key), or (layer, batch, kv_head, key), in which layers are numbered as `record`
            numbers them; a batch of 1 stands for every row. A ``DataArray`` with these dimensions too, such as
            `llama_attn.analysis.keep_mask` gives; layers that it does not name are left alone.
        first_query: Only queries from this position on are blocked, and each of them still sees itself: with the length
            of a prompt, the prompt is read as ever, and what follows sees only what is kept of it. None for all queries.
        stack: Which attention layers, as for `record`.

    Returns:
        A context manager.

    Raises:
        ValueError: No such form, rows, layers or KV heads, a backend that takes no mask, keys of which no call
            had any when the block ends, or a query that would be left nothing to see: key 0 blocked for all queries leaves query 0
            nothing, so that ``first_query=1`` is wanted.

    Examples:
        >>> with block_keys(model, 0, first_query=1):  # without the sink
        ...     loss = model(**inputs, labels=labels).loss
    """
    return Blocking(module, keys, first_query, stack)
