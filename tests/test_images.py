"""`image_segments` and `plot_image_rows`: which tokens stand for which part of a picture, and what attention they get."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
import torch
from image_prompts import IMAGE, gemma_processor, paligemma_processor, picture, qwen_processor
from pages import blocks, run, sections
from PIL import Image
from zoo import ENTRIES
from zoo_base import IMAGE as TINY, TEXT, config, of_class

from llama_attn import AttentionStatsConfig, image_segments, record
from llama_attn.stats.images import ImageSpan
from llama_attn.stats.segments import read_segments
from llama_attn.viz import plot_image_rows


def paligemma(backend):
    settings = config(
        "paligemma", text_config={**TEXT, "model_type": "gemma"}, vision_config={**TINY, "image_size": 8},
        image_token_index=96, projection_dim=32,
    )  # fmt: skip
    return of_class("PaliGemmaForConditionalGeneration", settings)(backend).eval()


@cache
def model_of(family, backend="sdpa"):
    torch.manual_seed(0)
    if family == "paligemma":
        return paligemma(backend)
    model = ENTRIES[{"qwen": "qwen2_5_vl", "qwen3": "qwen3_vl", "gemma": "gemma3"}[family]].build(backend)
    if family == "gemma":
        # It begins with zeros, under which all pictures are the same.
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model


PROCESSORS = {
    "qwen": qwen_processor, "qwen3": qwen_processor, "gemma": gemma_processor, "paligemma": paligemma_processor,
}  # fmt: skip


def prompts(family, rows, side="right"):
    """What the processor makes of a prompt per row, each of which has all of its pictures, and the processor."""
    processor, mark = PROCESSORS[family](), IMAGE[family.removesuffix("3")]
    if family == "paligemma":
        texts = [
            mark * len(pictures) + " what is on the picture"[: -8 * (number + 1)]
            for number, pictures in enumerate(rows)
        ]
    else:
        texts = ["what is " * number + f" {mark} and " * len(pictures) for number, pictures in enumerate(rows, 1)]
    flat = [each for pictures in rows for each in pictures]
    images = [list(pictures) for pictures in rows] if family == "gemma" else flat
    inputs = processor(images=images, text=texts, padding=True, padding_side=side)
    # That of PaliGemma makes arrays of tensors, of which numpy warns.
    return {name: torch.tensor(np.array(value)) for name, value in inputs.items() if name != "labels"}, processor


def fed(family, inputs):
    """What enters the first layer of the decoder (batch, key, channel), from a tower where no patch sees another."""
    model = model_of(family)
    tower = [
        module
        for name, module in model.named_modules()
        if "vis" in name and name.endswith((".self_attn.out_proj", ".attn.proj"))
    ]
    assert len(tower) == 2
    kept = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in tower]
    found = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, given, named: found.append((*given, *named.values())[0]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            for module in tower:
                for parameter in module.parameters():
                    parameter.zero_()
            model(**inputs)
    finally:
        hook.remove()
        for module, state in zip(tower, kept, strict=True):
            module.load_state_dict(state)
    return found[0]


# Sizes (width, height) of the pictures of each row of the batch.
PICTURES = {
    "qwen": [[(24, 16)], [(16, 16), (24, 40)]],
    "qwen3": [[(24, 16)], [(16, 16), (24, 40)]],
    "gemma": [[(32, 16)], [(16, 16), (16, 48)]],
    "paligemma": [[(32, 16)], [(8, 16)]],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", PICTURES)
def test_a_bright_square_changes_the_token_of_its_cell_alone(family, side):
    sizes = PICTURES[family]
    inputs, processor = prompts(family, [[picture(*size) for size in row] for row in sizes], side)
    segments = image_segments(inputs, processor)
    assert [len(spans) for spans in segments.images] == [len(row) for row in sizes]
    before = fed(family, inputs)
    for number, spans in enumerate(segments.images):
        for index, span in enumerate(spans):
            for cell in np.ndindex(*span.grid):
                changed = [
                    [
                        picture(*size, cell, span.grid) if (number, index) == (i, j) else picture(*size)
                        for j, size in enumerate(row)
                    ]
                    for i, row in enumerate(sizes)
                ]
                after = fed(family, prompts(family, changed, side)[0])
                moved = (after - before).abs().amax(-1) > 1e-4 * before.abs().max()
                place = span.first + cell[0] * span.grid[1] + cell[1]
                assert moved.nonzero().tolist() == [[number, place]], (index, cell)
                assert segments.names[segments.labels[number, place]] == f"image {index}"


def test_the_page_on_any_model_runs():
    (code,) = blocks(sections("any_model.md")["Images in prompts"])
    image, prompt = picture(32, 16, (0, 1), (2, 2)), f"what is on the picture {IMAGE['gemma']}"
    known = {"model": model_of("gemma"), "processor": gemma_processor(), "picture": image, "prompt": prompt}
    with torch.no_grad():
        run(code, known)
    _, cells = drawn(known["figure"])
    last = known["shares"].isel(query=-1).sel(layer=2, batch=0).mean("head")
    np.testing.assert_allclose(cells.sum(), last, rtol=1e-5)
    assert cells.shape == (2, 2)


def test_spans_and_grids():
    inputs, processor = prompts("qwen", [[picture(24, 16)], [picture(16, 16), picture(24, 40)]], "left")
    found = image_segments(inputs, processor)
    # Behind 18 of padding and "what is <|vision_start|>", and so on.
    length = inputs["input_ids"].shape[1]
    assert found.images[0] == (ImageSpan(length - 8, length - 2, (2, 3)),)
    assert found.images[1] == (ImageSpan(5, 9, (2, 2)), ImageSpan(12, 27, (5, 3)))
    assert found.names == ("text", "image 0", "image 1")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(found.labels == -1, mask == 0)
    assert torch.equal(found.labels > 0, ids == 96)
    labels, names = read_segments(found)
    assert names == found.names
    assert torch.equal(labels, found.labels)
    lists = {name: value.tolist() for name, value in inputs.items() if name != "pixel_values"}
    assert image_segments(lists, processor) == found


def test_pictures_side_by_side_and_videos():
    processor = qwen_processor()
    ids = [4, *[96] * 4, *[96] * 2, 95, 95, 5]
    found = image_segments({"input_ids": ids, "image_grid_thw": [[1, 4, 4], [1, 2, 4]]}, processor)
    assert found.images == ((ImageSpan(1, 5, (2, 2)), ImageSpan(5, 7, (1, 2))),)
    assert found.labels.tolist() == [[0, 1, 1, 1, 1, 2, 2, -1, -1, 0]]
    # Without a grid of the processor's, that of the user.
    assert image_segments({"input_ids": ids}, processor, grid=(1, 3)).images[0][1] == ImageSpan(4, 7, (1, 3))


@pytest.mark.parametrize(
    ("family", "inputs", "grid", "message"),
    [
        ("qwen", {"input_ids": [4, 96, 96, 5]}, None, r"not of WithoutVideos; give grid=\(rows, columns\)"),
        ("qwen", {"input_ids": [4, 5], "image_grid_thw": [[1, 4, 4]]}, None, r"expected tokens of images \(id 96\), got none"),
        ("qwen", {"input_ids": [96] * 3, "image_grid_thw": [[1, 4, 4]]}, None, "2 × 2 tokens of an image from position 0 of row 0, got 3"),
        ("qwen", {"input_ids": [96] * 5, "image_grid_thw": [[1, 4, 4]]}, None, "row 0 of input_ids has tokens of more images"),
        ("qwen", {"input_ids": [96] * 4, "image_grid_thw": [[1, 4, 4]] * 2}, None, "each of 1 images in the prompts, got 2"),
        ("qwen", {"input_ids": [96] * 8, "image_grid_thw": [[2, 4, 4]]}, None, r"expected 1 frame .*, got \[2, 4, 4\]"),
        ("qwen", {"input_ids": [96] * 4, "image_grid_thw": [[1, 4, 3]]}, None, r"multiples of merge_size=2 .*, got \[1, 4, 3\]"),
        ("gemma", {"input_ids": [96] * 3}, None, "2 × 2 tokens of an image from position 0 of row 0, got 3"),
        ("gemma", {"input_ids": [96, 96, 5, 96, 96]}, None, "2 × 2 tokens of an image from position 0 of row 0, got 2"),
        ("gemma", {"input_ids": [96] * 4}, (0, 4), r"grid: expected two positive integers \(rows, columns\), got \(0, 4\)"),
        ("gemma", {"input_ids": [96] * 4}, 4, "grid: expected two positive integers .*, got 4"),
        ("gemma", {"input_ids": [96.0]}, None, "input_ids: expected integers"),
        ("gemma", {"pixel_values": [1]}, None, "input_ids: expected ids or a mapping"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_refused(family, inputs, grid, message):
    with pytest.raises(ValueError, match=message):
        image_segments(inputs, PROCESSORS[family](), grid=grid)


def test_processors_that_do_not_tell():
    with pytest.raises(ValueError, match=r"expected a square of tokens, got image_seq_length=6; give grid="):
        image_segments({"input_ids": [96] * 6}, gemma_processor(6))
    with pytest.raises(ValueError, match="expected one with an image_token_id, got dict"):
        image_segments({"input_ids": [96] * 6}, {})


@cache
def measured(family, side):
    """Statistics, the prompts' images, and stock eager's weights [layer][batch, head, query, key]."""
    rows = [[picture(*size, (0, 1), (2, 2)) for size in row] for row in PICTURES[family]]
    inputs, processor = prompts(family, rows, side)
    segments = image_segments(inputs, processor)
    settings = AttentionStatsConfig(rows=slice(None), segments=segments)
    with torch.no_grad():
        with record(model_of(family), settings) as recording:
            model_of(family)(**inputs)
        weights = model_of(family, "eager")(**inputs, output_attentions=True).attentions
    return recording.stats, segments, [each.double().numpy() for each in weights], inputs, rows


def drawn(figure):
    """The picture and the cells over it, which cover each other."""
    below, above = figure.axes[0].images
    assert below.get_extent() == above.get_extent()
    assert below.origin == above.origin == "upper"
    left, right, bottom, top = above.get_extent()
    assert left < right
    assert top < bottom
    return below.get_array(), above.get_array().filled(np.nan)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_the_weights_over_the_picture_are_those_of_eager_attention(family, side):
    stats, segments, weights, inputs, rows = measured(family, side)
    assert stats.stack == "model.language_model.layers.#.self_attn"
    for batch, spans in enumerate(segments.images):
        real = inputs["attention_mask"][batch].nonzero()[:, 0].tolist()
        for index, span in enumerate(spans):
            for layer, head, place in ((0, None, -1), (2, 3, -1), (1, 0, -2)):
                figure = plot_image_rows(
                    stats, rows[batch][index], segments, row=len(real) + place, layer=layer, head=head, batch=batch,
                    image_index=index,
                )  # fmt: skip
                line = weights[layer][batch, :, real[place], span.first : span.stop]
                line = line.mean(0) if head is None else line[head]
                grey, cells = drawn(figure)
                np.testing.assert_allclose(cells, line.reshape(span.grid), rtol=2e-5, atol=1e-7)
                assert layer != 2 or len(np.unique(line)) == line.size, "cells can be told apart"
                np.testing.assert_allclose(grey, np.asarray(rows[batch][index])[..., 0] / 255)
                title = " ".join(figure.axes[0].get_title().split())
                assert (
                    f"at {len(real) + place} to image {index} of {len(spans)}, which gets {line.sum():.1%} of it"
                    in title
                )
                assert f"layer {layer}, {'mean over heads 0–3' if head is None else f'head {head}'}" in title
                assert figure.axes[0].get_xlabel() == f"{span.grid[1]} × {span.grid[0]} tokens"
                assert figure.axes[1].get_ylabel() == "attention weight [probability]\nsquare-root scale"
    mass = stats["segment_mass"][0, 1, :, real[-1], 2].double().numpy()
    np.testing.assert_allclose(mass, weights[0][1, :, real[-1], span.first : span.stop].sum(-1), rtol=2e-5)


def test_what_was_generated_looks_at_the_picture_too():
    image = picture(24, 16, (0, 1), (2, 3))
    inputs, processor = prompts("qwen", [[image]])
    segments = image_segments(inputs, processor)
    with record(model_of("qwen"), AttentionStatsConfig(rows="generated", segments=segments)) as recording:
        sequences = model_of("qwen").generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    length, new = inputs["input_ids"].shape[1], 3
    longer = inputs | {"input_ids": sequences[:, :-1], "attention_mask": torch.ones(1, length + new, dtype=torch.long)}
    longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    with torch.no_grad():
        weights = model_of("qwen", "eager")(**longer, output_attentions=True).attentions[1][0]
    assert recording.stats.segments == ("text", "image 0", "generated")
    (span,) = segments.images[0]
    for row in range(length - 1, length + new):
        _, cells = drawn(plot_image_rows(recording.stats, image, segments, row=row, layer=1, head=2))
        np.testing.assert_allclose(cells, weights[2, row, span.first : span.stop].reshape(span.grid), rtol=2e-5)
    assert f"at {length + new - 1} to" in plot_image_rows(recording.stats, image, segments).axes[0].get_title()


def test_the_last_measured_row_and_axes_of_the_user(tmp_path):
    from matplotlib.figure import Figure

    stats, segments, _, inputs, rows = measured("gemma", "right")
    file = tmp_path / "picture.png"
    rows[0][0].save(file)
    stats.save(tmp_path / "stats.safetensors")
    axes = Figure().subplots()
    # Its padding sees what the window shows.
    last = int(inputs["attention_mask"][0].sum()) - 1
    figure = plot_image_rows(tmp_path / "stats.safetensors", file, segments, scale="linear", ax=axes)
    assert figure is axes.figure
    assert f"Attention of the token at {last} to image 0 of 1" in " ".join(axes.get_title().split())
    assert figure.axes[1].get_ylabel() == "attention weight [probability]"
    named = stats.with_tokens(gemma_processor().tokenizer, inputs["input_ids"])
    title = plot_image_rows(named, file, segments).axes[0].get_title()
    assert title.startswith(f"Attention of the token “and” at {last} ")


@pytest.mark.parametrize(
    "image",
    [
        np.full((4, 6), 51, dtype=np.uint8), np.full((4, 6, 1), 51), np.full((4, 6, 3), 0.2), np.full((4, 6, 4), 51),
        torch.full((4, 6, 3), 0.2), Image.new("L", (6, 4), 51), Image.new("RGBA", (6, 4), (51, 51, 51, 9)),
        Image.new("CMYK", (6, 4), (0, 0, 0, 204)),
    ],
)  # fmt: skip
def test_pictures_of_every_kind(image):
    stats, segments, *_ = measured("gemma", "right")
    figure = plot_image_rows(stats, image, segments)
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    grey, _ = drawn(figure)
    np.testing.assert_allclose(grey, np.full((4, 6), 0.2))


def test_colours_become_as_bright_as_pil_says():
    stats, segments, *_ = measured("gemma", "right")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    for each in (image, np.asarray(image) / 255):
        grey, _ = drawn(plot_image_rows(stats, each, segments))
        np.testing.assert_allclose(grey * 255, np.asarray(image.convert("L")), atol=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": -1}, r"row: -1 was not measured, or is padding; there are \[.*\]; AttentionStatsConfig\(rows=…\) chooses"),
        ({"row": 9}, "row: 9 was not measured, or is padding"),
        ({"layer": 3}, "layer: 3 was not measured"),
        ({"head": 4}, "head: 4 was not measured"),
        ({"batch": 2}, "batch: 2 was not measured"),
        ({"image_index": 1}, "image_index: expected one of the 1 images of row 0 of the batch, counted from 0, got 1"),
        ({"image_index": -1}, "image_index: expected one of the 1 images of row 0 .* got -1"),
        ({"scale": "cubic"}, "scale: expected one of"),
        ({"image": np.zeros((3, 4, 6))}, r"image: expected numbers .* got float64 \(3, 4, 6\)"),
        ({"image": np.full((4, 6), 1.5)}, "image: expected float64 from 0 to 1, got 1.5 to 1.5"),
        ({"image": np.full((4, 6), 256)}, "image: expected int64 from 0 to 255, got 256 to 256"),
        ({"image": np.full((4, 6), np.nan)}, "image: expected float64 from 0 to 1, got nan to nan"),
        ({"image": np.array([["a"]])}, "image: expected numbers"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    stats, segments, *_ = measured("gemma", "right")
    given = {"image": picture(8, 8), "segments": segments} | change
    with pytest.raises(ValueError, match=message):
        plot_image_rows(stats, **given)


def test_what_was_not_measured():
    stats, segments, _, inputs, _ = measured("gemma", "right")
    with record(model_of("gemma")) as recording, torch.no_grad():
        model_of("gemma")(**inputs)
    with pytest.raises(ValueError, match=r"row_weights were not measured; measure with AttentionStatsConfig\(rows="):
        plot_image_rows(recording.stats, picture(8, 8), segments)
    with pytest.raises(TypeError, match="segments: expected what image_segments returns, got ImageSpan"):
        plot_image_rows(stats, picture(8, 8), segments.images[0][0])
    longer = {"input_ids": torch.tensor([[4] * 40 + [96] * 4]), "attention_mask": torch.ones(1, 44, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"got one at 40 to 43; measured keys are \[0\] to"):
        plot_image_rows(stats, picture(8, 8), image_segments(longer, gemma_processor()))
    with pytest.raises(ValueError, match="expected images of row 1 of the batch, got 1 rows"):
        plot_image_rows(stats, picture(8, 8), image_segments(longer, gemma_processor()), batch=1)
