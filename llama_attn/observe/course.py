"""The forwards of one attention stack, one after another, and whether they go on from one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llama_attn.backends._rules import AttentionCall
from llama_attn.observe.forward import Forward, Stack
from llama_attn.observe.hidden import Hooks
from llama_attn.observe.stacks import is_shared
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.labelling import label
from llama_attn.stats.merge import Run
from llama_attn.stats.step import Step
from llama_attn.stats.visibility import Visibility

# Keys of other tokens differ by as much as they are large.
ROUNDING = 0.1


@dataclass(frozen=True, eq=False)
class Link:
    """What shows that one forward goes on from another's cache: the last key of its first layer, and its place.

    Args:
        batch: Rows.
        first: Position of the first query [token].
        length: Position behind the last key [token].
        stop: Position behind the last query [token].
        keys: From the last key that was there before to the last, (batch, kv_head, key, channel).
        offset: Position of the first of these [token].
        storage: Where the keys lie; those of another sequence stay there from step to step.
        cross: Whether they are of another sequence.
    """

    batch: int
    first: int
    length: int
    stop: int
    keys: Tensor
    offset: int
    storage: int
    cross: bool

    @classmethod
    def of(cls, call: AttentionCall, visibility: Visibility) -> Link:
        """Of the first call of a forward. A static cache hands out live memory, so what is kept is a copy."""
        last = max(0, visibility.num_keys - visibility.num_queries - 1)
        return cls(
            visibility.batch,
            visibility.offset + visibility.first_query,
            visibility.offset + visibility.num_keys,
            visibility.offset + visibility.first_query + visibility.num_queries,
            call.key.detach()[:, :, last : visibility.num_keys].clone(),
            visibility.offset + last,
            call.key.data_ptr(),
            call.cross,
        )

    def follows(self, earlier: Link) -> str | None:
        """Why this forward does not go on from an ``earlier`` one; None if it does."""
        if self.batch != earlier.batch:
            return f"it has {self.batch} rows after {earlier.batch}"
        if self.cross:
            return None if self.storage == earlier.storage else "its keys are others"
        if self.first != earlier.length:
            return f"it begins at token {self.first}, and {earlier.length} were there"
        if not self.first:
            return "it begins anew"
        at = earlier.length - 1 - self.offset
        if not 0 <= at < self.keys.shape[2]:
            return "its cache does not hold the last token of the one before"
        # Keys that are made anew from a compressed cache are rounded otherwise.
        now, then = self.keys[:, :, at].float(), earlier.keys[:, :, -1].float()
        close = torch.linalg.vector_norm(now - then) <= ROUNDING * torch.linalg.vector_norm(then)
        return None if bool(close) else "its cache holds other keys"


class Past:
    """A forward that is over.

    Args:
        forward: The forward.
        device: Where its numbers end.
        link: How it stands to others.
    """

    def __init__(self, forward: Forward, device: torch.device, link: Link) -> None:
        self.forward, self.device, self.link = forward, device, link
        self.measured = forward.measured()
        self._stats: AttentionStats | None = None

    @property
    def tokens(self) -> Tensor | None:
        """Token ids of all its keys, (batch, key), as far as they are known."""
        return self.forward.recorder.known_tokens

    @property
    def stats(self) -> AttentionStats:
        """Its statistics, made when they are first asked for."""
        if self._stats is None:
            forward, segments = self.forward, self.forward.recorder.segment_names
            self._stats = label(self.measured, forward.config, forward.origin, self.device, segments=segments)
        return self._stats


class Course:
    """The forwards of one stack.

    Args:
        root: The module that is recorded.
        stack: The attention layers.
        config: What to measure.
        model: Name or path of the model.
    """

    def __init__(self, root: nn.Module, stack: Stack, config: AttentionStatsConfig, model: str) -> None:
        self.stack, self.forward = stack, None
        self._config, self._model = config, model
        self.past: list[Past] = []
        # Why it cannot be measured.
        self.refusal: ValueError | None = None
        self._called: set[nn.Module] = set()
        self._last_called: nn.Module | None = None
        self._link: Link | None = None
        self._device = torch.device("cpu")
        # A forward ends where a module is called again. Where one forward calls a module several times, it ends where
        # the model that holds it begins another.
        self._is_shared = is_shared(root, stack)
        self._brackets = self._is_shared or len(stack.layers) == 1
        self.hooks = Hooks(root, stack, config, self, brackets=self._brackets)

    forward: Forward | None

    def enter(self, module: nn.Module) -> bool:
        """Take a call of a module of the stack; whether it is to be measured.

        Raises:
            ValueError: One forward calls a layer several times.
        """
        again = module in self._called
        if self.hooks.sees_forwards:
            again = self.hooks.has_entered()
        elif again and self._is_shared:
            raise ValueError(
                f"record: layers of {self.stack.name!r} share a module, and in a compiled model it cannot be seen where one "
                "forward ends; record the model as it is"
            )
        if again and not self._brackets and module is self._last_called:
            raise ValueError(
                f"record: {type(module).__name__} calls attention several times in one forward (once per image, window "
                f"or part), so that there is no attention of a layer of {self.stack.name!r}"
            )
        if self.forward is None or again:
            self.end()
            self._called = set()
            stack = replace(self.stack, layers=dict(self.stack.layers)) if self._brackets else self.stack
            step = Step(tokens=self.hooks.tokens, earlier_tokens=self.past[-1].tokens if self.past else None)
            self.forward = Forward(self._config, stack, self._model, step)
        if self._brackets:
            self.forward.count_call(module, from_zero=self._is_shared)
        self._called.add(module)
        self._last_called = module
        return self.forward.for_call(module) is not None

    def place(self, call: AttentionCall) -> None:
        """Count the queries of cross-attention on, if the keys are those of the forward before."""
        if call.cross and self._link is None and self.past and self.forward is not None:
            earlier = self.past[-1].link
            if earlier.storage == call.key.data_ptr() and earlier.batch == call.query.shape[0]:
                self.forward.queries_before = earlier.stop

    def observe(self, call: AttentionCall, visibility: Visibility, output: Tensor) -> None:
        """See what else a call shows: how the forward stands to others, and what goes in and out of its layer."""
        if self.forward is None:
            return
        if self._link is None:
            self._link, self._device = Link.of(call, visibility), call.key.device
        self.hooks.expect(call.module, output, call.value, visibility)

    def take_states(self, module: nn.Module) -> None:
        """Hand over the hidden states that came to the layer of a module."""
        if self.forward is not None and (states := self.hooks.states_of(module)) is not None:
            self.forward.enter_layer(module, states)

    def end(self) -> None:
        """The forward that runs is over."""
        forward, link = self.forward, self._link
        self.forward = self._link = None
        if forward is not None and link is not None:
            self.past.append(Past(forward, self._device, link))

    def drop(self) -> None:
        """Forget the forward that runs, which an error ended."""
        if self.forward is not None:
            self.forward.close()
        self.forward = self._link = None

    def merged(self) -> AttentionStats:
        """The statistics of the run.

        Raises:
            ValueError: A forward does not go on from the one before.
        """
        if len(self.past) == 1:
            return self.past[0].stats
        for at, (earlier, later) in enumerate(zip(self.past, self.past[1:], strict=False), 2):
            if (reason := later.link.follows(earlier.link)) is not None:
                raise ValueError(
                    f"stats: forward {at} of {len(self.past)} does not go on from the one before: {reason}; "
                    "`recording.forwards` has the statistics of each"
                )
        run = Run(self._config)
        for past in self.past:
            run.add(past.measured)
        last = self.past[-1]
        segments = last.forward.recorder.segment_names
        return label(run.result(), self._config, last.forward.origin, last.device, segments=segments)


def only(courses: Sequence[Course]) -> Course:
    """The one stack that was seen.

    Raises:
        ValueError: There are several.
    """
    if len(courses) == 1:
        return courses[0]
    names = [course.stack.name for course in courses]
    raise ValueError(
        f"stack: none of them is a decoder's self-attention, so choose one: record(module, stack=…) of {names}"
    )
