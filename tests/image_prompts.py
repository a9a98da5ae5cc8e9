"""Processors of models that see, made without a download, and prompts with pictures for the zoo's models."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = [*SPECIAL.values(), "what", "is", "on", "the", "picture", "and"]
# Ids of the zoo's models.
QWEN = {"<|vision_end|>": 93, "<|vision_start|>": 94, "<|video_pad|>": 95, "<|image_pad|>": 96}
GEMMA = {"<end_of_image>": 94, "<start_of_image>": 95, "<image_soft_token>": 96}


class WithoutVideos(Qwen2_5_VLProcessor):
    """Its processor of videos needs torchvision, and cannot be left out otherwise."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def tokenizer(special, **named):
    vocabulary = {word: number for number, word in enumerate(WORDS)} | special
    words = Tokenizer(models.WordLevel(vocabulary, SPECIAL["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=named, **SPECIAL)
    fast.add_tokens(list(special), special_tokens=True)
    return fast


def qwen_processor():
    """Patches of 4 × 4 pixels, merged by twos, of pictures as large as they are."""
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 10**6})
    return WithoutVideos(images, tokenizer(QWEN), None)


def gemma_processor(tokens=4, **settings):
    """Pictures stretched to 16 × 16 pixels, of which the tokens are a square."""
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, **settings)
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return Gemma3Processor(images, tokenizer(GEMMA, **named), image_seq_length=tokens)


def paligemma_processor(tokens=4):
    """Pictures stretched to 8 × 8 pixels, each of which depends on its neighbours alone."""
    images = SiglipImageProcessorPil(size={"height": 8, "width": 8}, resample=Image.Resampling.BILINEAR)
    images.image_seq_length = tokens
    return PaliGemmaProcessor(images, tokenizer({"<image>": 96}, **{"image_token": "<image>"}))


IMAGE = {"qwen": "<|vision_start|><|image_pad|><|vision_end|>", "gemma": "<start_of_image>", "paligemma": "<image>"}


def picture(width, height, cell=None, grid=(1, 1), colour=255):
    """A dark picture, with a bright square in the middle of a cell (row, column) of a grid."""
    pixels = np.full((height, width, 3), 20, dtype=np.uint8)
    if cell is not None:
        tall, wide = height / grid[0], width / grid[1]
        rows = slice(round((cell[0] + 0.3) * tall), round((cell[0] + 0.7) * tall))
        columns = slice(round((cell[1] + 0.3) * wide), round((cell[1] + 0.7) * wide))
        pixels[rows, columns] = colour
    return Image.fromarray(pixels)
