"""What transformers asks for when it has a mask made: who sees whom in a few numbers and vectors.

Models call ``create_causal_mask`` and its siblings, and these call the mask function of the backend with the lengths,
the offsets, the padding and a function of indices that says who sees whom. Functions composed of transformers' own
parts (causal, windows, chunks, packed documents) are read as vectors; any other is left to be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from llama_attn.stats.visibility import Visibility

OWNER = "transformers.masking_utils"


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask function, read.

    Args:
        causal: Whether no later key is seen.
        window: A key is seen up to ``window`` − 1 tokens back; None without a window.
        reach: A key is seen up to this distance to both sides; None without such a window.
        chunk: Tokens of a chunk, and the left padding of every row, (batch,); None without chunks.
        positions: Positions that chunks are counted in, (batch, token), where documents are packed.
        sequence: Packed sequence of every token, (batch, key); None if there is one.
    """

    causal: bool = False
    window: int | None = None
    reach: int | None = None
    chunk: tuple[int, Tensor] | None = None
    positions: Tensor | None = None
    sequence: Tensor | None = None


class MaskRequest:
    """One call of a mask function; a plain object, so that nobody copies it on its way through a model.

    Args:
        batch_size: Rows.
        q_length: Queries of the call.
        kv_length: Slots of keys.
        mask_function: Says whether a query sees a key, from their indices.
        q_offset: Position of the first query [token].
        kv_offset: Position of the first slot [token].
        attention_mask: (batch, token), True for real ones; None if all are.
        local_size: Size of the window or chunk, if there is one.
        use_vmap: Whether the function is the user's own.
        config: Configuration of the model that asks.
        **kwargs: What else the backend may want.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Any],
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        use_vmap: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> None:
        self.batch, self.num_queries, self.num_slots = batch_size, q_length, kv_length
        # The offset of a static cache is its live counter, which moves on before the layers run.
        self.query_offset, self.key_offset = int(q_offset), int(kv_offset)
        self.padding, self.config = attention_mask, config
        self.mask_function = mask_function
        # What the streaming backends had made of it because the function cannot be read.
        self.mask: Tensor | None = None
        self._user_made, self._local_size = use_vmap, local_size
        self._pattern: Pattern | None = None
        self._is_read = False
        self._visibilities: dict[tuple[torch.device, bool], Visibility] = {}

    def check(self) -> None:
        """Refuse a vector of real tokens that is not of these keys; in a static cache it may be shorter or longer.

        Raises:
            ValueError: It is of other rows or another length.
        """
        expected = self.batch, self.key_offset + self.num_slots
        is_static = self.filled < self.num_slots
        if self.padding is None or tuple(self.padding.shape) == expected:
            return
        if self.padding.ndim != 2 or self.padding.shape[0] != self.batch or not is_static:
            batch, keys = expected
            raise ValueError(f"attention_mask: expected (batch={batch}, keys={keys}), got {tuple(self.padding.shape)}")

    # generate makes the masks of static caches itself and hands them to the forward, which asks for a mask of them.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What a mask of it would have, (batch, 1, query, slot)."""
        return self.batch, 1, self.num_queries, self.num_slots

    def contiguous(self) -> MaskRequest:
        """Itself, which is no matrix."""
        return self

    def fits(self, num_queries: int, num_slots: int) -> bool:
        """Whether an attention call of these lengths is one that it was made for."""
        return self.num_queries == num_queries and self.num_slots == num_slots

    @property
    def pattern(self) -> Pattern | None:
        """The mask function as vectors; None if it has to be evaluated."""
        if not self._is_read:
            self._is_read = True
            self._pattern = self._read_traced() if torch.compiler.is_compiling() else read(self.mask_function)
        return self._pattern

    def _read_traced(self) -> Pattern | None:
        # A graph that is being compiled does not look into closures. Without a size and without a function of the
        # user's own, what is composed is a packed causal mask, whose documents begin where a key does not see the
        # one before it.
        if self.mask_function is causal_mask_function:
            return Pattern(causal=True)
        if self.mask_function is bidirectional_mask_function:
            return Pattern()
        composed = self.mask_function.__qualname__ == "and_masks.<locals>.and_mask"
        composed = composed and self._local_size is None and not self._user_made
        if not composed or self.num_queries != self.num_slots:
            return None
        batch = torch.arange(self.batch)[:, None]
        token = torch.arange(1, self.num_slots)[None]
        linked = self.mask_function(batch, torch.zeros_like(batch), token, token - 1)
        sequence = torch.nn.functional.pad((~linked).long().cumsum(-1), (1, 0))
        return Pattern(causal=True, sequence=sequence)

    @property
    def is_plain(self) -> bool:
        """Whether it hides nothing but what comes later, if that."""
        pattern = self.pattern
        if pattern is None or pattern.chunk or pattern.sequence is not None or self._limits(pattern) != (None, None):
            return False
        return self.padding is None or (not torch.compiler.is_compiling() and bool(self.padding.all()))

    def visibility(
        self, device: torch.device, *, aligned: bool = True, mask: Tensor | None = None
    ) -> Visibility | None:
        """Who sees whom, for the slots that are filled; the same object for every layer that asks.

        Args:
            device: Where the vectors are needed.
            aligned: False for cross-attention, whose queries have no position among the keys. More queries than keys
                have none either.
            mask: The mask that was made of it, which is read where the function cannot be.

        Returns:
            None if neither can be read.
        """
        aligned = aligned and (self.is_causal or self.num_queries <= self.num_slots)
        if (device, aligned) not in self._visibilities:
            pattern = self.pattern
            if pattern is not None:
                visibility = self._of(pattern, device, aligned)
            elif (made := self.mask if mask is None else mask) is not None:
                visibility = self._evaluated(made, device, aligned)
            else:
                return None
            self._visibilities[device, aligned] = visibility
        return self._visibilities[device, aligned]

    @property
    def is_causal(self) -> bool:
        """Whether it is causal but for what else it shows."""
        if torch.compiler.is_compiling():
            return self.mask_function is not bidirectional_mask_function
        return is_decoder(self.mask_function)

    @property
    def filled(self) -> int:
        """Slots that hold a token: in a static cache those behind the last query do not."""
        if not self.is_causal:
            return self.num_slots
        return min(self.num_slots, self.query_offset + self.num_queries - self.key_offset)

    def _first_query(self, aligned: bool) -> int:
        """Slot of the first query; queries in both directions are the last tokens, whatever came before them."""
        if not aligned:
            return 0
        return self.query_offset - self.key_offset if self.is_causal else self.num_slots - self.num_queries

    def _of(self, pattern: Pattern, device: torch.device, aligned: bool) -> Visibility:
        first, stop = self._limits(pattern, device)
        real, dropped = self._real(self.filled, device)
        return Visibility(
            self.batch,
            self._first_query(aligned),
            self.filled,
            device,
            causal=pattern.causal,
            real=real,
            sequence=None if pattern.sequence is None else pattern.sequence.to(device),
            first_key=first,
            stop_key=stop,
            stop_query=self._first_query(aligned) + self.num_queries,
            offset=self.key_offset,
            dropped=dropped,
            aligned=aligned,
        )

    def _evaluated(self, mask: Tensor, device: torch.device, aligned: bool) -> Visibility:
        """From the mask itself; padding and positions are still known."""
        real, dropped = self._real(self.filled, device)
        visibility = Visibility.of_mask(
            mask[..., : self.filled].expand(-1, -1, self.num_queries, -1),
            batch=self.batch,
            device=device,
            first_query=self._first_query(aligned),
            offset=self.key_offset,
            dropped=dropped,
            aligned=aligned,
        )
        if real is None:
            return visibility
        # A query of padding may well see keys: those that its window or an image shows.
        own = real[:, visibility.query_slots] if aligned else True
        return replace(visibility, real=real, sees=visibility.real_queries & own)

    def _real(self, num_keys: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Which keys are real, and how many were before the first slot."""
        if self.padding is None:
            return None, None
        padding = self.padding.to(device=device, dtype=torch.bool)
        real = padding[:, self.key_offset : self.key_offset + num_keys]
        if real.shape[1] < num_keys:
            real = torch.nn.functional.pad(real, (0, num_keys - real.shape[1]))
        dropped = padding[:, : self.key_offset].sum(-1) if self.key_offset else None
        # A compiled graph does not look at values.
        all_real = not torch.compiler.is_compiling() and bool(real.all())
        return None if all_real else real, dropped

    def _limits(self, pattern: Pattern, device: torch.device | None = None) -> tuple[Tensor | None, Tensor | None]:
        """First slot that each query sees through windows and chunks, and the first behind the last; None for no limit."""
        if pattern.window is None and pattern.reach is None and pattern.chunk is None:
            return None, None
        last = self.query_offset + self.num_queries - 1
        position = self.query_offset + torch.arange(self.num_queries, device=device)[None]
        firsts, stops = [], []
        if pattern.window is not None and last - pattern.window + 1 > self.key_offset:
            firsts.append(position - pattern.window + 1)
        if pattern.reach is not None and last - pattern.reach > self.key_offset:
            firsts.append(position - pattern.reach)
        if pattern.reach is not None and self.query_offset + pattern.reach < last:
            stops.append(position + pattern.reach + 1)
        if pattern.chunk is not None:
            size, padding = pattern.chunk
            counted = position if pattern.positions is None else pattern.positions.to(position.device)
            begin = position - torch.remainder(counted - padding.to(position.device)[:, None], size)
            firsts.append(begin)
            if not pattern.causal:
                stops.append(begin + size)
        first = _combined(firsts, torch.maximum, self.key_offset)
        return first, _combined(stops, torch.minimum, self.key_offset)


PARTS = ("window", "reach", "chunk", "positions", "sequence")
SIMPLE = {
    "causal_mask_function": Pattern(causal=True),
    "bidirectional_mask_function": Pattern(),
}


def read(function: Any) -> Pattern | None:
    """A mask function as a `Pattern`; None if it is not made of transformers' own parts."""
    if getattr(function, "__module__", None) != OWNER:
        return None
    name = function.__qualname__
    if name in SIMPLE:
        return SIMPLE[name]
    if function.__closure__ is None:
        return None
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    maker = name.split(".")[0]
    if maker == "and_masks":
        return _all_of([read(part) for part in held.get("mask_functions", (None,))])
    if maker == "sliding_window_overlay" and isinstance(held.get("sliding_window"), int):
        return Pattern(window=held["sliding_window"])
    if maker == "sliding_window_bidirectional_overlay" and isinstance(held.get("sliding_window"), int):
        return Pattern(reach=held["sliding_window"])
    if maker == "chunked_overlay" and isinstance(held.get("left_padding"), Tensor):
        return Pattern(chunk=(held["chunk_size"], held["left_padding"]))
    if maker == "packed_sequence_mask_function":
        return Pattern(sequence=held.get("packed_sequence_mask"))
    if maker == "remap_positions_for_packed_sequence":
        # Documents hold consecutive positions, so that distances inside one are the same; chunks begin elsewhere.
        inner = read(held.get("mask_function"))
        return None if inner is None else replace(inner, positions=held.get("position_ids"))
    return None


def is_decoder(function: Any) -> bool:
    """Whether a mask function is causal but for what else it shows."""
    held = (
        [] if getattr(function, "__closure__", None) is None else [cell.cell_contents for cell in function.__closure__]
    )
    parts = [part for content in held for part in (content if isinstance(content, tuple) else (content,))]
    return getattr(function, "__qualname__", "") == "causal_mask_function" or any(
        map(is_decoder, filter(callable, parts))
    )


def _all_of(parts: list[Pattern | None]) -> Pattern | None:
    """The pattern of pairs that all parts show."""
    whole = Pattern()
    for part in parts:
        if part is None:
            return None
        for name in PARTS:
            if getattr(part, name) is not None and getattr(whole, name) is not None:
                return None
        held = {name: getattr(part, name) for name in PARTS if getattr(part, name) is not None}
        whole = replace(whole, causal=whole.causal or part.causal, **held)
    return whole


def _combined(parts: list[Tensor], join: Callable[[Tensor, Tensor], Tensor], offset: int) -> Tensor | None:
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = join(whole, part)
    return (whole - offset).int()
