"""The Trainer callback: what it logs, where it arrives, and that training does not notice."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import re
import socket
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from forked import Python
from torch import nn
from trainers import (
    CHECKPOINTING,
    NAMES,
    Recorded,
    attention_logs,
    dataset,
    expected,
    hooks_of,
    trained,
    trainer_for,
)
from transformers import BloomConfig, BloomForCausalLM, Trainer, TrainerCallback
from transformers.models.llama import LlamaForCausalLM as StockLlama

from llama_attn import AttentionStatsConfig
from llama_attn.observe.training import AttentionStatsCallback


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Threads that wait for each other, and collecting the garbage of every import, take longer than the training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", ["sdpa", "streaming"])
def test_logs_the_first_micro_batch_of_every_nth_step(implementation, tmp_path):
    model = tiny_model(implementation)
    arguments = {"gradient_accumulation_steps": 2, "learning_rate": 0.0}
    trainer = trained(model, tmp_path, cls=Recorded, arguments=arguments, every=2)
    logs = attention_logs(trainer)
    assert list(logs) == [1, 2, 4]
    for step, log in logs.items():
        batch = trainer.batches[2 * (step - 1)]
        assert (batch["attention_mask"] == 0).any(), "the test needs padding"
        stats = model(**batch, output_attention_stats=True).attention_stats
        wanted = expected(stats)
        assert {key for key in log if key.startswith("attention")} == set(wanted)
        for key, value in wanted.items():
            assert log[key] == pytest.approx(value, rel=1e-5), key


def test_a_step_is_measured_with_the_weights_it_starts_from(tmp_path):
    model = tiny_model()
    trainer = trained(model, tmp_path, cls=Recorded, arguments={"max_steps": 2, "learning_rate": 0.1})
    stats = tiny_model()(**trainer.batches[0], output_attention_stats=True).attention_stats
    assert attention_logs(trainer)[1]["attention/entropy/mean"] == pytest.approx(stats["entropy"].nanmean().item())


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointing": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    "reentrant": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
}
SETTINGS["everything"] = SETTINGS["accumulation"] | SETTINGS["bf16"] | SETTINGS["checkpointing"]


@pytest.mark.parametrize("implementation", ["sdpa", "streaming"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_does_not_notice(setting, implementation, tmp_path):
    def run(train, **options):
        model = tiny_model(implementation)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        arguments = SETTINGS[setting] | {"max_steps": 3}
        if train is trained:
            trainer = trained(model, tmp_path, arguments=arguments, **options)
        else:
            trainer = trainer_for(model, tmp_path, **arguments)
            trainer.train()
        assert not any(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
        losses = [(log["step"], log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        return trainer, model.state_dict(), losses

    _, weights, losses = run(trainer_for)
    trainer, watched, watched_losses = run(trained)
    assert list(attention_logs(trainer)) == [1, 2, 3]
    assert len(losses) == 3
    assert watched_losses == losses
    assert all(torch.equal(watched[name], weight) for name, weight in weights.items())


def test_numbers_do_not_depend_on_checkpointing(tmp_path):
    def first(setting):
        trainer = trained(tiny_model(), tmp_path, arguments=SETTINGS[setting] | {"max_steps": 1})
        return attention_logs(trainer)[1]

    plain = first("plain")
    assert first("checkpointing") == plain
    assert first("reentrant") == plain


def test_arrives_in_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = trained(tiny_model(), tmp_path, arguments={"report_to": "tensorboard"}, every=2)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if "attention" in tag}
    assert len(tags) == len(NAMES) * 4
    for tag in tags:
        logged = {step: log[tag.removeprefix("train/")] for step, log in attention_logs(trainer).items()}
        written = {event.step: event.value for event in events.Scalars(tag)}
        assert written == pytest.approx(logged), tag
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"entropy_threshold": 50, "layers": (0, 2)},
            r"step 2: .*entropy.* below 50 nat in layers model\.layers\.0\.self_attn \(\S+\), model\.layers\.2\.self_attn \(\S+\)",
        ),
        (
            {"logit_threshold": 1e-3},
            r"step 2: .*logits.* above 0.001 in layers \S+0\S+ \(\S+\), \S+1\S+ \(\S+\), \S+2\S+ \(\S+\)",
        ),
    ],
)
def test_warns_of_thresholds(options, words, tmp_path, caplog):
    def messages(**options):
        caplog.clear()
        trained(tiny_model(), tmp_path, arguments={"max_steps": 2}, every=2, **options)
        return [record.getMessage() for record in caplog.records if record.name == "llama_attn.observe.training"]

    quiet = {"entropy_threshold": 1e-9, "logit_threshold": 1e9}
    assert messages(**quiet) == []
    assert messages(entropy_threshold=None, logit_threshold=None) == []
    baseline, message = messages(**(quiet | options))
    assert re.fullmatch(words, message)
    assert re.fullmatch(words.replace("step 2", "step 1"), baseline)


def test_warns_of_divergence(tmp_path, caplog):
    model = tiny_model()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    trained(model, tmp_path, arguments={"max_steps": 1}, layers=(1,))
    messages = [record.getMessage() for record in caplog.records if record.name == "llama_attn.observe.training"]
    assert len(messages) == 2
    assert all(message.endswith("in layers model.layers.1.self_attn (nan)") for message in messages)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = nn.ModuleDict({"base_model": model})

    def forward(self, **inputs):
        return self.inner["base_model"](**inputs)


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))


# peft still asks for it by that name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [Wrapper, with_lora])
def test_works_inside_a_wrapper(wrap, tmp_path):
    arguments = {"max_steps": 1, "remove_unused_columns": False}
    plain = attention_logs(trained(tiny_model(), tmp_path, arguments=arguments))
    assert attention_logs(trained(wrap(tiny_model()), tmp_path, arguments=arguments)) == plain


class HooksSeen(TrainerCallback):
    """Counts the model's hooks at every event after a step has begun."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, *args, model=None, **kwargs):
        self.counts.append(len(hooks_of(model)))

    on_substep_end = on_step_end = on_evaluate = on_save = on_train_end = on_step_begin


