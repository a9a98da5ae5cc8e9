"""Attention statistics while a model trains: a callback for transformers' ``Trainer``.

A callback cannot reach the reporters by itself: the integrations stand before it in the Trainer's list of callbacks,
so what it adds to the ``logs`` of ``on_log`` comes after TensorBoard has written and after ``log_history`` has taken
its copy. The public way is ``trainer.log``, so the callback is given its trainer, as TRL's callbacks are.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_attn.observe.recording import Recording, record
from llama_attn.stats.config import AttentionStatsConfig
from llama_attn.stats.container import AttentionStats
from llama_attn.stats.table import WHOLE_HAVE_NO_MEAN, statistics_table

logger = logging.getLogger(__name__)

DEFAULT = ("entropy", "max_logit", "sink_mass")
# Of these the largest number counts, of all others the mean.
LARGEST = ("max_logit", "hidden_max")
# Axes that a mean can be taken over, or that are logged one by one.
MEANT = {"layer", "hidden_layer", "batch", "head", "kv_head", "query", "key"}


class AttentionStatsCallback(TrainerCallback):
    """Logs what attention does in training, and warns of collapsed entropy and exploding logits.

    In the first optimizer step, which is the baseline, then every so many steps, and in the last one, the first micro
    batch is measured in the forward that trains on it: no forward is added, and loss and gradients keep their bits.
    (``torch.compile`` makes a graph of its own for the measured step, which may round differently.) Between those steps
    the model is untouched. Means are over heads and queries (or keys) without padding, of all processes together.

    The numbers go through ``trainer.log``, so to ``state.log_history`` and everything in ``report_to``:
    ``attention/entropy/layer_03``, ``attention/max_logit/layer_03``, ``attention/sink_mass/layer_03`` and so on, with
    the number that the layer has in its path, and over layers ``attention/entropy/mean``,
    ``attention/max_logit/max``, ``attention/sink_mass/mean``; per head also ``attention/entropy/layer_03/head_05``.
    Other statistics go by the same names, those of the residual stream as ``attention/hidden_norm/hidden_layer_03``,
    those of keys per KV head as ``…/kv_head_01``. The warnings are of ``entropy`` and ``max_logit``, where these are
    measured; for that of entropy, queries that see one key do not count, since theirs is always 0. They name layers by
    their path and go to the logger ``llama_attn.observe.training``, one line per measured step.

    Args:
        trainer: The trainer that the callback is added to.
        every: Measure each so many optimizer steps, besides the first and the last.
        statistics: Names of what is measured, by default ``entropy``, ``max_logit`` and ``sink_mass``; of ``max_logit``
            and ``hidden_max`` the largest number is logged, of the others the mean. Positions and what has axes of
            bins, ranks or segments has no mean.
        entropy_threshold: Warn of layers whose mean entropy is below it [nat]; ``None`` never.
        logit_threshold: Warn of layers whose largest scaled score is above it [logit]; ``None`` never.
        layers: Layer indices to measure; ``None`` for all.
        sink_tokens: Number of real keys at the start of a sequence that count as the sink [tokens].
        query_stride: Measure queries 0, s, 2s … of the row only.
        per: ``"layer"``, or ``"head"`` to log every head besides.
        stack: Which attention layers, see `llama_attn.record`.

    Raises:
        TypeError: ``trainer`` is not a ``Trainer``.
        ValueError: A number that is not positive, a statistic without a mean, or a model that cannot be measured or
            lacks one of the layers.

    Source:
        Entropy collapse goes with unstable training: Zhai et al. 2023, arXiv 2303.06296. The threshold of 100 for
        logits is that of QK-Clip: Kimi K2, arXiv 2507.20534.

    Examples:
        >>> from llama_attn.observe.training import AttentionStatsCallback
        >>> trainer = Trainer(model, args, train_dataset=dataset)
        >>> trainer.add_callback(AttentionStatsCallback(trainer, every=100))
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 100,
        statistics: tuple[str, ...] | str = DEFAULT,
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
            statistics=_names(statistics), layers=layers, sink_tokens=sink_tokens, query_stride=query_stride
        )
        if trainer.model is not None:
            record(trainer.model, self.config, stack=stack).check()
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
        if not self._is_due(state.global_step + 1, state):
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
        if not self._is_due(state.global_step, state):
            return
        stats, self._stats = self._stats, None
        if stats is None:
            raise RuntimeError(
                f"step {state.global_step}: nothing was measured: the step called the model without gradients, or not at all"
            )
        summaries = {name: _Summary.of(stats, name) for name in self.config.statistics}
        judged: dict[str, _Summary] = {name: summaries[name] for name in ("entropy", "max_logit") if name in summaries}
        if "entropy" in judged:
            judged["entropy"] = _Summary.of(stats, "entropy", more_than=1)
        # Of every process, so that all log the same.
        everything = iter(_Summary.gathered([*summaries.values(), *judged.values()], self.trainer.accelerator.gather))
        summaries = {name: next(everything) for name in summaries}
        judged = {name: next(everything) for name in judged}
        logs: dict[str, float] = {}
        for name, summary in summaries.items():
            axis, prefix = summary.axis, f"attention/{name}"
            values, heads = summary.over_heads().tolist(), summary.values().tolist()
            for layer, of_layer, of_heads in zip(summary.layers, values, heads, strict=True):
                logs[f"{prefix}/{axis}_{layer:02d}"] = of_layer
                if self.per == "head" and summary.head_axis:
                    for head, value in zip(summary.heads, of_heads, strict=True):
                        logs[f"{prefix}/{axis}_{layer:02d}/{summary.head_axis}_{head:02d}"] = value
            logs[f"{prefix}/{'max' if summary.is_largest else 'mean'}"] = summary.over_layers().item()
        if state.is_world_process_zero:
            self._warn(state.global_step, stats.paths, judged)
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

    def _is_due(self, step: int, state: TrainerState) -> bool:
        """Whether a step, counted from 1, is measured: the first, each so many, and the last."""
        return step in (1, state.max_steps) or step % self.every == 0

    def _warn(self, step: int, paths: Sequence[str], judged: dict[str, _Summary]) -> None:
        for name, threshold, within, verdict in (
            ("entropy", self.entropy_threshold, operator.ge, "entropy has collapsed below %g nat"),
            ("max_logit", self.logit_threshold, operator.le, "logits have grown above %g"),
        ):
            if threshold is None or name not in judged:
                continue
            summary = judged[name]
            measured = zip(paths, summary.over_heads().tolist(), summary.count.sum(-1).tolist(), strict=True)
            # Asked this way round, NaN is within nothing; where nothing was measured, nothing has gone wrong.
            outside = [f"{path} ({v:.4g})" for path, v, count in measured if count and not within(v, threshold)]
            if outside:
                logger.warning(f"step %d: attention {verdict} in layers %s", step, threshold, ", ".join(outside))


