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
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_attn.observe.recording import Recording, record
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats

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
    ``attention/entropy/layer_03``, ``attention/max_logit/layer_03``, ``attention/sink_mass/layer_03`` and so on, with
    the number that the layer has in its path, and over layers ``attention/entropy/mean``,
    ``attention/max_logit/max``, ``attention/sink_mass/mean``; per head also ``attention/entropy/layer_03/head_05``.
    The warnings name layers by their path; they go to the logger ``llama_attn.observe.training``, one line per
    measured step.

    Args:
        trainer: The trainer that the callback is added to.
        every: Measure each so many optimizer steps.
        entropy_threshold: Warn of layers whose mean entropy is below it [nat]; ``None`` never.
        logit_threshold: Warn of layers whose largest scaled score is above it [logit]; ``None`` never.
        layers: Layer indices to measure; ``None`` for all.
        sink_tokens: Number of real keys at the start of a sequence that count as the sink [tokens].
        query_stride: Measure queries 0, s, 2s … of the row only.
        per: ``"layer"``, or ``"head"`` to log every head besides.
        stack: Which attention layers, see `llama_attn.record`.

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
        per: Literal["layer", "head"] = "layer",
        stack: str | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer: expected the transformers.Trainer to report through, got {trainer!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a positive integer, got {every!r}")
        if per not in ("layer", "head"):
            raise ValueError(f'per: expected "layer" or "head", got {per!r}')
        self.trainer, self.every, self.per, self.stack = trainer, every, per, stack
        self.entropy_threshold = _threshold("entropy_threshold", entropy_threshold)
        self.logit_threshold = _threshold("logit_threshold", logit_threshold)
        self.config = AttentionStatsConfig(
            statistics=tuple(_REDUCE), layers=layers, sink_tokens=sink_tokens, query_stride=query_stride
        )
        self._handles: list[RemovableHandle] = []
        self._recording: Recording | None = None
        self._stats: AttentionStats | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the model can be measured.

        Raises:
            ValueError: Its attention cannot be observed, or it lacks one of the layers.
        """
        # A run that ended in an error, or restarts with a smaller batch, never came to its end.
        self._unhook()
        record(kwargs["model"], self.config, stack=self.stack).check()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the next forward measured, if this step is one to measure."""
        # The step counts once it is done.
        if (state.global_step + 1) % self.every:
            return
        model: nn.Module = kwargs["model"]
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what the step measured.

        Raises:
            RuntimeError: Nothing was measured.
        """
        if state.global_step % self.every:
            return
        stats, self._stats = self._stats, None
        if stats is None:
            raise RuntimeError(
                f"step {state.global_step}: nothing was measured: the step called the model without gradients, or not at all"
            )
        # Of every process, so that all log the same.
        processes = self.trainer.accelerator.gather(_per_head(stats)[None])
        logs: dict[str, float] = {}
        values: dict[str, dict[str, float]] = {}
        for index, (name, reduce) in enumerate(_REDUCE.items()):
            heads = reduce(processes[:, index], 0)
            layers = reduce(heads, -1)
            values[name] = dict(zip(stats.paths, layers.tolist(), strict=True))
            for layer, of_heads, of_layer in zip(stats.layers, heads.tolist(), layers.tolist(), strict=True):
                logs[f"attention/{name}/layer_{layer:02d}"] = of_layer
                if self.per == "head":
                    for head, value in zip(stats.heads, of_heads, strict=True):
                        logs[f"attention/{name}/layer_{layer:02d}/head_{head:02d}"] = value
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

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        # Forwards without gradients (a reference policy, generation) are not what the step trains on.
        if torch.is_grad_enabled() and self._recording is None:
            self._recording = record(model, self.config, stack=self.stack).__enter__()

    def _end(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if self._recording is None:
            return
        recording = self._recording
        self._unhook()
        self._stats = recording.forwards[0]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._recording is not None:
            self._recording.close()
        self._handles, self._stats, self._recording = [], None, None

    def _warn(self, step: int, values: dict[str, dict[str, float]]) -> None:
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


def _per_head(stats: AttentionStats) -> Float[Tensor, "statistic layer head"]:
    """What is logged of every head. Padding does not count, but NaN of a real token does: it means divergence."""
    real = stats.visible_keys > 0
    if real.ndim == 2:
        real = real.expand(len(stats.layers), -1, -1)
    whole = torch.full((len(_REDUCE), len(stats.layers), len(stats.heads)), torch.nan, device=real.device)
    for index, (name, reduce) in enumerate(_REDUCE.items()):
        for layer, marks in enumerate(real):
            if bool(marks.any()):
                whole[index, layer] = reduce(stats[name][layer].transpose(0, 1)[:, marks], -1)
    return whole


def _threshold(name: str, value: float | None) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"{name}: expected None or a positive number, got {value!r}")
    return value
