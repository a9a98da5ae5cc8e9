"""Every block of Python in the README and on the pages runs as it stands there, block by block."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from corpora import Letters, measured, model as reader, write
from image_prompts import IMAGE, gemma_processor, picture
from oracle import stock_of
from pages import blocks, run, steps
from test_images import model_of, prompts
from trainers import trainer_for
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from llama_attn import AttentionStatsConfig, LlamaForCausalLM
from llama_attn.cli import app, corpus, terminal

ROOT = Path(__file__).parent.parent
# Other tests run them, on what these pages ask for.
ELSEWHERE = {"docs/recipes.md", "docs/coming_from.md"}
EVERYTHING = AttentionStatsConfig(statistics="all", norms=True)
TUTORIALS, CONCEPTS = (
    [f"docs/{folder}/{path.name}" for path in sorted((ROOT / "docs" / folder).glob("*.md"))]
    for folder in ("tutorials", "concepts")
)
NUMBER = re.compile(r"(?<![\w.])-?[\d,]*\.?\d+(?:e[+-]\d+)?(?![\w.])")
# The page on the report names tokens of a text of about this length.
LONG = 6_300


def with_code():
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    named = {str(path.relative_to(ROOT)): blocks(path.read_text()) for path in found}
    return {name: code for name, code in named.items() if code and name not in ELSEWHERE.union(TUTORIALS, CONCEPTS)}


class Reader:
    """What a reader of the pages has: a model, its tokenizer, a conversation, and what was measured of it."""

    def __init__(self, smollm2, folder, patch):
        import measured_runs

        self.model, self.tokenizer = smollm2
        self.folder, self.patch, self.runs = folder, patch, measured_runs
        self.model.set_attn_implementation("streaming")
        settings = copy.deepcopy(self.model.generation_config)
        settings.max_new_tokens, settings.do_sample = 4, False
        patch.setattr(self.model, "generation_config", settings)
        self.ids = self.tokenizer(measured_runs.TEXT, return_tensors="pt")["input_ids"]

    def measure(self, ids):
        stats = self.model(ids, use_cache=False, output_attention_stats=EVERYTHING).attention_stats
        return stats.with_tokens(self.tokenizer, ids)

    def readme(self):
        messages = [{"role": "user", "content": self.runs.TEXT}]
        settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = self.tokenizer.apply_chat_template(messages, **settings)
        stats = self.measure(inputs["input_ids"])
        for name in ("a", "b"):
            stats.save(f"{name}.safetensors")

        def from_pretrained(name, attn_implementation):
            self.model.set_attn_implementation(attn_implementation)
            return self.model

        self.patch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
        named = {
            "model": self.model, "any_transformers_model": stock_of(self.model), "tokenizer": self.tokenizer, "inputs": inputs,
            "messages": messages, "my_attention": ALL_ATTENTION_FUNCTIONS["sdpa"],
            "trainer": trainer_for(tiny_model(), self.folder),
        }  # fmt: skip
        inputs_of_picture, _ = prompts("qwen", [[picture(16, 16)]], "left")
        sees = {"model": model_of("qwen"), "config": True, "inputs": inputs_of_picture}
        return named, {"model.visual": sees, "classify_heads": {"stats": stats}}

    def any_model(self):
        image, prompt = picture(32, 16, (0, 1), (2, 2)), f"what is on the picture {IMAGE['gemma']}"
        sees = {"model": model_of("gemma"), "processor": gemma_processor(), "picture": image, "prompt": prompt}
        keep = torch.arange(self.ids.shape[1])[None] % 2 == 0
        named = self.text()[0] | {"labels": self.ids, "keep": keep, "prompt_length": self.ids.shape[1]}
        return named, {"image_segments": sees}

    def report(self):
        model = tiny_model("streaming")
        model.generation_config.max_new_tokens = 4
        ids = torch.randint(3, 97, (1, LONG), generator=torch.Generator().manual_seed(0))
        stats = model(ids, output_attention_stats=EVERYTHING).attention_stats
        inputs = {"input_ids": ids[:, :40], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
        named = {
            "model": model,
            "tokenizer": self.tokenizer,
            "inputs": inputs,
            "segments": [["a"] * 40],
            "stats": stats,
        }
        return named, {}

    def corpus(self):
        summaries = {}
        for name, count in (("base", 20), ("tuned", 30)):
            write(self.folder / name, count=count)
            summaries[name] = measured(self.folder / name, self.folder / f"run of {name}")
        (self.folder / "run").mkdir()
        summaries["base"].save("run/summary.safetensors")
        return summaries | {"load": lambda: (reader(), Letters())}, {}

    def gallery(self):
        self.patch.setattr(self.runs, "ABLATED", 1)
        beginning = self.ids[:, : self.runs.BEGINNING]
        return self.text()[0] | {
            "budget": self.runs._budget(self.model, self.ids), "ablation": self.runs.ablate(self.model, beginning),
            "pictured": self.runs.measure_picture(), "answer": self.runs._answer(self.model, self.tokenizer),
        }, {}  # fmt: skip

    def text(self):
        inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        return {"model": self.model, "tokenizer": self.tokenizer, "inputs": inputs}, {}


@pytest.fixture
def a_reader(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs")
    return Reader(smollm2, tmp_path, monkeypatch)


@pytest.mark.smollm2
@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize("name", with_code())
def test_every_block_runs(name, a_reader):
    torch.manual_seed(0)
    with torch.no_grad():
        # What a page has all along, and what single blocks of it, known by a word in them, have besides.
        named, besides = getattr(a_reader, Path(name).stem.lower(), a_reader.text)()
        left = {}
        for code in with_code()[name]:
            left |= named
            for word, more in besides.items():
                left |= more if word in code else {}
            run(code, left)


FILE = re.compile(r"# (\w+\.py)\n")


def on_the_command_line(lines):
    """What the commands print."""
    for line in lines.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "llama-attn"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        # What libraries and the search for the model tell is another matter.
        print(result.stdout, end="")  # noqa: T201


def printed(text):
    """Lines of words and numbers, without what nobody sees."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [[word for word in NUMBER.split(line) for word in word.split()] for line in lines], [
        found for line in lines for found in NUMBER.findall(line)
    ]


