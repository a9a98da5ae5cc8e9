"""What ``run`` and ``demo`` measure, draw and leave behind, and how they say it."""

from __future__ import annotations

import io
import re

import cli_models
import numpy as np
import pandas
import pytest
import torch
from conftest import tiny_model
from test_cli import invoke
from transformers import AutoTokenizer

from llama_attn import AttentionStats
from llama_attn.cli import folder as folders, progress, showing, terminal
from llama_attn.cli.measuring import Subject
from llama_attn.cli.terminal import PlainConsole
from llama_attn.cli.texts import Prompt
from llama_attn.stats.config import AttentionStatsConfig

TEXT = "Hello there, parrot"
OWN = """
from llama_attn import Statistic, register_statistic

def double(attention):
    return FACTOR * attention.weights.amax(-1)

FACTOR = 2
register_statistic(Statistic("twice", ("layer", "batch", "head", "query"), "-", "-", stream=double, textbook=double))
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama of three layers, as a folder."""
    return cli_models.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take the most time: which would be drawn, each as an empty file."""

    def draw(stats, out, layers, kind, rows):
        for place in [out / row for row in rows] or [out]:
            place.mkdir(exist_ok=True)
            for layer in layers:
                (place / f"layer_{layer}_attention.png").touch()
            (place / "report.html").touch()
        return len(layers)

    monkeypatch.setattr("llama_attn.cli.showing._draw", draw)


def run(*arguments, out):
    result = invoke(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    return AttentionStats.load(out / "stats.safetensors"), result.output


def pictures(out):
    return sorted(path.name for path in out.rglob("layer_*.png"))


def rows_of_table(output):
    return [int(line.split()[0]) for line in output.splitlines() if re.match(r"\s*\d+ +\d+%", line)]


@pytest.mark.usefixtures("undrawn")
def test_everything_is_measured_and_some_drawn(llama, tmp_path):
    stats, said = run("run", llama, "--prompt", TEXT, "--layers", "0", out=tmp_path)
    assert stats.layers == tuple(rows_of_table(said)) == (0, 1, 2)
    assert pictures(tmp_path) == ["layer_0_attention.png"]
    assert "pictures are of layer 0; 2 more were measured" in said
    assert " of 3" not in said, "nothing rests on a part"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("rows", "generate", "kept"),
    [("generated", 3, slice(-3, None)), ("all", None, slice(None)), ("0,5,-1", None, [0, 5, -1])],
)
def test_the_weights_of_chosen_queries_are_kept(rows, generate, kept, llama, tmp_path):
    """All of them; of an answer those of the queries that its tokens were drawn from."""
    more = () if generate is None else ("--generate", generate)
    stats, _ = run("run", llama, "--prompt", TEXT, "--rows", rows, *more, out=tmp_path)
    assert list(stats.rows) == np.arange(stats.num_keys)[kept].tolist()
    torch.testing.assert_close(stats["row_weights"].sum(-1), torch.ones(3, 1, 4, len(stats.rows)))


@pytest.mark.usefixtures("undrawn", "restored_registry")
@pytest.mark.parametrize("command", ["run", "corpus"])
def test_a_file_of_ones_own_comes_first(command, llama, tmp_path):
    """It registers a statistic, which is a name like any other from then on."""
    (tmp_path / "texts.txt").write_text(TEXT + "\n")
    (tmp_path / "mine.py").write_text(OWN)
    own = ["--import", tmp_path / "mine.py"]
    read = ["--prompt", TEXT] if command == "run" else [tmp_path / "texts.txt"]
    arguments = [command, llama, *read, "--statistics", "twice", "--out", tmp_path / "out"]
    result = invoke(*arguments)
    assert "unknown ['twice']" in result.output
    result = invoke(*own, *arguments)
    assert result.exit_code == 0, result.output
    file = {"run": "stats", "corpus": "summary"}[command]
    assert b"twice" in (tmp_path / "out" / f"{file}.safetensors").read_bytes()
    result = invoke("--import", tmp_path / "none.py", *arguments)
    assert (result.exit_code, "--import: there is no file" in result.output) == (2, True)


@pytest.mark.usefixtures("undrawn")
def test_what_rests_on_a_part_says_so(llama, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"This is {name}")
    files = ["--file", tmp_path / "a", "--file", tmp_path / "b", "--documents"]
    stats, said = run("run", llama, *files, "--measure-layers", "1-2", out=tmp_path / "out")
    assert stats.layers == tuple(rows_of_table(said)) == (1, 2)
    assert pictures(tmp_path / "out") == ["layer_1_attention.png", "layer_2_attention.png"]
    of_layers, of_documents = said.split("attention of the last token")[0], said.split("measured by")[1]
    assert "layers 1–2 of 3" in of_layers.split("sink mass")[0]
    assert "layers 1–2 of 3" in of_documents.split("attention of")[0]


@pytest.mark.usefixtures("undrawn")
def test_an_older_run_in_the_folder_is_replaced(llama, tmp_path):
    out = tmp_path / "out"
    for name in "ab":
        (tmp_path / name).write_text(f"This is {name}")
    run("run", llama, "--file", tmp_path / "a", "--file", tmp_path / "b", out=out)
    assert len(pictures(out / "b")) == 3
    (out / "a" / "note").touch()
    (out / "layer_3.png").touch()
    run("run", llama, "--prompt", TEXT, "--layers", "all", out=out / "other")
    _, said = run("run", llama, "--prompt", TEXT, "--layers", "1", out=out)
    assert "pictures and pages of an older run were in" in said
    assert pictures(out / "other") == [f"layer_{layer}_attention.png" for layer in range(3)], "a run of its own"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if "other" not in path.parts and path.is_file()}
    assert names == {"a/note", "layer_3.png", "layer_1_attention.png", "report.html", "stats.safetensors"}
    assert not (out / "b").exists()
    damaged = invoke("run", llama, "--prompt", TEXT, "--device", "meta", "--out", out)
    assert damaged.exit_code == 2
    assert pictures(out / "other"), "a run that fails takes nothing away"
    assert "layer_1_attention.png" in pictures(out)


def test_only_names_of_a_run_are_cleared(tmp_path):
    mine = {"layer_1.png", "my_layer_1_attention.png", "layer_1_attention.png.txt", "stats.csv", "report.htm"}
    theirs = {"layer_01_attention.png", "hidden_states_3_norm.png", "kv_29_norm.png", "report.html", "head_roles.png"}
    (tmp_path / "row").mkdir()
    for name in mine | theirs:
        (tmp_path / name).touch()
        (tmp_path / "row" / name).touch()
    assert folders.clear(tmp_path) == len(theirs)
    assert len(list((tmp_path / "row").iterdir())) == len(mine | theirs), "no statistics, so no run with rows"
    (tmp_path / "stats.safetensors").touch()
    assert folders.clear(tmp_path) == len(theirs)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == mine | {"stats.safetensors"}


def lacking(monkeypatch, *names):
    found = terminal.importlib.util.find_spec
    monkeypatch.setattr(terminal.importlib.util, "find_spec", lambda name: None if name in names else found(name))


@pytest.mark.parametrize("command", ["run", "heads"])
@pytest.mark.parametrize(("packages", "table"), [(["matplotlib"], True), (["matplotlib", "pandas", "xarray"], False)])
def test_without_packages_for_pictures_the_numbers_are_saved(command, packages, table, llama, tmp_path, monkeypatch):
    lacking(monkeypatch, *packages)
    stats, said = run(command, llama, *(["--prompt", TEXT] if command == "run" else []), out=tmp_path / "out")
    assert stats.layers == (0, 1, 2)
    assert not list((tmp_path / "out").glob("*.[ph]*"))
    assert f"pictures need {', '.join(sorted(packages))}: pip install " in said.replace(
        "xarray, pandas", "pandas, xarray"
    )
    assert "[viz]'" in said
    assert ("strongest key" in said or "strongest: layer" in said) == table
    result = invoke("report", tmp_path / "out" / "stats.safetensors")
    assert result.exit_code == 2, "where there is nothing but a picture to make"


class Terminal:
    """A bar that remembers how far it came."""

    def __init__(self, monkeypatch):
        self.steps, self.totals = [], []
        self.console = PlainConsole(file=io.StringIO(), force_terminal=True, width=100)
        advance, add = progress.Progress.advance, progress.Progress.add_task
        monkeypatch.setattr(progress, "console", self.console)
        monkeypatch.setattr(
            progress.Progress, "advance", lambda bar, task, by: self.steps.append(by) or advance(bar, task, by)
        )
        monkeypatch.setattr(
            progress.Progress, "add_task", lambda bar, *a, total: self.totals.append(total) or add(bar, *a, total=total)
        )

    @property
    def shown(self):
        return self.console.file.getvalue()


@pytest.mark.parametrize("new_tokens", [0, 4])
def test_a_bar_of_layers_and_queries(new_tokens, llama, monkeypatch):
    tokenizer, rows = AutoTokenizer.from_pretrained(llama), (list(range(7, 30)), list(range(7, 20)))
    model = tiny_model(vocab_size=len(tokenizer))
    subject = Subject.of(model, generates=new_tokens > 0)
    config = AttentionStatsConfig(statistics=("entropy", "received", "hidden_norm"))
    quiet, ids = subject.measure(Prompt(rows), tokenizer, config, new_tokens)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    terminal = Terminal(monkeypatch)
    watched, same = subject.measure(Prompt(rows), tokenizer, config, new_tokens)
    assert (same == ids).all()
    for name in quiet.names:
        assert torch.equal(watched[name].nan_to_num(-7), quiet[name].nan_to_num(-7)), name
    queries = ids.shape[1] - 1 if new_tokens else 23
    assert sum(terminal.steps) == 3 * queries
    assert len(terminal.steps) == 3 * max(new_tokens, 1), "one step whenever a layer is done"
    assert terminal.totals == [3 * (23 + max(new_tokens - 1, 0))]
    assert "running 3 layers × " in terminal.shown
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_no_bar_without_a_terminal(llama, monkeypatch, capsys):
    terminal = Terminal(monkeypatch)
    terminal.console._force_terminal = False
    tokenizer = AutoTokenizer.from_pretrained(llama)
    subject = Subject.of(tiny_model(vocab_size=len(tokenizer)), generates=False)
    subject.measure(Prompt(([7, 8, 9],)), tokenizer, AttentionStatsConfig(), 0)
    assert (terminal.steps, terminal.shown, "".join(capsys.readouterr())) == ([], "", "")


@pytest.mark.smollm2
@pytest.mark.usefixtures("undrawn")
def test_the_pirate_talks_and_reads(tmp_path):
    stats, said = run("demo", "--generate", "5", out=tmp_path)
    assert "generated: In the world of the" in said
    assert (len(stats.layers), stats.num_keys) == (30, 34 + 4)
    for name, text in (("a.txt", "Ahoy"), ("b.txt", "Call me Ishmael.")):
        (tmp_path / name).write_text(text)
    stats, _ = run("demo", "--text", "Ahoy", out=tmp_path / "text")
    assert "".join(stats.tokens[0]) == "Ahoy"
    stats, said = run(
        "demo", "--file", tmp_path / "a.txt", "--file", tmp_path / "b.txt", "--generate", 2, out=tmp_path / "f"
    )
    assert stats.batch == 2
    assert re.search(r"a.txt, generated: .*b.txt, generated: ", said, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " "], "the text is empty: --text"),
        (["--text", "a", "--file", "b"], "give one of --text or --file"),
        (["--file", "/missing/file"], "cannot read /missing/file"),
        (["--generate", "0"], "--generate: expected 1 or more, got 0"),
    ],
)
def test_bad_requests_of_the_demo(arguments, message, tmp_path):
    result = invoke("demo", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("width", "cut"), [(80, True), (120, False)])
@pytest.mark.parametrize("steps", [False, True])
def test_the_table_of_layers_fits_the_terminal(width, cut, steps, monkeypatch):
    """However large the numbers: tokens are cut, and nothing is broken into lines."""
    monkeypatch.setattr(terminal.console, "_width", width)
    with torch.no_grad():
        config = AttentionStatsConfig(norms=True)
        dataset = tiny_model()(torch.arange(3, 12)[None], output_attention_stats=config).attention_stats.to_xarray()
    tokens = [["<|im_start|>"] * 8 + ["ĠPhiladelphia"]]
    dataset = dataset.assign_coords(key=range(12_341, 12_350), key_token=(("batch", "key"), tokens))
    if steps:
        dataset = dataset.drop_vars("hidden_layer_median")
    line = {
        "sink_mass": 1.0, "sink_position": 12_345, "share": 1.0, "queries": 12_345, "boost": 1234.0,
        "activation": 24_926.0, "activation_position": 12_349, "activation_over_median": 12_842.0,
    }  # fmt: skip
    lines = pandas.DataFrame([line] * 3, index=[0, 1, 29])
    monkeypatch.setattr("llama_attn.analysis.summarize_layers", lambda row, batch: lines)
    with terminal.console.capture() as captured:
        terminal.console.print(showing._table_of_layers(dataset, "letters.txt"))
    text = captured.get().splitlines()
    assert max(map(len, text)) <= width
    rows = [each.split() for each in text if "×, 1" in each]
    assert [row[0] for row in rows] == ["0", "1", "29"]
    for row in rows:
        assert row[1:3] == ["100%", "12345"]
        assert row[4:9] == ["100%,", "1,234", "×,", "12,345", "24,926,"]
        assert row[9:12] == ["12,842", "×,", "12349"]
        assert (row[3] == "<|im_start|>:", row[12] == "␣Philadelphia") == (not cut, not cut)
        assert row[3][:2] == "<|"
        assert row[12][:2] == "␣P"


def test_a_file_of_ones_own_that_fails(llama, tmp_path):
    """With its line, and without all that led there."""
    for text, said in (
        ("a = 1\nb\n", ", line 2: NameError: name 'b' is not defined"),
        ("a b\n", ": SyntaxError: invalid syntax"),
    ):
        (tmp_path / "mine.py").write_text(text)
        result = invoke("--import", tmp_path / "mine.py", "run", llama, "--prompt", TEXT)
        assert result.exit_code == 2
        assert result.output.startswith(f"llama-attn: --import: {tmp_path / 'mine.py'}{said}")
        assert result.output.count("\n") == 1
