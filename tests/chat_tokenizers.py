"""Tokenizers of every kind, small enough to be made in a test."""

from __future__ import annotations

from chat_templates import BOS, EOS, FAMILIES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from llama_attn.stats.token_text import byte_alphabet

SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": "<pad>"}


def fast(model, name, *, normalizer=None, pre_tokenizer=None, decoder=None, **special):
    tokenizer = Tokenizer(model)
    for part, value in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if value is not None:
            setattr(tokenizer, part, value)
    family = FAMILIES[name]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL | special, additional_special_tokens=list(family.special)
    )
    wrapped.chat_template = family.template
    return wrapped


def byte_level(name, *merges, **special):
    """Bytes as tokens, as GPT-2, Llama 3 and Qwen have them, and the merges that are asked for."""
    vocabulary = [*byte_alphabet(), *(a + b for a, b in merges)]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return fast(model, name, pre_tokenizer=words, decoder=decoders.ByteLevel(), **special)


def sentence_piece(name):
    """Spaces as ▁, one of them put before the text, and bytes for what is not in the vocabulary: Llama 2."""
    letters = "abcdefghijklmnopqrstuvwxyz▁[]/INST"
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁h", "▁hi", "hi"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [("▁", "h"), ("▁h", "i"), ("h", "i")],
        unk_token="<unk>",  # noqa: S106
        byte_fallback=True,
    )
    return fast(model, name, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def lower_case(name):
    """Its tokens do not spell the text, as BERT's do not."""
    tokens = ["<unk>", *map(chr, range(32, 127)), "é", "\n"]
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")  # noqa: S106
    normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])
    return fast(model, name, normalizer=normalizer, pre_tokenizer=pre_tokenizers.Split("", "isolated"))


class Letters(PreTrainedTokenizer):
    """One written in Python, without offsets: letters as tokens."""

    def __init__(self, lower=False, **special):
        self.lower, self.letters = lower, ["<unk>", *map(chr, range(32, 127)), "\n", "é"]
        super().__init__(unk_token="<unk>", **SPECIAL | special)  # noqa: S106

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text.lower() if self.lower else text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token) if token in self.letters else 0

    def _convert_id_to_token(self, index):
        return self.letters[index]
