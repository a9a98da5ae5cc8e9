"""Statistics through ``generate``: every forward is measured once, and the steps are put together at the end.

Greedy search and sampling are measured as they run, token by token from the cache. Beam search and assisted decoding
feed rows that are not returned; their statistics come from one more forward over what is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from llama_attn.observe.outputs import GenerateBeamOutputWithAttentionStats, GenerateOutputWithAttentionStats
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.merge import Run
from llama_attn.stats.recorder import Recorder, Step
from llama_attn.stats.segments import add_generated
from llama_attn.stats.visibility import Visibility

SERVED = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)


class GenerationSession:
    """The statistics of one ``generate`` call while it runs. A plain object, so that nobody copies it on the way.

    Args:
        config: What to measure.
        new_recorder: Makes the recorder of one forward from its place in the run.
    """

    def __init__(
        self, config: AttentionStatsConfig, new_recorder: Callable[[AttentionStatsConfig, Step], Recorder]
    ) -> None:
        self.config = config
        self._new_recorder = new_recorder
        self._step: Step | None = None
        self._recorder: Recorder | None = None
        self._fed = 0
        self._first_query = -1
        self.segments: tuple[Tensor, tuple[str, ...]] | None = None

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
        self._run = Run(self.config)
        self._engines: dict[str, None] = {}

    def watch(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria; rows that they end are no longer measured."""
        session = self

        class Watched(StoppingCriteriaList):
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                done = super().__call__(input_ids, scores, **kwargs)
                session._alive = session._alive & ~done.to(session._alive.device)
                return done

        return Watched(criteria)

    def next_recorder(self, input_ids: Tensor) -> Recorder:
        """The recorder of the next forward."""
        self._collect()
        # A chunk of the prompt comes alone, a generated token with all that came before.
        if self._tokens is not None and input_ids.shape[1] > self._tokens.shape[1]:
            self._tokens = input_ids
        rows = None if bool(self._alive.all()) else self._alive
        self._step = Step(first=self._fed, rows=rows, prompt=self.prompt, tokens=self._tokens)
        self._recorder = self._new_recorder(self.config, self._step)
        return self._recorder

    def _collect(self) -> None:
        """Keep what the last forward measured."""
        if self._recorder is None or self._step is None:
            return
        self._recorder.close()
        visibility = self._recorder.visibility
        if self._first_query < 0:
            self._first_query = visibility.first_query
        self._fed = visibility.num_keys
        self._real = visibility.real_keys
        measured = torch.ones_like(self._alive) if self._step.rows is None else self._step.rows
        self._lengths = torch.where(measured, self._fed, self._lengths)
        self._run.add(self._recorder.statistics, self._recorder.records.take_all(), self._fed)
        self._engines |= self._recorder.engines
        self._recorder = None

    def finish(self, device: torch.device) -> AttentionStats:
        """The statistics of the whole run."""
        self._collect()
        batch, fed = len(self._alive), self._fed
        real = self._real.to(self._lengths.device)
        real = real & (torch.arange(fed, device=real.device) < self._lengths[:, None])
        whole = self._new_recorder(self.config, Step(first=0, rows=None, prompt=self.prompt, tokens=self._tokens))
        whole.start(Visibility(batch, self._first_query, fed, real.device, real=real))
        whole.records.put_all(self._run.result(fed))
        whole.engines.update(self._engines)
        return whole.finish(device)


class GeneratesAttentionStats(GenerationMixin):
    """``generate`` with ``output_attention_stats``; a mixin of `LlamaForCausalLM`."""

    def _new_recorder(self, config: AttentionStatsConfig, step: Step | None = None) -> Recorder:
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
        session = GenerationSession(config, self._new_recorder)
        return super().generate(inputs, generation_config, *args, attention_session=session, **kwargs)

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

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        attention_session: GenerationSession | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Upstream's, with the recorder of the next forward among the inputs."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        if attention_session is not None:
            inputs["recorder"] = attention_session.next_recorder(input_ids)
        return inputs

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        # The recorder differs from step to step, and a compiled forward would be compiled anew for each.
        if model_kwargs.get("attention_session") is not None:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        session: GenerationSession | None = kwargs.get("attention_session")
        if session is None:
            return super()._sample(input_ids, logits_processor, stopping_criteria, **kwargs)
        session.begin(input_ids, kwargs.get("inputs_embeds"), kwargs["generation_config"].num_return_sequences or 1)
        outputs = super()._sample(input_ids, logits_processor, session.watch(stopping_criteria), **kwargs)
        return GenerateOutputWithAttentionStats(**outputs, attention_stats=session.finish(outputs.sequences.device))

    def _beam_search(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        session: GenerationSession | None = kwargs.pop("attention_session", None)
        outputs = super()._beam_search(input_ids, *args, **kwargs)
        if session is None:
            return outputs
        stats = self._replay(session, input_ids, outputs.sequences, **kwargs)
        return GenerateBeamOutputWithAttentionStats(**outputs, attention_stats=stats)

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        session: GenerationSession | None = kwargs.pop("attention_session", None)
        outputs = super()._assisted_decoding(input_ids, *args, **kwargs)
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
