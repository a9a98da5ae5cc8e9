"""What the command line advises where something was not measured: commands, which lead to what was asked for."""

from __future__ import annotations

import ast
import dataclasses
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_cli import invoke
from test_cli_saved import words

import llama_attn
from llama_attn import AttentionStatsConfig, viz
from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.cli.advice import ELSEWHERE, PARAMETERS
from llama_attn.cli.saved import OF_ONE_RUN
from llama_attn.cli.terminal import first_line
from llama_attn.stats.table import statistics_table

PACKAGE = Path(llama_attn.__file__).parent
DOCUMENTS = [["one"] * 20 + ["two"] * 17] * 2
ANSWER = [["one"] * 20 + ["two"] * 10 + ["generated"] * 7] * 2
PYTHON = "AttentionStatsConfig("


def measured(ids, **settings):
    with torch.no_grad():
        return tiny_model()(ids, output_attention_stats=AttentionStatsConfig(**settings)).attention_stats


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--what", "rows"], "llama-attn run MODEL … --rows -1;"),
        (["--what", "sources"], "llama-attn run MODEL --file ONE --file OTHER --documents --generate N;"),
        (["--what", "coverage"], "llama-attn run MODEL … --statistics weight_count,weight_mass;"),
        (["--kind", "logits"], "llama-attn run MODEL … --statistics logits_map;"),
        (
            ["--what", "head-grid", "--statistic", "effective_keys"],
            "llama-attn run MODEL … --statistics effective_keys;",
        ),
        (["--what", "head-grid", "--statistic", "kept_mass"], "`llama-attn budget` chooses them"),
    ],
    ids=str,
)
def test_what_was_not_measured_is_said_as_a_command(arguments, advice, ids, tmp_path):
    measured(ids).save(tmp_path / "a.safetensors")
    result = invoke("plot", tmp_path / "a.safetensors", *arguments)
    assert result.exit_code == 2
    assert advice in words(result)
    assert "run the model" not in words(result)


@pytest.mark.parametrize(
    ("settings", "message", "advice"),
    [
        (
            {"segments": DOCUMENTS},
            "nothing says which tokens were generated: none behind the prompt was read, and the last one is never fed back",
            "measure with llama-attn run MODEL … --generate N, of which the model writes 2 tokens or more",
        ),
        (
            {"segments": ANSWER, "query_stride": 2},
            "expected the queries 29 to 36, from which tokens were generated, got [30, 32, 34, 36]",
            "measure with llama-attn run MODEL … --generate N, which measures every query",
        ),
        (
            {"segments": ANSWER, "statistics": "segment_mass"},
            "how much goes to the sink is not known",
            "measure with llama-attn run MODEL … --statistics sink_mass; there are",
        ),
        (
            {"segments": ANSWER, "sink_tokens": 25},
            "the sink's tokens lie in 2 segments",
            "measure with llama-attn run MODEL …, whose sink is one token",
        ),
    ],
    ids=str,
)
def test_what_sources_lack_is_said_as_a_command(settings, message, advice, ids, tmp_path):
    measured(ids, **settings).save(tmp_path / "a.safetensors")
    result = invoke("plot", tmp_path / "a.safetensors", "--what", "sources")
    assert result.exit_code == 2
    assert message in words(result)
    assert f"; {advice}" in words(result)
    assert PYTHON not in words(result)


