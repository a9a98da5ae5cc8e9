"""``record``: statistics of any transformers model, from the attention calls that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from llama_attn.backends._rules import AttentionCall
from llama_attn.backends.registry import Backend
from llama_attn.observe.course import Course, only
from llama_attn.observe.forward import Forward, is_replay
from llama_attn.observe.interface import interfaces_of, unwatch, watch
from llama_attn.observe.plan import Plan
from llama_attn.observe.stacks import candidates, is_cross, name_of, named, stack_of
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import sees_states
from llama_attn.stats.visibility import Visibility


class Recording:
    """What `record` gives: observes a module while its block runs, and holds the statistics."""

    # It stands outside of any graph.
    is_traced = False
    # Recordings that are open, by module and stack.
    _open: list[tuple[nn.Module, str | None]] = []  # noqa: RUF012 (of all recordings)

    def __init__(self, module: nn.Module, config: AttentionStatsConfig, stack: str | None) -> None:
        self._module, self._config, self._stack = module, config, stack
        self.sees_states = sees_states(config)
        self._model = str(getattr(getattr(module, "config", None), "_name_or_path", ""))
        self._chosen = stack
        self._courses: dict[str, Course] = {}
        self._names: dict[nn.Module, str] = {}
        self._seen: dict[str, None] = {}
        self._interfaces: tuple[Any, ...] = ()
        self._state = "new"

    @property
    def stacks(self) -> tuple[str, ...]:
        """The attention stacks of the module by path, those that have been called first."""
        return tuple(dict.fromkeys((*self._seen, *candidates(self._module))))

    @property
    def forwards(self) -> list[AttentionStats]:
        """One `AttentionStats` for every forward of the stack, in order.

        Raises:
            ValueError: There was none, or no stack can be chosen.
        """
        return [past.stats for past in self._course().past]

    @property
    def stats(self) -> AttentionStats:
        """The statistics of the run: of its forward, or of several that go on from one another's cache.

        Raises:
            ValueError: There was no forward, no stack can be chosen, or the forwards are not parts of one run.
        """
        return self._course().merged()

    def __enter__(self) -> Self:
        if self._state != "new":
            raise ValueError("record: this recording has been used; call record again for another")
        if (self._module, self._stack) in self._open:
            raise ValueError(
                f"record: this {type(self._module).__name__} is already being recorded"
                + (f" with stack={self._stack!r}" if self._stack else "")
            )
        paths = dict(self._module.named_modules())
        self._names = {module: name_of(path) for path, module in paths.items()}
        asking = candidates(self._module)
        if self._stack is not None:
            named(self._module, self._stack, asking)
        try:
            for name, module in asking.items():
                if self._stack in (None, name):
                    self._courses[name] = Course(
                        self._module, stack_of(self._module, module), self._config, self._model
                    )
            if len(self._courses) == 1:
                next(iter(self._courses.values())).stack.check(self._config)
        except BaseException:
            self._remove_hooks()
            raise
        self._interfaces = interfaces_of(self._names)
        cross = [module for module, name in self._names.items() if is_cross(name)]
        watch(self._names, self, self._interfaces, cross)
        self._open.append((self._module, self._stack))
        self._state = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
        if error is not None:
            for course in self._courses.values():
                course.drop()
            return
        # Whatever is wrong is said here, not when the statistics are first looked at.
        self._course()

    def close(self) -> None:
        """Stop observing, if it has been begun; what was measured stays, and nothing is said of what was not."""
        if self._state == "open":
            self._leave()

    def check(self) -> None:
        """See whether there is something to observe, without a forward.

        Raises:
            ValueError: There is no such attention, stack or layer.
        """
        if not candidates(self._module):
            raise ValueError(self._why_nothing())
        self.__enter__()
        self._leave()

    def _leave(self) -> None:
        unwatch(self._names, self, self._interfaces)
        self._open.remove((self._module, self._stack))
        self._remove_hooks()
        self._state = "closed"

    def _remove_hooks(self) -> None:
        for course in self._courses.values():
            course.hooks.remove()

    def _course(self) -> Course:
        """The stack whose statistics were asked for, its last forward ended.

        Raises:
            ValueError: Nothing was called, or no stack can be chosen.
        """
        called = [course for name, course in self._courses.items() if name in self._seen]
        if self._chosen is not None:
            called = [course for course in called if course.stack.name == self._chosen]
        if not called:
            raise ValueError(self._why_nothing())
        course = only(called)
        if course.refusal is not None:
            raise course.refusal
        course.end()
        if not course.past:
            raise ValueError(self._why_nothing())
        return course

    def _why_nothing(self) -> str:
        name, asking = type(self._module).__name__, list(candidates(self._module))
        if not asking and not self._seen:
            return (
                f"record: {name} has no attention that goes through transformers' attention interface, so there is "
                "nothing to observe"
            )
        if self._seen:
            return f"record: nothing was measured in {self._chosen!r}; attention was called in {list(self._seen)}"
        if self._stack is not None and self._stack not in asking:
            return f"record: {self._stack!r} called no attention; stacks that do are {asking}"
        return (
            f"record: no attention of {name} was called: the block ran no forward of this very module, or one that "
            f"does not come to {asking}"
        )

    # What the interface asks of an observer.

    def for_call(self, module: nn.Module) -> Self | None:
        """Itself, if the call that ``module`` makes now is to be measured."""
        name = self._names[module]
        if self._state != "open" or is_replay() or self._chosen not in (None, name):
            return None
        if name not in self._courses:
            # Its code did not show that it would ask the interface.
            self._courses[name] = Course(self._module, stack_of(self._module, module), self._config, self._model)
        course, self._seen[name] = self._courses[name], None
        if course.refusal is not None:
            return None
        try:
            return self if course.enter(module) else None
        except ValueError as error:
            self._refuse(course, error)
            return None

    def visibility(self, call: AttentionCall, backend: Backend) -> Visibility | None:
        """Who sees whom; None if that cannot be told in a stack that may not be the one that is wanted."""
        course, forward = self._of(call)
        if self._chosen is None and call.is_decoder:
            self._choose(course)
        course.place(call)
        try:
            return forward.visibility(call, backend)
        except ValueError as error:
            self._refuse(course, error)
            return None

    def planned(self, call: AttentionCall, name: str, backend: Backend) -> Plan | None:
        """How a streaming backend runs the call, and what is measured in its blocks; None where that cannot be told."""
        if self.visibility(call, backend) is None:
            return None
        course, forward = self._of(call)
        try:
            plan = forward.planned(call, name, backend)
        except ValueError as error:
            self._refuse(course, error)
            return None
        # There is more to see in the call.
        return plan._replace(share=plan.share and plan.share._replace(is_all=False))

    def put(self, call: AttentionCall, visibility: Visibility, raw: Mapping[str, Tensor], engine: str) -> None:
        """Keep what was measured there."""
        self._of(call)[1].put(call, visibility, raw, engine)

    def measure(
        self,
        call: AttentionCall,
        name: str,
        visibility: Visibility,
        scores: Scoring,
        output: Tensor,
        prefer: str | None,
    ) -> None:
        """Measure the call, beside its backend what the backend has not."""
        if self._courses[self._names[call.module]].refusal is not None:
            return
        course, forward = self._of(call)
        course.take_states(call.module)
        try:
            forward.measure(call, name, visibility, scores, output, prefer)
        except ValueError as error:
            self._refuse(course, error)
        else:
            course.observe(call, visibility, output)

    def enter_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take the hidden states that come to the layer of ``module``, where that layer shows them itself."""
        course = self._courses.get(self._names[module])
        if course is not None:
            course.hooks.entered[module] = states.detach()

    def leave_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take its output."""
        course = self._courses.get(self._names[module])
        if course is not None and course.forward is not None:
            course.forward.leave_layer(module, states)

    def _of(self, call: AttentionCall) -> tuple[Course, Forward]:
        course = self._courses[self._names[call.module]]
        if course.forward is None:
            raise RuntimeError(f"record: {course.stack.name} was called outside a forward")
        return course, course.forward

    def _refuse(self, course: Course, error: ValueError) -> None:
        """Leave a stack that cannot be measured: perhaps it is not the one that is wanted.

        Raises:
            ValueError: It is.
        """
        if self._chosen is not None:
            raise error
        course.refusal = error
        course.drop()

    def _choose(self, course: Course) -> None:
        """Measure this stack and no other."""
        self._chosen = course.stack.name
        for other in self._courses.values():
            if other is not course:
                other.drop()
                other.past.clear()
                other.hooks.remove()


def record(module: nn.Module, config: AttentionStatsConfig | bool = True, *, stack: str | None = None) -> Recording:
    """Measure attention in any transformers model, or a part or wrapper of one, while a block of code runs.

    What is measured is what its layers hand to transformers' attention interface, on whatever backend. Outputs,
    gradients and the model itself are as they would be without.

    Args:
        module: A model, one of its modules, or what wraps it (PEFT, accelerate, DDP, a pipeline's ``model``).
        config: What to measure; True for the default statistics.
        stack: Which attention layers, by path with # for numbers, as `Recording.stacks` lists them. By default the
            self-attention of the decoder, or the only stack there is.

    Returns:
        A context manager that gives itself, with ``stats``, ``forwards`` and ``stacks``.

    Raises:
        ValueError: There is no such stack or layer, the module is already recorded, or, when the block ends, nothing
            was called. An error of the block itself passes through.

    Examples:
        >>> with record(model) as recording:
        ...     model(**inputs)
        >>> recording.stats["entropy"].shape  # layer, batch, head, query
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    chosen = AttentionStatsConfig.from_argument(config, "config")
    if chosen is None:
        raise ValueError(f"config: expected True or an AttentionStatsConfig, got {config!r}")
    return Recording(module, chosen, stack)