def test_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model()
    arguments = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(model, tmp_path, **arguments, eval_strategy="steps", eval_steps=1)
    seen = HooksSeen()
    trainer.add_callback(AttentionStatsCallback(trainer, every=2))
    trainer.add_callback(seen)
    trainer.train()
    # Per step: its begin, a substep, its end, an evaluation, and sometimes a save.
    assert seen.counts == [2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("attention/sink_mass/mean" in log for log in state["log_history"])
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert all(torch.equal(weight, copy.state_dict()[name]) for name, weight in model.state_dict().items())


def test_hooks_of_a_step_without_forward_are_removed(tmp_path):
    model = tiny_model()
    trainer = trainer_for(model, tmp_path)
    callback = AttentionStatsCallback(trainer, every=1)
    events = (trainer.args, trainer.state, trainer.control)
    callback.on_step_begin(*events, model=model)
    assert len(hooks_of(model)) == 2
    callback.on_train_end(*events, model=model)
    assert not hooks_of(model)


def test_starts_afresh_after_running_out_of_memory(tmp_path):
    """``auto_find_batch_size`` begins the training again, without an end of the first."""
    model = tiny_model()
    failures = [RuntimeError("CUDA out of memory.")]

    def fail(*_):
        if failures:
            raise failures.pop()

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    arguments = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = trained(model, tmp_path, cls=Recorded, arguments=arguments)
    handle.remove()
    assert not hooks_of(model)
    assert len(trainer.batches) == 3
    history = [log["step"] for log in trainer.state.log_history if "attention/entropy/mean" in log]
    assert history == [1, 2]


class WithReference(Recorded):
    """Looks at the model without gradients before it trains, as preference losses do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            model(input_ids=inputs["input_ids"].flip(-1))
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_measures_the_forward_that_trains(tmp_path):
    arguments = {"max_steps": 1}
    plain = attention_logs(trained(tiny_model(), tmp_path, arguments=arguments))
    assert attention_logs(trained(tiny_model(), tmp_path, cls=WithReference, arguments=arguments)) == plain


class OwnRequest(Recorded):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs | {"output_attention_stats": True}, *args, **kwargs)


def test_measures_a_forward_that_is_measured_by_others_too(tmp_path):
    arguments = {"max_steps": 1}
    plain = attention_logs(trained(tiny_model(), tmp_path, arguments=arguments))
    assert attention_logs(trained(tiny_model(), tmp_path, cls=OwnRequest, arguments=arguments)) == plain


class WithoutGradients(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            super().compute_loss(model, inputs, *args, **kwargs)
        return model.lm_head.weight.sum()


def test_a_step_that_cannot_be_measured_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="step 1: nothing was measured"):
        trained(tiny_model(), tmp_path, cls=WithoutGradients)


def test_a_batch_of_padding_does_not_stop_the_training(tmp_path, caplog):
    rows = [row | {"attention_mask": torch.zeros_like(row["attention_mask"])} for row in dataset(padding=False)]
    trainer = trained(tiny_model(), tmp_path, rows=rows, arguments={"max_steps": 1})
    assert math.isnan(attention_logs(trainer)[1]["attention/max_logit/max"])
    assert math.isnan(attention_logs(trainer)[1]["attention/entropy/mean"])
    assert warnings_in(caplog) == []


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "llama_attn.observe.training"]


@pytest.mark.parametrize(("steps", "measured"), [(1, [1]), (3, [1, 3]), (7, [1, 3, 6, 7])])
def test_the_first_and_the_last_step_are_logged(steps, measured, tmp_path):
    trainer = trained(tiny_model(), tmp_path, arguments={"max_steps": steps}, every=3)
    assert list(attention_logs(trainer)) == measured


def test_a_run_that_goes_on_has_no_second_baseline(tmp_path):
    arguments = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trained(tiny_model(), tmp_path, arguments=arguments, every=5)
    trainer = trainer_for(tiny_model(), tmp_path, max_steps=6)
    trainer.add_callback(AttentionStatsCallback(trainer, every=5))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert list(attention_logs(trainer)) == [1, 3, 5, 6], "1 and 3 are of the first run"


def test_queries_that_see_one_key_are_no_collapse(tmp_path, caplog):
    """With a stride beyond the text only query 0 is measured; its entropy is 0 whatever the model does."""
    arguments = {"max_steps": 1}
    trainer = trained(tiny_model(), tmp_path, arguments=arguments, rows=dataset(padding=False), query_stride=100)
    assert attention_logs(trainer)[1]["attention/entropy/mean"] == 0
    assert warnings_in(caplog) == []
    # Of texts of two tokens it is the second query that counts, and not the mean of both.
    rows, caught = dataset(length=2, padding=False), []
    for threshold in (1e-9, 50):
        trainer = trained(tiny_model(), tmp_path, cls=Recorded, rows=rows, arguments=arguments | {"learning_rate": 0.0},
                          entropy_threshold=threshold, layers=(1,))  # fmt: skip
        caught.append(warnings_in(caplog))
    stats = tiny_model()(**trainer.batches[0], output_attention_stats=True).attention_stats
    assert caught[0] == []
    assert float(re.search(r"\((\S+)\)$", caught[1][0])[1]) == pytest.approx(
        stats["entropy"][1, ..., 1].mean().item(), rel=1e-3
    )
    assert attention_logs(trainer)[1]["attention/entropy/mean"] == pytest.approx(stats["entropy"][1].mean().item())


def test_any_statistics(tmp_path):
    """Means by hand, over what is no padding; of keys and of the residual stream too."""
    names = ("received", "effective_keys", "induction", "hidden_norm", "hidden_max", "hidden_layer_median", "key_norm",
             "value_output_norm")  # fmt: skip
    model = tiny_model()
    trainer = trained(
        model, tmp_path, cls=Recorded, arguments={"max_steps": 1, "learning_rate": 0.0}, statistics=names, per="head"
    )
    batch, log = trainer.batches[0], attention_logs(trainer)[1]
    assert (batch["attention_mask"] == 0).any(), "the test needs padding"
    stats = model(**batch, output_attention_stats=AttentionStatsConfig(statistics=names)).attention_stats
    wanted = {}
    for name in names:
        dims, tensor = stats.labels[name].dims, stats[name].double()
        summed = (lambda t: t[~t.isnan()].max()) if name == "hidden_max" else torch.nanmean
        layers = [summed(layer).item() for layer in tensor]
        wanted |= {f"attention/{name}/{dims[0]}_{at:02d}": value for at, value in enumerate(layers)}
        wanted[f"attention/{name}/{'max' if name == 'hidden_max' else 'mean'}"] = (
            max(layers) if name == "hidden_max" else sum(layers) / len(layers)
        )
        if "head" in dims or "kv_head" in dims:
            for at, layer in enumerate(tensor):
                for head in range(tensor.shape[2]):
                    wanted[f"attention/{name}/layer_{at:02d}/{dims[2]}_{head:02d}"] = layer[:, head].nanmean().item()
    found = {key: value for key, value in log.items() if key.startswith("attention")}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_layers_that_the_model_lacks_are_refused_when_the_callback_is_made(tmp_path):
    trainer = trainer_for(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match=r"layers: unknown \[3\]; the model has layers 0 to 2"):
        AttentionStatsCallback(trainer, layers=(0, 3))


def test_any_model_is_measured(tmp_path):
    stock = StockLlama(tiny_config())
    stock.load_state_dict(tiny_model().state_dict())
    arguments = {"max_steps": 2}
    ours = attention_logs(trained(tiny_model(), tmp_path, arguments=arguments))
    assert attention_logs(trained(stock, tmp_path, arguments=arguments)) == ours


def test_every_head_on_request(tmp_path):
    model = tiny_model()
    trainer = trained(model, tmp_path, cls=Recorded, arguments={"max_steps": 1, "learning_rate": 0.0}, per="head")
    stats = model(**trainer.batches[0], output_attention_stats=True).attention_stats
    log = attention_logs(trainer)[1]
    assert len([key for key in log if "/head_" in key]) == 3 * 3 * 6
    assert log["attention/entropy/layer_01/head_04"] == pytest.approx(stats["entropy"][1, :, 4].nanmean().item())
    assert log["attention/max_logit/layer_02/head_00"] == pytest.approx(
        stats["max_logit"][2, :, 0].nan_to_num(-1e9).max().item()
    )


def test_a_model_without_observable_attention_is_an_error(tmp_path):
    model = BloomForCausalLM(
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(ValueError, match="BloomForCausalLM has no attention that goes through transformers"):
        trained(model, tmp_path)
    with pytest.raises(ValueError, match=r"layers: unknown \[3\]"):
        trained(tiny_model(), tmp_path, layers=(0, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every: expected a positive integer, got 0"),
        ({"every": True}, "every: expected a positive integer, got True"),
        ({"every": 0.5}, "every: expected a positive integer, got 0.5"),
        ({"entropy_threshold": -1}, "entropy_threshold: expected None or a positive number, got -1"),
        ({"entropy_threshold": False}, "entropy_threshold: expected None or a positive number, got False"),
        ({"logit_threshold": float("nan")}, "logit_threshold: expected None or a positive number, got nan"),
        ({"logit_threshold": "100"}, "logit_threshold: expected None or a positive number, got '100'"),
        ({"sink_tokens": 0}, "sink_tokens: expected a positive integer, got 0"),
        ({"query_stride": None}, "query_stride: expected a positive integer, got None"),
        ({"layers": (-1,)}, "layers: expected None or distinct indices"),
        ({"statistics": "entropie"}, "statistics: expected some of ['entropy', "),
        ({"statistics": ("entropy", "topk_position")}, "which have a mean, got ['topk_position']: whole numbers are"),
        ({"statistics": ("weights_map", "segment_mass", "topk_weight")}, "got ['weights_map', 'segment_mass', 'topk_"),
        ({"statistics": ()}, "which have a mean, got ()"),
        ({"per": "token"}, 'per: expected "layer" or "head", got '),
    ],
)
def test_parameters_are_checked(options, words, tmp_path):
    trainer = trainer_for(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)):
        AttentionStatsCallback(trainer, **options)


def test_the_trainer_is_checked():
    with pytest.raises(TypeError, match=r"trainer: expected the transformers\.Trainer to report through, got 100"):
        AttentionStatsCallback(100)


def test_options_reach_the_measurement(tmp_path):
    model = tiny_model()
    options = {"layers": (2,), "sink_tokens": 3, "query_stride": 4}
    trainer = trained(model, tmp_path, cls=Recorded, arguments={"max_steps": 1, "learning_rate": 0.0}, **options)
    stats = model(**trainer.batches[0], output_attention_stats=AttentionStatsConfig(**options)).attention_stats
    log = attention_logs(trainer)[1]
    assert {key for key in log if "layer" in key} == {f"attention/{name}/layer_02" for name in NAMES}
    assert log["attention/sink_mass/layer_02"] == pytest.approx(stats["sink_mass"].nanmean().item())


DISTRIBUTED = """
import json, sys
from conftest import tiny_model
from trainers import Recorded, attention_logs, trained
trainer = trained(tiny_model(), sys.argv[1], cls=Recorded, arguments={"max_steps": 1, "learning_rate": 0.0})
wrapper = type(trainer.model_wrapped).__name__
stats = tiny_model()(**trainer.batches[0], output_attention_stats=True).attention_stats
entropy = stats["entropy"][~stats["entropy"].isnan()]
own = {"max_logit": stats["max_logit"].nan_to_num(-1e9).max().item(), "entropy": [entropy.sum().item(), entropy.numel()]}
print("RESULT", json.dumps([wrapper, attention_logs(trainer)[1], own]))
"""


def test_numbers_are_of_all_processes(tmp_path):
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        Python(
            "-c",
            DISTRIBUTED,
            tmp_path,
            folder=Path(__file__).parent,
            environment=shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    ended = [process.ended(120) for process in processes]
    assert [code for code, _ in ended] == [0, 0], ended
    results = [json.loads(said.split("RESULT")[1].splitlines()[0]) for _, said in ended]
    (wrapper, logs, first), (_, same, second) = results
    assert wrapper == "DistributedDataParallel"
    assert logs == same
    assert first != second, "the processes must see different batches"
    assert logs["attention/max_logit/max"] == pytest.approx(max(first["max_logit"], second["max_logit"]))
    assert first["entropy"][1] != second["entropy"][1], "the processes must have different amounts of padding"
    total, count = map(sum, zip(first["entropy"], second["entropy"], strict=True))
    assert logs["attention/entropy/mean"] == pytest.approx(total / count)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
