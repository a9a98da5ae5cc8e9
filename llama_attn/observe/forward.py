"""One forward of one attention stack, as it is observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llama_attn.backends._rules import AttentionCall, has_own_scores
from llama_attn.backends.registry import Backend
from llama_attn.engines import assign, choose_engine
from llama_attn.engines._operator import extent_of, walk
from llama_attn.observe import projection
from llama_attn.observe.interface import TRANSFORMERS_OWN, unwatch, watch
from llama_attn.observe.plan import Plan
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.labelling import Origin, label
from llama_attn.stats.merge import Measured
from llama_attn.stats.parallel import HeadShard
from llama_attn.stats.recorder import LAST, Recorder
from llama_attn.stats.scoring import Scoring
from llama_attn.stats.selection import sees_outputs, sees_states
from llama_attn.stats.spans import VECTORS
from llama_attn.stats.step import Step
from llama_attn.stats.table import Statistic
from llama_attn.stats.visibility import Visibility


@dataclass(frozen=True)
class Stack:
    """The attention layers of one kind of a model, e.g. the self-attention of its decoder.

    Args:
        name: Their path, with # for numbers.
        layers: Index and path of each module.
        num_layers: How many layers the model has there, those without attention included.
        cross: Whether they attend to another sequence.
        without: Layers of the model that have no attention of any kind.
    """

    name: str
    layers: Mapping[nn.Module, tuple[int, str]]
    num_layers: int
    cross: bool = False
    without: tuple[int, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        """Indices of the layers."""
        return tuple(index for index, _ in self.layers.values())

    def check(self, config: AttentionStatsConfig) -> None:
        """Refuse layers that are not there.

        Raises:
            ValueError: The configuration names one.
        """
        unknown = [layer for layer in config.layers or () if layer not in self.indices]
        if not unknown:
            return
        without = [layer for layer in unknown if layer < self.num_layers]
        if without:
            raise ValueError(
                f"layers: {without} of {self.name!r} have no attention; those that have it are {list(self.indices)}"
            )
        config.selected("layers", self.num_layers)


class Forward:
    """Observes one forward of a stack.

    Args:
        config: What to measure.
        stack: Where.
        model: Name or path of the model.
        step: Its place in a run of several.
        must_be_complete: Whether a layer that does not run is an error.
    """

    def __init__(
        self,
        config: AttentionStatsConfig,
        stack: Stack,
        model: str = "",
        step: Step | None = None,
        *,
        must_be_complete: bool = False,
    ) -> None:
        self.config, self.stack, self.model, self.must_be_complete = config, stack, model, must_be_complete
        self.layers = stack.indices if config.layers is None else config.layers
        self.shard: HeadShard | None = None
        if stack.layers:
            self.shard = HeadShard.of_attention(next(iter(stack.layers)))
        self.recorder = Recorder(
            config, layers=self.layers, assign=_Assign(config.engine), walk=walk, step=step, shard=self.shard
        )
        self.is_closed = False
        # Whether it is part of a graph that is being compiled, and sees its calls there.
        self.is_traced = torch.compiler.is_compiling()
        self.sees_states = sees_states(config)
        self._sees_outputs = sees_outputs(config)
        self._calls = 0
        # Queries that have attended to the same keys of another sequence before.
        self.queries_before = 0
        self.backend = ""
        # Of the first call: where the forward stands among others.
        self.visibility_of_first: Visibility | None = None
        self._visibilities: dict[tuple[Any, ...], tuple[Any, Visibility]] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._traced: tuple[Any, Visibility] | None = None
        self._paths: dict[int, str] = {}
        self._finished: tuple[torch.device, AttentionStats] | None = None
        # Hidden states that came to a layer whose attention has not been called yet.
        self._entered: dict[int, Tensor] = {}

    def layer_of(self, module: nn.Module) -> int:
        """The index of a layer."""
        return self.stack.layers[module][0]

    def for_call(self, module: nn.Module) -> Forward | None:
        """Itself, if the call that ``module`` makes now is measured: never when it is over, or runs again for the backward."""
        return self if not self.is_closed and self.stack.layers[module][0] in self.layers and not is_replay() else None

    def count_call(self, module: nn.Module, *, from_zero: bool) -> None:
        """Take one more call of a module that a forward calls several times: each is a layer, in the order of calls.

        Args:
            module: The module.
            from_zero: Whether the first call is layer 0 whatever the module's path says.
        """
        index, path = self.stack.layers[module]
        if self._calls or from_zero:
            index = self._calls
        self._calls += 1
        self.stack = replace(
            self.stack, layers={**self.stack.layers, module: (index, path)},
            num_layers=max(self.stack.num_layers, self._calls),
        )  # fmt: skip
        self.layers = tuple(range(self._calls)) if self.config.layers is None and self._calls > 1 else self.layers

    def visibility(self, call: AttentionCall, backend: Backend) -> Visibility:
        """Who sees whom, the same object for every layer with the same mask."""
        if call.sight is not None:
            return self._known(call, call.sight)
        if self.is_traced:
            # A graph keeps its lengths open, which a key of a dict would fix.
            if self._traced is None or self._traced[0] is not call.mask:
                self._traced = call.mask, backend.sees(call)
            return self._traced[1]
        # The mask is kept beside, so that no other takes its identity.
        key = (id(call.mask), call.num_queries, call.num_slots, call.is_causal, call.key.device, backend.name)
        if key not in self._visibilities:
            self._visibilities[key] = call.mask, self._continued(call, backend.sees(call))
        return self._visibilities[key][1]

    def _known(self, call: AttentionCall, sight: Visibility) -> Visibility:
        """The first visibility that was told in the same numbers and the same vectors."""
        vectors = tuple(
            None if (v := getattr(sight, name)) is None else (v.data_ptr(), v.shape, v.stride()) for name in VECTORS
        )
        key = (*extent_of(sight), *vectors)
        if key not in self._visibilities:
            self._visibilities[key] = sight, self._continued(call, sight)
        return self._visibilities[key][1]

    def _continued(self, call: AttentionCall, visibility: Visibility) -> Visibility:
        """The same, its queries counted on from those that have attended to the same other sequence before."""
        if not call.cross or not (before := self.queries_before):
            return visibility
        return replace(visibility, first_query=before, stop_query=before + call.num_queries)

    def planned(self, call: AttentionCall, name: str, backend: Backend) -> Plan:
        """How a streaming backend runs the call, and what is measured in its blocks."""
        options = call.options
        # A graph keeps its lengths open, which a key of a dict would fix.
        if self.is_traced or call.sight is not None or self.config.kept is not None or has_own_scores(options):
            plan = self._plan(call, backend)
        else:
            # Found out once for all layers that make the same call.
            alike = (
                id(call.mask), call.query.shape, call.key.shape, call.key.device, call.is_causal, backend.name,
                options.get("scaling"), options.get("softcap"),
            )  # fmt: skip
            if (known := self._plans.get(alike)) is None:
                known = self._plans[alike] = self._plan(call, backend)
            plan = known
        self._started(call, name, plan.visibility)
        return plan

    def _plan(self, call: AttentionCall, backend: Backend) -> Plan:
        plan = Plan.of(call, backend, self.visibility(call, backend))
        layer, (visibility, scores, engine, _) = self.layer_of(call.module), plan
        share = self.recorder.fused(layer, call.query, call.key, visibility, scores, engine)
        return plan._replace(share=share._replace(is_all=False) if share and self.sees_states else share)

    def put(self, call: AttentionCall, visibility: Visibility, raw: Mapping[str, Tensor], engine: str) -> None:
        """Keep what was measured there."""
        heads = call.query.shape[1], call.key.shape[1]
        self.recorder.put(self.layer_of(call.module), visibility, heads, raw, engine)

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
        self._started(call, name, visibility)
        layer = self.layer_of(call.module)
        # A layer may say itself what takes its output.
        output_layer = getattr(call.module, "output_projection", None) if self._sees_outputs else None
        weight = None if output_layer is None else projection.by_head(output_layer, call.query.shape[1], call.value)
        self.recorder.measure(layer, call.query, call.key, call.value, visibility, scores, weight, prefer)
        if layer in self._entered:
            self._record_hidden(layer, self._entered.pop(layer), visibility)

    def enter_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take the hidden states that come to the layer of a module; they are measured with its attention."""
        if not self.sees_states:
            return
        layer = self.layer_of(module)
        if not self.is_closed and layer in self.layers and not is_replay():
            self._entered[layer] = states.detach()

    def leave_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take the output of the layer of a module, if it is the last."""
        if self.layer_of(module) == self.stack.num_layers - 1:
            self.leave_last_layer(states)

    def leave_last_layer(self, states: Tensor) -> None:
        """Take the output of the last layer."""
        if self.sees_states and not self.is_closed and self.visibility_of_first is not None and not is_replay():
            self._record_hidden(LAST, states, self.visibility_of_first)

    def take_projection(self, module: nn.Module, leaf: nn.Module, value: Tensor, visibility: Visibility) -> None:
        """Measure values behind the projection that was seen to take the attention's output."""
        layer = self.layer_of(module)
        weight = projection.by_head(leaf, self.recorder.heads_held[layer], value)
        self.recorder.measure_outputs(layer, value, visibility, weight)

    def _record_hidden(self, layer: int, states: Tensor, visibility: Visibility) -> None:
        if states.shape[:2] == (visibility.batch, visibility.num_queries):
            self.recorder.record_hidden(layer, states.detach(), visibility)

    def _started(self, call: AttentionCall, name: str, visibility: Visibility) -> None:
        """Remember where the layer lies, and of the first one how the forward stands among others.

        Raises:
            ValueError: The layer's weights are parts of those of a larger layer, in a way that is not known.
        """
        layer, path = self.stack.layers[call.module]
        self._paths[layer] = path
        if self.visibility_of_first is not None:
            return
        self.visibility_of_first, self.backend = visibility, name
        if self.shard is None and HeadShard.is_unknown(call.module):
            raise ValueError(
                f"layer {layer}: attention holds {call.query.shape[1]} heads of a layer that is split in a way that "
                "statistics do not know; tensor parallelism needs q_proj colwise and o_proj rowwise"
            )

    def close(self) -> None:
        """Measure nothing more: under gradient checkpointing the layers run again in the backward."""
        self.is_closed = True
        self._visibilities.clear()
        self._plans.clear()
        self._entered.clear()

    def measured(self) -> Measured:
        """Close the forward; its raw numbers.

        Raises:
            RuntimeError: A layer did not report, so the numbers would be incomplete.
            ValueError: A statistic was named that the model cannot give.
        """
        self.close()
        measured = self.recorder.measured()
        ran = {layer for group in measured.groups for layer in group.layers}
        expected = self.layers if self.must_be_complete else self.config.layers or ()
        if missing := [layer for layer in expected if layer not in ran]:
            raise RuntimeError(f"layers {missing} of {self.stack.name!r} did not report; {sorted(ran)} did")
        return measured

    @property
    def origin(self) -> Origin:
        """Where the numbers come from."""
        return Origin(
            num_layers=self.stack.num_layers, backend=self.backend, model=self.model, stack=self.stack.name,
            paths=tuple(self._paths.items()), shard=self.shard, without_attention=self.stack.without,
        )  # fmt: skip

    def finish(self, device: torch.device) -> AttentionStats:
        """Close the forward and label what it measured; whoever asks again for the same device gets the same.

        Args:
            device: Where the numbers end, unless they are offloaded.
        """
        if self._finished is None or self._finished[0] != device:
            measured, segments = self.measured(), self.recorder.segment_names
            self._finished = device, label(measured, self.config, self.origin, device, segments=segments)
        return self._finished[1]


class _Assign:
    """Which engine measures what in a call: the one that is named, else that of the backend or the device."""

    def __init__(self, engine: str | None) -> None:
        self.engine = engine

    def __call__(
        self, statistics: Sequence[Statistic], visibility: Visibility, scores: Scoring, prefer: str | None = None
    ) -> dict[str, tuple[Statistic, ...]]:
        engine = choose_engine(self.engine, visibility, scores, visibility.device, default=prefer)
        return assign(statistics, visibility.device, engine)


def is_replay() -> bool:
    """Whether a layer runs again for the backward of a checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Observed:
    """Observes one forward of a stack while its block runs.

    Args:
        forward: The observer.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self._modules = tuple(forward.stack.layers)

    def __enter__(self) -> Forward:
        watch(self._modules, self.forward, TRANSFORMERS_OWN)
        return self.forward

    def __exit__(self, *error: object) -> None:
        unwatch(self._modules, self.forward, TRANSFORMERS_OWN)
        self.forward.close()
