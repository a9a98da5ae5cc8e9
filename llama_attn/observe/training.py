"""Attention statistics while a model trains: a callback for transformers' ``Trainer``.

A callback cannot reach the reporters by itself: the integrations stand before it in the Trainer's list of callbacks,
so what it adds to the ``logs`` of ``on_log`` comes after TensorBoard has written and after ``log_history`` has taken
its copy. The public way is ``trainer.log``, so the callback is given its trainer, as TRL's callbacks are.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_attn.modeling_llama import LlamaModel, new_recorder
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.recorder import Recorder

logger = logging.getLogger(__name__)

# How each statistic is summed up: over heads and queries, then over processes, then over layers.
_REDUCE: dict[str, Callable[..., Tensor]] = {"entropy": torch.mean, "max_logit": torch.amax, "sink_mass": torch.mean}
_OVERALL = {"entropy": "mean", "max_logit": "max", "sink_mass": "mean"}


class AttentionStatsCallback(TrainerCallback):
    """Logs what attention does in training, and warns of collapsed entropy and exploding logits.

    Every so many optimizer steps the first micro batch is measured in the forward that trains on it: no forward is
    added, and loss and gradients keep their bits. (``torch.compile`` makes a graph of its own for the measured step,
    which may round differently.) Between those steps the model is untouched. Means are over heads and queries without
    padding; on several processes, over those too.

    The numbers go through ``trainer.log``, so to ``state.log_history`` and everything in ``report_to``:
    ``attention/entropy/layer_03``, ``attention/max_logit/layer_03``, ``attention/sink_mass/layer_03`` and so on, and
    over layers ``attention/entropy/mean``, ``attention/max_logit/max``, ``attention/sink_mass/mean``. The warnings go
    to the logger ``llama_attn.observe.training``, one line per measured step.

    Args:
        trainer: The trainer that the callback is added to.
        every: Measure each so many optimizer steps.
        entropy_threshold: Warn of layers whose mean entropy is below it [nat]; ``None`` never.
        logit_threshold: Warn of layers whose largest scaled score is above it [logit]; ``None`` never.
        layers: Layer indices to measure; ``None`` for all.
        sink_tokens: Number of real keys at the start of a sequence that count as the sink [tokens].
        query_stride: Measure queries 0, s, 2s … of the row only.

    Raises:
        TypeError: ``trainer`` is not a ``Trainer``.
        ValueError: A number that is not positive, or layers that are not indices.

    Source:
        Entropy collapse goes with unstable training: Zhai et al. 2023, arXiv 2303.06296. The threshold of 100 for
        logits is that of QK-Clip: Kimi K2, arXiv 2507.20534.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=dataset)
        >>> trainer.add_callback(AttentionStatsCallback(trainer, every=100))
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 100,
        entropy_threshold: float | None = 0.1,
        logit_threshold: float | None = 100.0,
        layers: tuple[int, ...] | None = None,
        sink_tokens: int = 1,
        query_stride: int = 1,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer: expected the transformers.Trainer to report through, got {trainer!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a positive integer, got {every!r}")
        self.trainer, self.every = trainer, every
        self.entropy_threshold = _threshold("entropy_threshold", entropy_threshold)
        self.logit_threshold = _threshold("logit_threshold", logit_threshold)
        self.config = AttentionStatsConfig(
            statistics=tuple(_REDUCE), layers=layers, sink_tokens=sink_tokens, query_stride=query_stride
        )
        self._handles: list[RemovableHandle] = []
        self._measured: Tensor | None = None
        self._layers: tuple[int, ...] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the model can be measured.

        Raises:
            ValueError: The model is not llama_attn's, or lacks one of the layers.
        """
        # A run that ended in an error, or restarts with a smaller batch, never came to its end.
        self._unhook()
        config = _decoder(kwargs["model"]).config
        self._layers = self.config.selected("layers", config.num_hidden_layers)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the next forward measured, if this step is one to measure."""
        # The step counts once it is done.
        if (state.global_step + 1) % self.every:
            return
        decoder = _decoder(kwargs["model"])
        self._handles = [
            decoder.register_forward_pre_hook(self._add_recorder, with_kwargs=True),
            decoder.register_forward_hook(self._take_recorder, with_kwargs=True),
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what the step measured.

        Raises:
            RuntimeError: Nothing was measured.
        """
        if state.global_step % self.every:
            return
        if self._measured is None:
            raise RuntimeError(
                f"step {state.global_step}: nothing was measured: the step called llama_attn's LlamaModel without "
                "gradients, with an output_attention_stats of its own, or not at all"
            )
        processes = self.trainer.accelerator.gather(self._measured[None])
        self._measured = None
        logs: dict[str, float] = {}
        values: dict[str, dict[int, float]] = {}
        for index, (name, reduce) in enumerate(_REDUCE.items()):
            layers = reduce(processes[:, index], 0)
            values[name] = dict(zip(self._layers, layers.tolist(), strict=True))
            logs |= {f"attention/{name}/layer_{layer:02d}": value for layer, value in values[name].items()}
            logs[f"attention/{name}/{_OVERALL[name]}"] = reduce(layers, 0).item()
        if state.is_world_process_zero:
            self._warn(state.global_step, values)
        # Logging takes the flag back, and with it the Trainer's own log of this step.
        should_log = control.should_log
        self.trainer.log(logs)
        control.should_log = should_log

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self._unhook()

    def _add_recorder(
        self, decoder: LlamaModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Forwards without gradients (a reference policy, generation) are not what the step trains on.
        if not torch.is_grad_enabled() or kwargs.get("recorder") is not None:
            return None
        return args, kwargs | {"recorder": new_recorder(self.config, decoder)}

    def _take_recorder(self, decoder: LlamaModel, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        recorder: Recorder | None = kwargs.get("recorder")
        # One that the caller asked for himself is not ours to finish.
        if recorder is None or recorder.config is not self.config:
            return
        self._unhook()
        self._measured = _per_layer(recorder.finish(outputs[0].device))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._measured = [], None

    def _warn(self, step: int, values: dict[str, dict[int, float]]) -> None:
        for name, threshold, within, verdict in (
            ("entropy", self.entropy_threshold, operator.ge, "entropy has collapsed below %g nat"),
            ("max_logit", self.logit_threshold, operator.le, "logits have grown above %g"),
        ):
            if threshold is None:
                continue
            # Asked this way round, NaN is within nothing.
            outside = [f"{layer} ({v:.4g})" for layer, v in values[name].items() if not within(v, threshold)]
            if outside:
                logger.warning(f"step %d: attention {verdict} in layers %s", step, threshold, ", ".join(outside))


def _per_layer(stats: AttentionStats) -> Float[Tensor, "statistic layer"]:
    """What is logged of every layer. Padding does not count, but NaN of a real token does: it means divergence."""
    real = stats.visible_keys > 0
    if not bool(real.any()):
        return torch.full((len(_REDUCE), len(stats.layers)), torch.nan, device=real.device)
    return torch.stack([reduce(stats[name].transpose(1, 2)[:, :, real], (1, 2)) for name, reduce in _REDUCE.items()])


def _decoder(model: nn.Module) -> LlamaModel:
    """The decoder inside whatever accelerate, DDP or PEFT have wrapped around it."""
    for module in model.modules():
        if isinstance(module, LlamaModel):
            return module
    raise ValueError(
        f"model: expected llama_attn's LlamaForCausalLM or a module that contains it, got {type(model).__module__}."
        f"{type(model).__qualname__}; load it with llama_attn.LlamaForCausalLM.from_pretrained"
    )


def _threshold(name: str, value: float | None) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"{name}: expected None or a positive number, got {value!r}")
    return value