@pytest.mark.parametrize(
    "command",
    [
        *(("plot", "A", "--what", what) for what in OF_ONE_RUN),
        ("plot", "A", "--what", "layer-heads", "--kind", "logits"),
        ("report", "A", "--exact", "-1"),
        ("compare", "A", "A", "--plot", "picture.png", "--what", "comparison"),
        ("compare", "A", "A", "--plot", "picture.png", "--what", "comparison", "--kind", "logits"),
    ],
    ids=" ".join,
)
def test_advice_that_is_followed_leads_to_what_was_asked_for(command, ids, tmp_path, monkeypatch):
    """Whatever is lacking, and so every function behind these commands: with no more than each piece of advice adds."""
    monkeypatch.chdir(tmp_path)
    settings, followed = {"statistics": ["max_weight"]}, []
    while True:
        measured(ids, **{**settings, "statistics": tuple(settings["statistics"])}).save("A")
        result = invoke(*command)
        if result.exit_code == 0:
            break
        said = words(result)
        assert said not in followed
        followed.append(said)
        assert PYTHON not in said
        _, advice = said.split("measure with llama-attn run MODEL ")
        if rows := re.search(r"--rows (\S+);", advice):
            settings["rows"] = (int(rows[1]),)
        elif names := re.search(r"--statistics ([\w,]+);", advice):
            settings["statistics"] += names[1].split(",")
        else:
            assert advice.startswith("--file ONE --file OTHER --documents --generate N;")
            settings["segments"] = ANSWER
    assert followed


@pytest.mark.parametrize("what", ["head-grid", "layer-profile"])
def test_every_statistic_that_was_not_measured_is_said_as_a_command(what, ids, tmp_path):
    stats = measured(ids, statistics="max_weight")
    stats.save(tmp_path / "a.safetensors")
    for name in {*statistics_table()} - {*stats.names}:
        result = invoke("plot", tmp_path / "a.safetensors", "--what", what, "--statistic", name)
        assert result.exit_code == 2
        advice = f"{name} {ELSEWHERE[name]}" if name in ELSEWHERE else f"llama-attn run MODEL … --statistics {name};"
        assert advice in words(result)
        assert PYTHON not in words(result)


def test_in_python_it_is_said_in_python(ids):
    with pytest.raises(NotMeasuredError) as raised:
        viz.plot_coverage(measured(ids, statistics="max_weight"))
    assert str(raised.value) == (
        "source: ['weight_count', 'weight_mass'] not measured; measure with "
        'AttentionStatsConfig(statistics=(…, "weight_count", "weight_mass")); there are '
        "['max_weight', 'visible_keys', 'visible_queries']"
    )
    assert raised.value.missing == ("weight_count", "weight_mass")
    again = pickle.loads(pickle.dumps(raised.value))  # noqa: S301 (ours)
    assert (str(again), again.missing) == (str(raised.value), raised.value.missing)
    # Only what is not advice may hold the library's words.
    assert first_line(ValueError(str(raised.value))) == str(raised.value)


def raised_in(tree: ast.AST) -> list[ast.Call]:
    """Calls of exceptions where they are raised."""
    return [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]


def advises(call: ast.Call) -> bool:
    said = "".join(
        part.value for part in ast.walk(call) if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )
    return re.search(r"AttentionStatsConfig\(|measure (it|with|in|others|the) ", said) is not None


def test_whoever_advises_what_to_measure_says_what_is_missing():
    """In the rooms that the command line asks; what is missing there is a statistic, or has a command."""
    calls = [
        call
        for room in ("analysis", "viz")
        for path in (PACKAGE / room).rglob("*.py")
        for call in raised_in(ast.parse(path.read_text()))
    ]
    advising = [call for call in calls if advises(call)]
    assert {call.func.id for call in advising} == {"NotMeasuredError"}
    named = {
        part.value
        for call in calls
        if call.func.id == "NotMeasuredError" and isinstance(call.args[1], ast.List)
        for part in call.args[1].elts
    }
    assert named - {*statistics_table()} == {*PARAMETERS}
    assert {*PARAMETERS} - {"generated"} <= {each.name for each in dataclasses.fields(AttentionStatsConfig)}


@pytest.mark.parametrize("said", ['"measure with query_stride=1"', 'f"{x}; AttentionStatsConfig(rows=…) chooses them"'])
def test_the_check_of_advice_can_fail(said):
    assert advises(raised_in(ast.parse(f"raise ValueError({said})"))[0])
