"""The runs of SmolLM2-135M that the pages of the documentation show; imported by the scripts that write them."""

from __future__ import annotations

from functools import cached_property

import pandas
import torch
from pictured_run import Pictured, measure_picture
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_attn import AttentionStats, AttentionStatsConfig, LlamaForCausalLM
from llama_attn.analysis.keep_mask import POLICIES
from llama_attn.cli.ablate import losses
from llama_attn.cli.budget import curves, read_before
from llama_attn.demo import demo_checkpoint

# Herman Melville, Moby-Dick (1851).
TEXT = (
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing "
    "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. "
    "It is a way I have of driving off the spleen and regulating the circulation.\n\n"
    "Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever "
    "I find myself involuntarily pausing before coffin warehouses, and bringing up the rear of every funeral I meet; "
    "then, I account it high time to get to sea as soon as I can."
)
# So many tokens of it fit as labels of a map.
BEGINNING = 40
# Layers whose heads are taken out one by one.
ABLATED = 6
# Length of the random sequence, its copies per row, and rows.
REPEATED, ROWS = 64, 4
# Tokens that are read before those whose loss is taken.
READ = 96
# Documents and a question that one of them answers.
DOCUMENTS = {
    "whale": "The blue whale is the largest animal that has ever lived. An adult can be 30 metres long and weigh 190 "
    "tonnes. It feeds on krill, small animals of the open sea, of which it eats up to four tonnes a day.",
    "tower": "The Eiffel Tower was built for the World's Fair of 1889 in Paris. Its architect was Stephen Sauvestre. It is "
    "330 metres tall and was the tallest structure of the world for 41 years.",
    "dough": "For the dough, mix 300 grams of flour with 200 millilitres of water, a spoon of oil and some salt. Let it "
    "rest for one hour, roll it out and bake it for ten minutes in a hot oven.",
}
QUESTION = "Question: Who was the architect of the Eiffel Tower, and how tall is it?"


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model, under the name that the command line gives it, and its tokenizer."""
    checkpoint = demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, gguf_file=checkpoint.gguf_file)
    model = LlamaForCausalLM.from_pretrained(
        checkpoint.name, gguf_file=checkpoint.gguf_file, dtype=torch.float32, attn_implementation="streaming"
    ).eval()
    model.config.name_or_path = checkpoint.title
    return model, tokenizer


class Runs:
    """What is measured, by the names that the files of the gallery know it by; each when it is asked for, and once.

    A picture waits for what it shows alone.
    """

    @cached_property
    def _loaded(self) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
        return load()

    @cached_property
    def _ids(self) -> torch.Tensor:
        ids: torch.Tensor = self._loaded[1](TEXT, return_tensors="pt")["input_ids"]
        return ids

    def _run(self, ids: torch.Tensor) -> AttentionStats:
        """Every statistic."""
        model, tokenizer = self._loaded
        config = AttentionStatsConfig(statistics="all", norms=True)
        with torch.no_grad():
            outputs = model(ids, use_cache=False, output_attention_stats=config)
        stats: AttentionStats = outputs.attention_stats
        return stats.with_tokens(tokenizer, ids)

    @cached_property
    def text(self) -> AttentionStats:
        """`TEXT` as it is."""
        return self._run(self._ids)

    @cached_property
    def beginning(self) -> AttentionStats:
        """Its first `BEGINNING` tokens."""
        return self._run(self._ids[:, :BEGINNING])

    @cached_property
    def other(self) -> AttentionStats:
        """The same with the first token replaced by the one that begins a chat."""
        other = self._ids[:, :BEGINNING].clone()
        other[0, 0] = self._loaded[1].bos_token_id
        return self._run(other)

    @cached_property
    def repeated(self) -> AttentionStats:
        """Rows of that token and twice the same random tokens."""
        half = torch.randint(100, 48_000, (ROWS, REPEATED), generator=torch.Generator().manual_seed(0))
        return self._run(torch.cat([torch.full((ROWS, 1), self._loaded[1].bos_token_id), half, half], 1))

    @cached_property
    def budget(self) -> pandas.DataFrame:
        """What smaller caches keep of the first `READ` tokens of the text, and the loss of those behind them."""
        return _budget(self._loaded[0], self._ids)

    @cached_property
    def ablation(self) -> pandas.DataFrame:
        """The loss on the beginning without each head of the first `ABLATED` layers."""
        return ablate(self._loaded[0], self._ids[:, :BEGINNING])

    @cached_property
    def pictured(self) -> Pictured:
        """A prompt with a picture, read by another model."""
        return measure_picture()

    @cached_property
    def answer(self) -> AttentionStats:
        """What the model generates when it is asked `QUESTION` behind `DOCUMENTS`, which are segments."""
        return _answer(*self._loaded)


def _answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> AttentionStats:
    parts = [("special", "<|im_start|>user\n"), *((name, f"{text}\n\n") for name, text in DOCUMENTS.items())]
    parts += [("question", QUESTION), ("special", "<|im_end|>\n<|im_start|>assistant\n")]
    pieces = [(name, tokenizer(text)["input_ids"]) for name, text in parts]
    prompt = torch.tensor([[number for _, ids in pieces for number in ids]])
    segments = [[name for name, ids in pieces for _ in ids]]
    output = model.generate(
        prompt, max_new_tokens=40, do_sample=False, return_dict_in_generate=True,
        output_attention_stats=AttentionStatsConfig(segments=segments, rows="generated"),
    )  # fmt: skip
    stats: AttentionStats = output.attention_stats
    return stats.with_tokens(tokenizer, output.sequences)


@torch.no_grad()
def _budget(model: LlamaForCausalLM, ids: torch.Tensor) -> pandas.DataFrame:
    read, stats = read_before(model, ids, READ, POLICIES)
    frame = curves(read, stats.to_xarray(), POLICIES, (8, 16, 32, 64))
    frame.attrs |= {"model": model.config.name_or_path, "text": f"Call me Ishmael: {READ} tokens kept from"}
    return frame


def ablate(model: LlamaForCausalLM, ids: torch.Tensor) -> pandas.DataFrame:
    """The loss of the model without each head of its first layers."""
    heads = [(layer, head) for layer in range(ABLATED) for head in range(model.config.num_attention_heads)]
    with torch.no_grad():
        whole, frame, _ = losses(model, [ids], heads)
    frame.attrs |= {"model": model.config.name_or_path, "text": f"{ids.shape[1]} tokens", "loss": whole}
    return frame