def assert_says(shown, said):
    """The same words, and numbers that differ by one in their last digit at most, as another processor may round them.

    Errors of rounding, which are written with an exponent, are of the same size.
    """
    (words, numbers), (expected, quoted) = printed(shown), printed(said)
    assert words == expected
    for number, quote in zip(numbers, quoted, strict=True):
        if "e" in quote:
            assert 1 / 3 < float(number) / float(quote) < 3, (number, quote)
            continue
        digits = len(quote.partition(".")[2])
        last = 10.0**-digits if digits else 0
        assert abs(float(number.replace(",", "")) - float(quote.replace(",", ""))) < 1.5 * last + 1e-12, (number, quote)


@pytest.mark.smollm2
@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize("name", TUTORIALS + CONCEPTS)
def test_every_lesson_prints_what_it_says(name, a_reader):
    known = a_reader.text()[0] if name in CONCEPTS else {"model": a_reader.model, "tokenizer": a_reader.tokenizer}
    # As wide as a page.
    a_reader.patch.setattr(terminal.console, "_width", 120)
    # The commands read the same model, without loading it again.
    a_reader.patch.setattr(corpus, "load_model", lambda *_, **__: a_reader.model)
    a_reader.patch.setattr(corpus, "load_tokenizer", lambda *_: a_reader.tokenizer)
    for language, code, said in steps((ROOT / name).read_text()):
        # A block that begins with the name of a file is what stands in it.
        if named := FILE.match(code):
            (a_reader.folder / named[1]).write_text(code)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            run(code, known) if language == "python" else on_the_command_line(code)
        if said:
            assert_says(shown.getvalue(), said)
    # What a page begins with gives what the other pages begin with.
    if name == "docs/concepts/index.md":
        assert torch.equal(known["inputs"]["input_ids"], a_reader.ids)
        assert torch.equal(known["model"].lm_head.weight, a_reader.model.lm_head.weight)


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_concept_says_what_its_code_needs_and_shows_what_it_gives(name):
    page = (ROOT / name).read_text()
    assert steps(page)[-1][2], "what the block prints stands below it"
    assert name.endswith("index.md") or "are those of [Concepts](index.md):\n\n```python" in page


def test_pages_have_code():
    assert len(TUTORIALS) == 7
    assert steps("```bash\na\n```\n\n```text\nb\n```\n```python\nc\n```\nd\n\n```text\ne\n```\n") == [
        ("bash", "a\n", "b\n"),
        ("python", "c\n", ""),
    ]
    assert {"README.md", "docs/index.md", "docs/any_model.md", "docs/gallery.md"} <= set(with_code())
    assert blocks("a\n```python\nb = 1\n```\n```bash\nc\n```\n") == ["b = 1\n"]
