"""Statistics through ``generate``: every forward is measured once, and the steps are put together at the end.

Greedy search and sampling are measured as they run, token by token from the cache. Beam search and assisted decoding
feed rows that are not returned; their statistics come from one more forward over what is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from llama_attn.observe.forward import Forward
from llama_attn.observe.interface import TRANSFORMERS_OWN, unwatch, watch
from llama_attn.observe.outputs import GenerateBeamOutputWithAttentionStats, GenerateOutputWithAttentionStats
from llama_attn.observe.pipelining import refuse_pipeline
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.keep import with_later
from llama_attn.stats.labelling import label
from llama_attn.stats.merge import Run
from llama_attn.stats.segments import GENERATED, add_generated
from llama_attn.stats.selection import sees_states
from llama_attn.stats.step import Step

SERVED = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)


class GenerationSession:
    """Observes every forward of one ``generate`` call.

    Args:
        config: What to measure.
        observe: Makes the observer of one forward from its place in the run.
    """

    # It stands outside of any graph.
    is_traced = False

    def __init__(self, config: AttentionStatsConfig, observe: Callable[[AttentionStatsConfig, Step], Forward]) -> None:
        self.config, self._observe, self.sees_states = config, observe, sees_states(config)
        self._step = Step()
        self._forward: Forward | None = None
        self._called: set[nn.Module] = set()
        self._fed = 0
        self._real: Tensor | None = None
        self.segments: tuple[Tensor, tuple[str, ...]] | None = None
        self.modules = tuple(observe(config, Step()).stack.layers)

    def begin(self, input_ids: Tensor, inputs_embeds: Tensor | None, repeats: int) -> None:
        """Take the prompt of every row that will be returned.

        Args:
            input_ids: Prompt ids, (batch, prompt); empty with embeddings.
            inputs_embeds: Prompt embeddings in place of ids.
            repeats: How many rows share each prompt.
        """
        self.prompt = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        self._tokens = input_ids if inputs_embeds is None else None
        self._alive = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._lengths = torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        shape = (input_ids.shape[0] // repeats, self.prompt)
        labels, names = self.config.segments_of(shape, input_ids.device)
        if labels is not None and names is not None:
            self.segments = labels.repeat_interleave(repeats, dim=0), names
            self.config = replace(self.config, segments=self.segments)
        if (keep := self.config.kept) is not None and keep.shape[1] == shape[0]:
            self.config = replace(self.config, keep=keep.repeat_interleave(repeats, dim=1))
        self._run = Run(self.config)

    def watch(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria; rows that they end are no longer measured."""
        return _Watched(self, criteria)

    def end_rows(self, done: Tensor, tokens: Tensor) -> None:
        """Take which rows have ended, (batch,), and all tokens so far, (batch, token)."""
        self._alive = self._alive & ~done.to(self._alive.device)
        if self._tokens is not None:
            self._tokens = tokens

    def _next(self) -> Forward:
        """The observer of the next forward."""
        self._collect()
        rows = None if bool(self._alive.all()) else self._alive
        self._step = Step(first=self._fed, rows=rows, prompt=self.prompt, tokens=self._tokens)
        self._forward = self._observe(self.config, self._step)
        self._called = set()
        return self._forward

    def _collect(self) -> None:
        """Keep what the last forward measured."""
        forward, self._forward = self._forward, None
        if forward is None or forward.visibility_of_first is None:
            return
        visibility = forward.visibility_of_first
        self._fed, self._real = visibility.length, visibility.real_keys
        measured = torch.ones_like(self._alive) if self._step.rows is None else self._step.rows
        self._lengths = torch.where(measured, self._fed, self._lengths)
        self._run.add(forward.measured())
        self._last = forward

    def finish(self, device: torch.device) -> AttentionStats:
        """The statistics of the whole run."""
        self._collect()
        real = None
        if self._real is not None and self._real.shape[1] == self._fed:
            real = self._real.to(self._lengths.device)
            real = real & (torch.arange(self._fed, device=real.device) < self._lengths[:, None])
        names = self._last.recorder.segment_names
        return label(self._run.result(), self.config, self._last.origin, device, segments=names, real_keys=real)

    # What the interface asks of an observer.

    def for_call(self, module: nn.Module) -> Forward | None:
        """The forward that measures the call that ``module`` makes now, if it is to be measured."""
        forward = self._current(module)
        self._called.add(module)
        return forward.for_call(module)

    def enter_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take the hidden states that come to the layer of ``module``."""
        self._current(module).enter_layer(module, states)

    def _current(self, module: nn.Module) -> Forward:
        """The forward that runs; a module that was called in it begins the next."""
        return self._next() if self._forward is None or module in self._called else self._forward

    def leave_layer(self, module: nn.Module, states: Tensor) -> None:
        """Take the output of the layer of ``module``."""
        if self._forward is None:
            raise RuntimeError("generate: a layer was left outside of a forward")
        self._forward.leave_layer(module, states)


class _Watched(StoppingCriteriaList):
    """Stopping criteria that tell a session what they say.

    Not defined where the session is at hand: a class refers to itself, and would keep what it knows.
    """

    def __init__(self, session: GenerationSession, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self._session = session

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self._session.end_rows(done, input_ids)
        return done


_session: ContextVar[GenerationSession | None] = ContextVar("session", default=None)


class GeneratesAttentionStats(GenerationMixin):
    """``generate`` with ``output_attention_stats``; a mixin of `LlamaForCausalLM`."""

    def observe(self, config: AttentionStatsConfig, step: Step) -> Forward:
        """An observer of one forward."""
        raise NotImplementedError

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        output_attention_stats: AttentionStatsConfig | bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upstream's generate; on request its output carries ``attention_stats`` of the whole run.

        The query axis holds the prompt and every token that was fed back. A row's tokens after its end are padding.

        Args:
            inputs: Prompt ids.
            generation_config: How to generate.
            *args: Passed on to upstream.
            output_attention_stats: True or an `AttentionStatsConfig`.
            **kwargs: Passed on to upstream.

        Raises:
            ValueError: Statistics without ``return_dict_in_generate=True``, or in a mode that cannot give them.
        """
        config = AttentionStatsConfig.from_argument(output_attention_stats)
        if config is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        prepared, _ = self._prepare_generation_config(generation_config, **kwargs)
        mode = prepared.get_generation_mode(kwargs.get("assistant_model"))
        if not prepared.return_dict_in_generate:
            raise ValueError(
                "output_attention_stats: generate has nowhere to put them without return_dict_in_generate=True"
            )
        if mode not in SERVED or kwargs.get("custom_generate") is not None:
            raise ValueError(f"output_attention_stats: not served in the generation mode {mode.value!r}")
        if prepared.cache_implementation == "paged":
            raise ValueError("output_attention_stats: continuous batching returns tokens only; use another cache")
        refuse_pipeline(self)
        session = GenerationSession(config, self.observe)
        token = _session.set(session)
        try:
            return super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            _session.reset(token)

    def generate_batch(
        self, *args: Any, output_attention_stats: AttentionStatsConfig | bool | None = None, **kwargs: Any
    ) -> Any:
        """Upstream's continuous batching.

        Raises:
            ValueError: Statistics were asked for; continuous batching returns tokens only.
        """
        if AttentionStatsConfig.from_argument(output_attention_stats) is not None:
            raise ValueError("output_attention_stats: continuous batching returns tokens only; use generate")
        return super().generate_batch(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        # What is observed differs from step to step, and a compiled forward would be compiled anew for each.
        if _session.get() is not None:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        session = _session.get()
        if session is None:
            return super()._sample(input_ids, logits_processor, stopping_criteria, **kwargs)
        session.begin(input_ids, kwargs.get("inputs_embeds"), kwargs["generation_config"].num_return_sequences or 1)
        watch(session.modules, session, TRANSFORMERS_OWN)
        try:
            outputs = super()._sample(input_ids, logits_processor, session.watch(stopping_criteria), **kwargs)
        finally:
            unwatch(session.modules, session, TRANSFORMERS_OWN)
        return GenerateOutputWithAttentionStats(**outputs, attention_stats=session.finish(outputs.sequences.device))

    def _beam_search(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._beam_search(input_ids, *args, **kwargs)
        if (session := _session.get()) is None:
            return outputs
        stats = self._replay(session, input_ids, outputs.sequences, **kwargs)
        return GenerateBeamOutputWithAttentionStats(**outputs, attention_stats=stats)

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The assistant generates too.
        session = _session.get()
        token = _session.set(None)
        try:
            outputs = super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            _session.reset(token)
        if session is None:
            return outputs
        stats = self._replay(session, input_ids, outputs.sequences, **kwargs)
        return GenerateOutputWithAttentionStats(**outputs, attention_stats=stats)

    def _replay(
        self,
        session: GenerationSession,
        input_ids: Tensor,
        sequences: Tensor,
        *,
        generation_config: GenerationConfig,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> AttentionStats:
        """One forward over the returned ``sequences``, whose prompts have been expanded to beams."""
        beams, returned = generation_config.num_beams or 1, generation_config.num_return_sequences or 1

        def of_returned(rows: Tensor) -> Tensor:
            return rows[::beams].repeat_interleave(returned, dim=0)

        embeds = None if inputs_embeds is None else of_returned(inputs_embeds)
        session.begin(of_returned(input_ids), embeds, returned)
        batch, generated = sequences.shape[0], sequences[:, input_ids.shape[1] :]
        # What was fed: the prompt and each row's new tokens up to its end, but the last.
        ended = torch.isin(generated, generation_config._eos_token_tensor) if _has_eos(generation_config) else None
        fed = torch.ones_like(generated, dtype=torch.long)
        if ended is not None:
            fed = (ended.long().cumsum(-1) == 0).long()
        prompt = torch.ones(batch, session.prompt, dtype=torch.long, device=sequences.device)
        if attention_mask is not None:
            prompt = of_returned(attention_mask[:, : session.prompt]).long()
        mask = torch.cat([prompt, fed[:, :-1]], dim=-1)
        inputs: dict[str, Any] = {"input_ids": sequences[:, :-1]}
        if embeds is not None:
            new = self.get_input_embeddings()(generated[:, :-1])
            inputs = {"inputs_embeds": torch.cat([embeds.to(new), new], dim=1)}
        config = session.config
        if session.segments is not None:
            config = replace(config, segments=add_generated(*session.segments, mask.shape[1]))
        if config.kept is not None:
            config = replace(config, keep=with_later(config.kept, mask.shape[1]))
        if config.rows == GENERATED:
            config = replace(config, rows=slice(session.prompt - 1, None))
        outputs = self(
            **inputs,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
            output_attention_stats=config,
        )
        return replace(outputs.attention_stats, replayed=True)


def _has_eos(generation_config: GenerationConfig) -> bool:
    return generation_config._eos_token_tensor is not None
