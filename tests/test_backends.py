"""The registry of backends, and what it puts into transformers' tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import ENTRIES
from zoo_situations import draw, padding

from llama_attn import available_backends, register_backend
from llama_attn.backends.registry import get_backend
from llama_attn.engines import torch as torch_engine
from llama_attn.testing import FEATURES, assert_matches_reference, make_inputs, relative_error

BUILT_IN = {
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "streaming", "streaming_native",
    "streaming_torch", "streaming_triton",
}  # fmt: skip


def test_available_backends():
    backends = available_backends()
    assert set(backends) >= BUILT_IN
    assert [backends[name] for name in ("eager", "sdpa", "streaming", "streaming_torch")] == [None] * 4
    if not torch.cuda.is_available():
        assert "pip install flash-attn --no-build-isolation" in backends["flash_attention_2"]


def test_both_tables_are_filled():
    for name in ("streaming", "streaming_torch"):
        assert name in ALL_ATTENTION_FUNCTIONS.valid_keys()
        assert name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("backend", "also"),
    [
        ("eager", FEATURES),
        ("sdpa", ("bidirectional", "window")),
        ("streaming", FEATURES),
        ("streaming_torch", FEATURES),
    ],
)
def test_outputs_match_float64(backend, also, dtype):
    if (backend, dtype) == ("eager", torch.float64):
        # Its softmax is in float32, where the lowest float64 is -inf.
        with pytest.raises(AssertionError, match="'padding': 'left'}: a row that sees nothing is NaN"):
            assert_matches_reference(backend, also=also, dtype=dtype)
    else:
        assert_matches_reference(backend, also=also, dtype=dtype)


def test_eager_attention_of_transformers_is_nan_in_float64_behind_padding(ids, left_padding):
    """What the check says of it is what happens."""
    with torch.no_grad():
        logits = tiny_model("eager").double()(ids, attention_mask=left_padding).logits
    assert logits[left_padding.bool()].isnan().any()


@pytest.mark.usefixtures("restored_registry")
def test_a_name_may_have_a_space(ids):
    """transformers reads nothing in it, files are not named after it, and a shell quotes it."""
    register_backend("my topk", sdpa_attention_forward)
    with torch.no_grad():
        stats = tiny_model("my topk")(ids, output_attention_stats=True).attention_stats
    assert stats.backend == "my topk"


def ignores_padding(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def ignores_everything(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, torch.ones(1, 1, 1, 1, dtype=torch.bool), **kwargs)


def ignores_causality(module, query, key, value, attention_mask, **kwargs):
    # Of the mask, only what no query sees.
    real = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask.any(-2, keepdim=True)
    return sdpa_attention_forward(module, query, key, value, real, **kwargs)


def forgets_the_cache(module, query, key, value, attention_mask, **kwargs):
    if attention_mask is not None and query.shape[2] < key.shape[2]:
        attention_mask = attention_mask.any(-2, keepdim=True) & torch.ones(query.shape[2], key.shape[2]).tril().bool()
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def forgets_scaling(module, query, key, value, attention_mask, scaling, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=1.0, **kwargs)


def scales_twice(module, query, key, value, attention_mask, scaling, **kwargs):
    return sdpa_attention_forward(module, query * scaling, key, value, attention_mask, scaling=scaling, **kwargs)


def scales_by_channels(module, query, key, value, attention_mask, scaling, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def scales_half(module, query, key, value, attention_mask, scaling, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling / 2, **kwargs)


def repeats_in_turn(module, query, key, value, attention_mask, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)
    module.num_key_value_groups = 1
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def written_out(apply_mask, grouped=True):
    """Attention as it is written by hand, with a mask that is applied in some way."""

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if grouped:
            key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
        queries, keys = query.shape[2], key.shape[2]
        if attention_mask is None:
            attention_mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        scores = apply_mask(query @ key.mT * scaling, attention_mask)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    return attend


def hides_by_lowest(scores, mask):
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def hides_by_infinity(scores, mask):
    return scores.masked_fill(~mask, -torch.inf)


def inverts(scores, mask):
    return hides_by_lowest(scores, ~mask)


def inverts_by_infinity(scores, mask):
    return hides_by_infinity(scores, ~mask)


def inverts_for_sdpa(module, query, key, value, attention_mask, **kwargs):
    mask = None if attention_mask is None else ~attention_mask
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def wrong_layout(module, query, key, value, attention_mask, **kwargs):
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.transpose(1, 2), weights


def without_weights(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]


def of_half_precision(module, query, key, value, attention_mask, **kwargs):
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.half(), weights


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (without_weights, r"'broken' in {'queries': 1}: expected \(output, weights or None\), got Tensor"),
        (lambda *_, **options: None, r"expected \(output, weights or None\), got NoneType"),
        (of_half_precision, r"expected output .* of torch.float32, got .* of torch.float16"),
        (ignores_padding, r"'left'.*error .* is above \S+; the error is of padding \(it is not hidden\)"),
        (ignores_causality, r"'queries': 7.*the error is of causality \(later keys are not hidden\)"),
        (ignores_everything, r"'queries': 7.*the error is of causality \(later keys are not hidden\)"),
        (forgets_the_cache, r"'cached': 12.*the error is of causality \(queries are counted from the first key"),
        (forgets_scaling, r"'queries': 7.*; the error is of scaling \(it is left out\)$"),
        (scales_twice, r"'queries': 7.*; the error is of scaling \(it is applied twice\)$"),
        (
            scales_by_channels,
            r"'scaling': 0.5}: .*; the error is of scaling \(it is 1 / √channel, whatever the keyword says",
        ),
        (scales_half, r"'queries': 7.* error \S+ is above \S+$"),
        (
            repeats_in_turn,
            r"{'queries': 1}: .* is of grouped heads \(KV heads are repeated by repeat, not by repeat_inter",
        ),
        (written_out(inverts), r"'queries': 7.*; the error is of the mask \(it is inverted"),
        (written_out(inverts_by_infinity), r"{'queries': 1}.* got nan; the error is of the mask \(it is inverted"),
        (inverts_for_sdpa, r"'padding': 'left'.*; the error is of the mask \(it is inverted"),
        (written_out(torch.add), r"'queries': 7.*; the error is of the mask \(bool, it is added to the scores"),
        (wrong_layout, "expected output"),
    ],
)
@pytest.mark.usefixtures("restored_registry")
def test_the_check_can_fail(attend, message):
    register_backend("broken", attend)
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference("broken")


@pytest.mark.usefixtures("restored_registry")
def test_an_error_inside_names_its_situation():
    register_backend("broken", written_out(hides_by_lowest, grouped=False))
    message = r"'broken' in {'queries': 1}: RuntimeError: The size of tensor a \(4\) .*; the error is of grouped heads \(there are"
    with pytest.raises(AssertionError, match=message) as found:
        assert_matches_reference("broken")
    assert isinstance(found.value.__cause__, RuntimeError)

    def fails_behind_a_cache(module, query, key, *rest, **kwargs):
        if query.shape[2] < key.shape[2]:
            raise IndexError("no cache")
        return sdpa_attention_forward(module, query, key, *rest, **kwargs)

    register_backend("broken", fails_behind_a_cache)
    with pytest.raises(AssertionError, match=r"'broken' in {'queries': 1, 'cached': 20}: IndexError: no cache$"):
        assert_matches_reference("broken")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("restored_registry")
def test_padding_has_to_be_finite(dtype, ids, left_padding):
    """It reaches real tokens: what the check says is what happens in a model."""
    register_backend("broken", written_out(hides_by_infinity))
    message = r"'padding': 'left'}: a row that sees nothing is NaN, first batch row 0, query 0; expected finite output"
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference("broken", dtype=dtype)
    with torch.no_grad():
        logits = tiny_model("broken")(ids, attention_mask=left_padding).logits
    assert logits[left_padding.bool()].isnan().any()
    register_backend("broken", written_out(hides_by_lowest))
    assert_matches_reference("broken", dtype=dtype)
    with torch.no_grad():
        logits = tiny_model("broken")(ids, attention_mask=left_padding).logits
    assert logits.isfinite().all()

    def infinite_where_padded(module, query, key, value, attention_mask, **kwargs):
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        padded = (
            torch.zeros(1, dtype=torch.bool) if attention_mask is None else ~attention_mask.diagonal(0, -2, -1)[:, 0]
        )
        return output.masked_fill(padded[..., None, None], torch.inf) if query.shape[2] > 5 else output, weights

    register_backend("broken", infinite_where_padded)
    with pytest.raises(AssertionError, match=r"a row that sees nothing is infinite, first batch row 0, query 0"):
        assert_matches_reference("broken", dtype=dtype)

    def infinite_on_the_right(module, query, key, value, attention_mask, **kwargs):
        output, weights = infinite_where_padded(module, query, key, value, attention_mask, **kwargs)
        return output if attention_mask is None or attention_mask[0, 0, 0, 0] else output.nan_to_num(
            posinf=0.0
        ), weights

    register_backend("broken", infinite_on_the_right)
    with pytest.raises(AssertionError, match=r"'right'}: a row of padding is infinite, first batch row 0, query 22;"):
        assert_matches_reference("broken", dtype=dtype)


@pytest.mark.usefixtures("restored_registry")
def test_a_function_that_takes_no_other_keywords_is_refused(ids):
    def without(
        module, query, key, value, attention_mask, scaling=None, dropout=0.0, position_ids=None, use_cache=None
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)

    register_backend("broken", without)
    with pytest.raises(
        AssertionError, match=r"'broken': expected a function that ends with \*\*kwargs, got .*; add \*\*kwargs"
    ):
        assert_matches_reference("broken")
    model = ENTRIES["qwen2"].build("broken")
    with pytest.raises(TypeError, match="unexpected keyword argument 'sliding_window'"):
        model(draw(12))


def leaves_softcap(module, query, key, value, attention_mask, softcap=None, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def divides_by_softcap(module, query, key, value, attention_mask, scaling, softcap=1.0, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling / softcap, **kwargs)


def is_always_causal(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=query.shape[2] > 1, **kwargs)


def forgets_padding_of_encoders(module, query, key, value, attention_mask, **kwargs):
    mask = attention_mask if module.is_causal else None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def ignores_windows(module, query, key, value, attention_mask, **kwargs):
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None:
        real = attention_mask.any(-2, keepdim=True)
        attention_mask = real & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("attend", "also", "message"),
    [
        (
            leaves_softcap,
            "softcap",
            r"'softcap': 2.0}: error \S+ is .*; the error is of the soft-cap \(it is not applied\)$",
        ),
        (divides_by_softcap, ["softcap"], r"'softcap': 2.0}: error \S+ is above \S+$"),
        # It leaves `s_aux` among its keywords.
        (sdpa_attention_forward, "sinks", r"'sinks': True}: .*; the error is of the sinks \(they are left out\)$"),
        (
            is_always_causal,
            {"bidirectional"},
            r"'bidirectional': True}: .* of both directions \(later keys are hidden\)$",
        ),
        (
            forgets_padding_of_encoders,
            ("bidirectional",),
            r"'bidirectional': True}: .* of padding \(it is not hidden\)$",
        ),
        (ignores_windows, "window", r"'window': 7}: .* of the window \(keys before it are not hidden\)$"),
    ],
)
@pytest.mark.usefixtures("restored_registry")
def test_the_check_of_what_other_models_ask_can_fail(attend, also, message, dtype):
    register_backend("broken", attend)
    assert_matches_reference("broken", dtype=dtype)
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference("broken", also=also, dtype=dtype)


@pytest.mark.parametrize(("feature", "situation"), [(name, each) for name in FEATURES for each in FEATURES[name]])
def test_every_situation_shows_its_feature(feature, situation):
    """Left out, it changes the output by more than the roundings of bfloat16; engines are told the same as the reference."""
    inputs = make_inputs(**situation, dtype=torch.float64)
    real, expected = inputs.real_keys[:, inputs.cached :], inputs.reference().output.transpose(1, 2)
    without = replace(inputs, **{feature: False if feature == "bidirectional" else None}).reference().output
    assert relative_error(without.transpose(1, 2)[real], expected[real]) > 2 * 4 * torch.finfo(torch.bfloat16).eps
    walk = torch_engine.walk(inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring)
    assert relative_error(walk.output[real], expected[real]) < 1e-12


@pytest.mark.parametrize(
    ("feature", "model", "own"),
    [
        ("softcap", "gemma2", {("softcap", float)}),
        ("sinks", "gpt_oss", {("s_aux", (4,))}),
        ("bidirectional", "bert", set()),
        ("window", "mistral", {("sliding_window", int)}),
    ],
)
@pytest.mark.usefixtures("restored_registry")
def test_the_check_calls_as_a_model_calls(feature, model, own):
    """With the keywords, a mask and a direction that the layers of such a model have, with padding and without."""
    calls = []

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        mask = None if attention_mask is None else (attention_mask.dtype, attention_mask.ndim)
        given = {name: tuple(of.shape) if torch.is_tensor(of) else type(of) for name, of in kwargs.items()}
        calls.append((module.is_causal, mask, set(given.items())))
        return torch.zeros_like(query).transpose(1, 2), None

    register_backend("seen", attend)
    assert_matches_reference("seen", also=feature, bound=math.inf)
    asked = calls[-len(FEATURES[feature]) :]
    # Asked for in `test_the_check_hands_over_what_a_llama_does`; BERT counts its positions elsewhere.
    handed_down = {"position_ids", "use_cache"}
    assert all({each for each in given if each[0] not in handed_down} == own for *_, given in asked)
    asked = [(causal, mask) for causal, mask, _ in asked]
    calls.clear()
    network, ids = ENTRIES[model].build("seen"), draw(12)
    with torch.no_grad():
        for mask in (None, padding(12, "left")):
            network(ids, attention_mask=mask)
    for call in asked:
        assert any(call == other[:2] and own <= other[2] for other in calls), call


@pytest.mark.usefixtures("restored_registry")
def test_the_check_hands_over_what_a_llama_does():
    calls = []

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        given = {name: tuple(of.shape) if torch.is_tensor(of) else type(of) for name, of in kwargs.items()}
        calls.append((query.shape[2], given))
        return torch.zeros_like(query).transpose(1, 2), None

    register_backend("seen", attend)
    assert_matches_reference("seen", bound=math.inf)
    by_check = [given for queries, given in calls if queries == 7]
    calls.clear()
    with torch.no_grad():
        tiny_model("seen")(draw(7))
    assert by_check == [calls[0][1]] == [{"position_ids": (1, 7), "use_cache": bool}]


@pytest.mark.usefixtures("restored_registry")
def test_an_unknown_word_is_refused_before_any_work():
    calls = []
    register_backend("broken", lambda *_, **options: calls.append(options))
    for wrong in ("alibi", ["window", "alibi"]):
        message = r"also: expected some of \['softcap', 'sinks', 'bidirectional', 'window'\], got \['alibi'\]"
        with pytest.raises(ValueError, match=message):
            assert_matches_reference("broken", also=wrong)
    assert calls == []


@pytest.mark.usefixtures("restored_registry")
def test_a_kind_of_error_that_would_change_nothing_is_not_named():
    """One query alone has no later keys that it could see."""

    def inexact(*args, **kwargs):
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output + 1.5e-3, weights

    register_backend("broken", inexact)
    with pytest.raises(AssertionError, match=r"'queries': 1}: error \S+ is above 1.00e-03$"):
        assert_matches_reference("broken", bound=1e-3)


def test_relative_error_sees_nan_and_shapes():
    value = torch.tensor([1.0, torch.nan])
    assert relative_error(value, value) == 0
    with pytest.raises(AssertionError, match=r"first at \[1\]: expected nan, got 2$"):
        relative_error(torch.tensor([1.0, 2.0]), value)
    with pytest.raises(AssertionError, match="expected shape"):
        relative_error(value[:1], value)
    assert relative_error(torch.tensor([3.0]), torch.tensor([1.0])) == 1.0
    assert relative_error(value[:0], value[:0]) == 0


def test_make_inputs():
    inputs = make_inputs(batch=3, heads=6, kv_heads=2, queries=5, cached=4, head_dim=8, padding="left", seed=1)
    assert inputs.query.shape == (3, 6, 5, 8)
    assert inputs.key.shape == inputs.value.shape == (3, 2, 9, 8)
    assert inputs.attention_mask.sum().item() == 24
    assert not inputs.attention_mask[0, :3].any()
    assert torch.equal(inputs.query, make_inputs(batch=3, heads=6, queries=5, cached=4, head_dim=8, seed=1).query)
    with pytest.raises(ValueError, match="kv_heads"):
        make_inputs(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="padding"):
        make_inputs(padding="both")
    with pytest.raises(ValueError, match="window: expected None or a number above 0, got 0"):
        make_inputs(window=0)
    with pytest.raises(ValueError, match=r"softcap: expected None or a number above 0, got -1.0"):
        make_inputs(softcap=-1.0)
    plain = make_inputs(heads=6, queries=5, cached=4, head_dim=8, seed=1)
    assert torch.equal(plain.query, make_inputs(heads=6, queries=5, cached=4, head_dim=8, seed=1, sinks=True).query)


@pytest.mark.usefixtures("restored_registry")
def test_a_backend_written_elsewhere(ids, left_padding):
    """Registered with its function alone, it gets a mask, works in a model, and is observed."""
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append((None if attention_mask is None else attention_mask.dtype, sorted(kwargs)))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    register_backend("elsewhere", attend)
    assert available_backends()["elsewhere"] is None
    assert_matches_reference("elsewhere")
    seen.clear()
    model = tiny_model("sdpa")
    with torch.no_grad():
        expected = model(ids, attention_mask=left_padding, output_attention_stats=True)
        model.set_attn_implementation("elsewhere")
        actual = model(ids, attention_mask=left_padding, output_attention_stats=True)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(
        actual.attention_stats["received"].nan_to_num(), expected.attention_stats["received"].nan_to_num()
    )
    assert actual.attention_stats.backend == "elsewhere"
    assert seen[0][0] == torch.bool, "without a mask function padding would be ignored in silence"
    assert not {"recorder", "visibility"} & set(seen[0][1]), "a foreign backend is only given what transformers gives"
    register_backend("elsewhere", sdpa_attention_forward)  # defining it again is how notebooks work


@pytest.mark.usefixtures("restored_registry")
def test_a_backend_with_its_own_mask(ids, left_padding):
    def mask(attention_mask=None, **kwargs):
        return attention_mask

    def attend(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask.shape == (2, 37)
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    register_backend("own_mask", attend, mask)
    model = tiny_model("own_mask")
    with torch.no_grad():
        assert model(ids, attention_mask=left_padding).logits.shape == (2, 37, 97)


@pytest.mark.parametrize(
    ("name", "attend", "mask", "error", "message"),
    [
        ("sdpa", sdpa_attention_forward, None, ValueError, "already a backend"),
        ("streaming", sdpa_attention_forward, None, ValueError, "already a backend"),
        ("my_flash", sdpa_attention_forward, None, ValueError, "without any of"),
        ("me/mine", sdpa_attention_forward, None, ValueError, "without any of"),
        ("paged|mine", sdpa_attention_forward, None, ValueError, "without any of"),
        ("mine+bias", sdpa_attention_forward, None, ValueError, "without any of"),
        ("", sdpa_attention_forward, None, ValueError, "name: expected"),
        (None, sdpa_attention_forward, None, ValueError, "name: expected"),
        ("mine", "sdpa", None, TypeError, "attend: expected a function"),
        ("mine", sdpa_attention_forward, "causal", TypeError, "mask: expected a function"),
    ],
)
@pytest.mark.usefixtures("restored_registry")
def test_bad_registrations(name, attend, mask, error, message):
    with pytest.raises(error, match=message):
        register_backend(name, attend, mask)
    assert set(available_backends()) == BUILT_IN


def test_get_backend_lists_what_exists():
    with pytest.raises(ValueError, match=r"nonsense.* is not supported; there are \['eager'"):
        get_backend("nonsense")
