"""A prompt with a picture, read by a tiny random Gemma 3, for the page of figures: the demo model has no eyes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from llama_attn import AttentionStats, AttentionStatsConfig, image_segments, record
from llama_attn.stats.images import ImageSegments

WORDS = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<start_of_image>", "<image_soft_token>", "<end_of_image>",
    "What", "shines", "here", "?",
)  # fmt: skip
# Pixels of a patch, and tokens along each side of the picture.
PATCH, SIDE = 4, 16
# By how much scores are multiplied.
SHARPER = 8.0
# One of which a head prefers what is bright.
SEED = 17


@dataclass(frozen=True)
class Pictured:
    """What was measured.

    Args:
        stats: Weights of the last token.
        image: The picture.
        segments: Where its tokens stand.
    """

    stats: AttentionStats
    image: Image.Image
    segments: ImageSegments


def measure_picture() -> Pictured:
    """Ask a random model what shines in the picture."""
    processor, image = _processor(), _picture()
    inputs = processor(images=[[image]], text=["<bos> <start_of_image> What shines here ?"], return_tensors="pt")
    segments = image_segments(inputs, processor)
    model = _model()
    with record(model, AttentionStatsConfig(rows=(-1,), segments=segments)) as recording, torch.no_grad():
        model(**inputs)
    return Pictured(recording.stats.with_tokens(processor.tokenizer, inputs["input_ids"]), image, segments)


def _picture() -> Image.Image:
    """A house on a hill under the moon."""
    height, width = 192, 256
    night = np.linspace(60, 200, height)[:, None, None] * np.array([0.45, 0.6, 1.0])
    image = Image.fromarray(np.broadcast_to(night, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((-60, 130, 320, 330), fill=(30, 66, 38))
    draw.rectangle((60, 96, 128, 150), fill=(150, 96, 76))
    draw.polygon(((50, 98), (94, 62), (138, 98)), fill=(50, 20, 20))
    draw.rectangle((74, 110, 90, 128), fill=(255, 226, 120))
    draw.ellipse((184, 22, 228, 66), fill=(250, 246, 214))
    return image


def _processor() -> Gemma3Processor:
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, WORDS[3]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("boi_token", "image_token", "eoi_token"), WORDS[4:7], strict=True))
    kinds = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), WORDS[:4], strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=named, **kinds)
    size = {"height": SIDE * PATCH, "width": SIDE * PATCH}
    return Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, image_seq_length=SIDE**2)


def _model() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(SEED)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"vocab_size": len(WORDS), "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"]}
    config = Gemma3Config(
        text_config=shared | text | {"initializer_range": 0.3},
        vision_config=shared | {"image_size": SIDE * PATCH, "patch_size": PATCH, "initializer_range": 0.1},
        mm_tokens_per_image=SIDE**2, boi_token_index=4, image_token_index=5, eoi_token_index=6,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    # What a patch shows, not where it stands; and attention that is far from uniform.
    torch.nn.init.zeros_(model.model.vision_tower.embeddings.position_embedding.weight)
    torch.nn.init.constant_(model.model.language_model.layers[0].self_attn.q_norm.weight, SHARPER - 1)
    return model
