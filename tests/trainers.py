"""Small runs of transformers' Trainer with the callback, and what it should have logged."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments

from llama_attn.observe.training import AttentionStatsCallback

NAMES = ("entropy", "max_logit", "sink_mass")
# What the Trainer calls it since transformers 5.23, and before.
_FIELDS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


def dataset(rows=16, length=21, padding=True):
    """Rows with 0, 1, 2 … tokens of padding, left and right in turn."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row in range(rows if padding else 0):
        mask[row, slice(0, row) if row % 2 else slice(length - row, length)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return [
        {"input_ids": i, "attention_mask": m, "labels": label} for i, m, label in zip(ids, mask, labels, strict=True)
    ]


class Recorded(Trainer):
    """Keeps every micro batch it was given."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append(dict(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer_for(model, directory, cls=Trainer, rows=None, **arguments):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | arguments
    return cls(
        model, TrainingArguments(str(directory), **settings), train_dataset=rows or dataset(), eval_dataset=dataset(2)
    )


def trained(model, directory, *, cls=Trainer, rows=None, arguments=None, **options):
    """A trainer that has run with the callback."""
    trainer = trainer_for(model, directory, cls, rows, **(arguments or {}))
    trainer.add_callback(AttentionStatsCallback(trainer, **({"every": 1} | options)))
    trainer.train()
    return trainer


def attention_logs(trainer):
    return {log["step"]: log for log in trainer.state.log_history if any("attention" in key for key in log)}


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def expected(stats):
    """What the callback should log, by hand: padding is NaN."""
    logs = {}
    for name in NAMES:
        layers = [tensor[~tensor.isnan()] for tensor in stats[name]]
        values = [(layer.max() if name == "max_logit" else layer.double().mean()).item() for layer in layers]
        logs |= {f"attention/{name}/layer_{index:02d}": value for index, value in enumerate(values)}
        overall = max(values) if name == "max_logit" else sum(values) / len(values)
        logs[f"attention/{name}/{'max' if name == 'max_logit' else 'mean'}"] = overall
    return logs