@dataclass(frozen=True, eq=False)
class _Summary:
    """What is logged of a statistic, from which that of several processes can be put together.

    Padding does not count, but NaN of a real token does: it means divergence.

    Args:
        layers: Coordinates of the layer axis.
        heads: Coordinates of the head axis.
        axis: Name of the layer axis.
        head_axis: Name of the head axis; "" without one.
        is_largest: Whether the largest number counts, and not the mean.
        largest: Largest number of each head, (layer, head).
        total: Sum of its numbers, (layer, head).
        count: How many there are, (layer, head).
    """

    layers: Sequence[int]
    heads: Sequence[int]
    axis: str
    head_axis: str
    is_largest: bool
    largest: Float[Tensor, "layer head"]
    total: Float[Tensor, "layer head"]
    count: Float[Tensor, "layer head"]

    @classmethod
    def of(cls, stats: AttentionStats, name: str, more_than: int = 0) -> _Summary:
        """Of one process, of the queries that see more than so many keys."""
        dims, tensor = list(stats.labels[name].dims), stats[name]
        head_axis = next((dim for dim in ("head", "kv_head") if dim in dims), "")
        tensor = tensor.movedim(dims.index(head_axis), 1) if head_axis else tensor[:, None]
        seen = stats.visible_queries > 0 if "key" in dims else stats.visible_keys > more_than
        if seen.ndim == 3 and dims[0] == "hidden_layer":
            seen = seen.any(0)
        if not {"query", "key"} & set(dims):
            seen, tensor = seen.any(-1, keepdim=True), tensor[..., None]
        # (layer, head, batch, token)
        counts = (seen[:, None] if seen.ndim == 3 else seen).expand_as(tensor)
        return cls(
            layers=stats.hidden_layers if dims[0] == "hidden_layer" else stats.layers,
            heads=stats.heads if head_axis == "head" else range(tensor.shape[1]),
            axis=dims[0],
            head_axis=head_axis,
            is_largest=name in LARGEST,
            largest=torch.where(counts, tensor, -torch.inf).amax((-2, -1)),
            total=torch.where(counts, tensor, 0).sum((-2, -1)),
            count=counts.sum((-2, -1)).to(tensor.dtype),
        )

    @staticmethod
    def gathered(summaries: Sequence[_Summary], gather: Callable[[Tensor], Tensor]) -> list[_Summary]:
        """The same of all processes together."""
        mine = [torch.stack([summary.largest, summary.total, summary.count]) for summary in summaries]
        processes = gather(torch.cat([part.flatten() for part in mine])[None])
        parts = processes.split([part.numel() for part in mine], dim=1)
        together = []
        for summary, own, part in zip(summaries, mine, parts, strict=True):
            largest, total, count = part.view(-1, *own.shape).unbind(1)
            together.append(replace(summary, largest=largest.amax(0), total=total.sum(0), count=count.sum(0)))
        return together

    def values(self) -> Float[Tensor, "layer head"]:
        """The largest number or the mean of each head; NaN where there is none."""
        return torch.where(self.count > 0, self.largest if self.is_largest else self.total / self.count, torch.nan)

    def over_heads(self) -> Float[Tensor, " layer"]:
        """The same of each layer."""
        return self.values().amax(-1) if self.is_largest else self.total.sum(-1) / self.count.sum(-1)

    def over_layers(self) -> Float[Tensor, ""]:
        """The largest of all layers, or the mean of their means."""
        return self.over_heads().amax() if self.is_largest else self.over_heads().mean()


def _names(statistics: tuple[str, ...] | str) -> tuple[str, ...]:
    """The statistics to log.

    Raises:
        ValueError: One of them is unknown, or has no mean.
    """
    table = statistics_table()
    with_mean = [
        name
        for name, statistic in table.items()
        if statistic.dtype is None and "segments" not in statistic.needed and set(statistic.dims) <= MEANT
    ]
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    unknown = [name for name in names if name not in with_mean]
    if unknown or not names:
        whole = any(name in table and table[name].dtype is not None for name in unknown)
        why = f": {WHOLE_HAVE_NO_MEAN}" if whole else ""
        raise ValueError(f"statistics: expected some of {with_mean}, which have a mean, got {unknown or names}{why}")
    return tuple(dict.fromkeys(names))


def _threshold(name: str, value: float | None) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"{name}: expected None or a positive number, got {value!r}")
    return value
