"""Bad input gets a clear error before any work is done."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import CACHE, tiny_model
from torch.nn.attention.flex_attention import create_block_mask
from transformers import StaticCache
from transformers.models.llama import modeling_llama as upstream

import llama_attn
from llama_attn import AttentionStatsConfig, LlamaForCausalLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics": ("entropy", "entropie")}, r"unknown \['entropie'\]; there are \['distance_histogram'.*'entropy'"),
        ({"statistics": "nonsense"}, "unknown"),
        ({"statistics": ()}, "at least one"),
        ({"layers": (0, -1)}, "layers: expected"),
        ({"layers": ()}, "layers: expected"),
        ({"layers": (1, 1)}, "distinct"),
        ({"heads": ("a",)}, "heads: expected"),
        ({"heads": 3}, "heads: expected"),
        *[({"layers": [0, one]}, "layers: expected") for one in (True, 1.0, np.bool_(True), torch.tensor(True), torch.tensor(1.0))],
        *[({name: value}, f"{name}: expected a positive integer, got")
          for name in ("sink_tokens", "window", "top_k", "map_size", "query_stride") for value in (0, -1, 1.5, True, "3", None)],
        ({"offload": "disk"}, "offload: expected None or"),
        ({"norms": 1}, "norms: expected"),
        ({"engine": 3}, "engine: expected"),
        ({"segments": torch.zeros(2, 37)}, "segments: expected integers"),
        ({"segments": torch.zeros(37, dtype=torch.long)}, r"segments: expected shape \(batch, key\), got \(37,\)"),
        ({"segments": torch.full((2, 37), -2)}, "−1 or more"),
        ({"segments": torch.full((2, 37), -1)}, "at least one segment"),
        ({"segments": (torch.full((2, 37), 2), ("a", "b"))}, "a name for every number up to 2"),
        ({"segments": [["a"] * 37, ["b"] * 36]}, r"rows of one length, got 2 rows of lengths \[37, 36\]"),
        ({"segments": [[None] * 37] * 2}, "at least one label"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionStatsConfig(**arguments)


@pytest.mark.parametrize("one", [1, np.int64(1), np.array(1), torch.tensor(1)], ids=lambda one: type(one).__name__)
def test_whatever_counts_as_an_integer(one):
    config = AttentionStatsConfig(layers=[one, 2], heads=np.array([0, 1]), top_k=one, window=one)
    assert config == AttentionStatsConfig(layers=(1, 2), heads=(0, 1), top_k=1, window=1)
    assert json.loads(json.dumps(config.to_json()))["layers"] == [1, 2]
    assert AttentionStatsConfig(layers=torch.arange(2)).layers == (0, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionStatsConfig(layers=(1, 3)), r"layers: unknown \[3\]; the model has layers 0 to 2"),
        (AttentionStatsConfig(heads=(6,)), r"heads: unknown \[6\]; the model has heads 0 to 5"),
        (AttentionStatsConfig(engine="cuda"), r"engine: unknown 'cuda'; there are \[.*'torch'"),
        (
            AttentionStatsConfig(segments=torch.zeros(2, 36, dtype=torch.long)),
            r"expected shape \(2, 37\), got \(2, 36\)",
        ),
        (AttentionStatsConfig(segments=[["a"] * 37] * 3), r"expected shape \(2, 37\), got \(3, 37\)"),
        (AttentionStatsConfig(statistics=("segment_mass",)), "'segment_mass' needs `segments`"),
        (
            "yes",
            "output_attention_stats: expected None, a bool or an AttentionStatsConfig, got 'yes'; a statistic is named by",
        ),
        (1, "output_attention_stats: expected"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_calls(backend, config, message, ids):
    model = tiny_model(backend)
    ran = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(True))
    with pytest.raises(ValueError, match=message):
        model(ids, output_attention_stats=config)
    assert not ran, "refused only after a layer had run"


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"""`attn_implementation="sdpb"` is not supported; there are \['eager'.*'streaming'"""
    ):
        tiny_model("sdpb")
    model = tiny_model("sdpa")
    with pytest.raises(ValueError, match=r"sdpb.* is not supported; there are"):
        model.set_attn_implementation("sdpb")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_a_backend_that_does_not_run_here(name, tmp_path):
    model = tiny_model("sdpa")
    with pytest.raises(ImportError, match=r"flash-attn.* is not installed: pip install"):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=r"flash-attn.* is not installed: pip install"):
        LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


def test_weights_under_streaming(ids):
    model = tiny_model("streaming")
    with pytest.raises(ValueError, match=r'"eager".*"weights_map"'):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True


def test_streaming_in_transformers_own_class(ids, left_padding):
    """Who sees whom comes with the mask, so that it needs no model of ours."""
    model = tiny_model("streaming")
    stock = upstream.LlamaForCausalLM._from_config(model.config, attn_implementation="streaming")
    stock.load_state_dict(model.state_dict())
    expected = model(ids, attention_mask=left_padding).logits
    assert torch.equal(stock.eval()(ids, attention_mask=left_padding).logits, expected)


@pytest.mark.parametrize("backend", ["streaming"])
@pytest.mark.parametrize("shape", [(2, 36), (2, 38), (1, 37), (2, 1, 37, 36), (3, 1, 37, 37)])
def test_masks_of_the_wrong_shape(backend, shape, ids):
    with pytest.raises(ValueError, match="attention_mask: expected"):
        tiny_model(backend)(ids, attention_mask=torch.ones(shape, dtype=torch.long if len(shape) == 2 else torch.bool))


def test_attention_dropout_in_training(ids):
    model = tiny_model("streaming", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="attention dropout is not supported"):
        model(ids)
    assert model.eval()(ids).logits.isfinite().all()


def test_nothing_to_read(ids):
    model = tiny_model("streaming")
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(output_attention_stats=True)


def test_non_finite_inputs_are_seen_in_the_numbers(ids):
    """NaN in one row's embeddings may not vanish, and may not reach another row."""
    model = tiny_model("streaming")
    embeddings = model.get_input_embeddings()(ids).detach().clone()
    embeddings[1, 5] = torch.nan
    with torch.no_grad():
        stats = model(inputs_embeds=embeddings, output_attention_stats=True).attention_stats
    assert stats["entropy"][:, 1, :, 5:].isnan().all()
    assert not stats["entropy"][0, 1, :, :5].isnan().any()
    assert not stats["entropy"][:, 0].isnan().any()


def test_a_bool_mask_that_eager_would_add(ids):
    mask = torch.ones(1, 1, 37, 37, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="eager attention adds a 4-D mask"):
        tiny_model("eager")(ids, attention_mask=mask, output_attention_stats=True)


def test_layers_that_are_not_causal_in_a_causal_model(ids):
    """Without a mask sdpa asks the layer, and so do the numbers: every token sees every other."""
    model = tiny_model("sdpa")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    stats = model(ids, output_attention_stats=True).attention_stats
    assert stats.direction == "bidirectional"
    assert (stats.visible_keys == 37).all()
    # Under streaming the mask is asked for, and the model asks for a causal one.
    model.set_attn_implementation("streaming")
    assert model(ids, output_attention_stats=True).attention_stats.direction == "causal"


def test_a_static_cache_under_flash_attention(ids):
    """Refused before any layer runs, in a forward and in `generate`."""
    model = tiny_model("sdpa")
    # FlashAttention itself is never reached, so that it need not run here.
    model.config._attn_implementation = "flash_attention_2"
    ran = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(True))
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match=r"unfilled slots of a static cache.*DynamicCache"):
        model(ids, **{CACHE: cache}, output_attention_stats=True)
    with pytest.raises(ValueError, match="unfilled slots of a static cache"):
        model.generate(
            ids,
            cache_implementation="static",
            max_new_tokens=2,
            return_dict_in_generate=True,
            output_attention_stats=True,
        )
    assert not ran, "refused only after a layer had run"


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_layer_that_does_not_report(call, ids):
    """Someone has put another attention in its place: no numbers rather than incomplete ones."""
    model = tiny_model("sdpa")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True} if call == "generate" else {}
    with pytest.raises(RuntimeError, match=r"layers \[1\] of .* did not report; \[0, 2\] did"):
        getattr(model, call)(ids, output_attention_stats=True, **settings)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_block_mask_of_the_users_own(ids):
    block_mask = create_block_mask(lambda batch, head, query, key: query >= key, 2, None, 37, 37, device="cpu")
    with pytest.raises(ValueError, match=r"attention_mask: expected a tensor.*got BlockMask"):
        tiny_model("streaming")(ids, attention_mask=block_mask)
    with torch.no_grad():
        stats = tiny_model("flex_attention")(
            ids, attention_mask=block_mask, output_attention_stats=True
        ).attention_stats
    assert (stats.visible_keys == torch.arange(1, 38)).all()


def test_a_stride_that_misses_every_query(ids):
    model = tiny_model("sdpa")
    with torch.no_grad():
        cache = model(ids[:, :9]).past_key_values
        with pytest.raises(ValueError, match="query_stride: no query of this call"):
            model(ids[:, 9:10], **{CACHE: cache}, output_attention_stats=AttentionStatsConfig(query_stride=4))


def test_weights_that_are_nan_give_no_number(ids):
    model = tiny_model("streaming")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
        stats = model(ids, output_attention_stats=AttentionStatsConfig(statistics="all", norms=True)).attention_stats
    assert stats["max_weight"][1, :, 0].isnan().all()
    assert (stats["topk_position"][1, :, 0] == -1).all()
    assert not stats["max_weight"][1, :, 1].isnan().any()


@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
def test_a_mask_by_head_where_one_head_sees_nothing(backend, ids):
    """That head's row is NaN, and neither the selection of heads nor a stride changes any other number."""
    model = tiny_model(backend, torch.float64)
    mask = torch.ones(2, 6, 37, 37, dtype=torch.bool).tril()
    mask[:, 5, 7] = False
    mask[:, :5, 2:, 0] = False
    everything = {"statistics": "all", "norms": True}

    def measure(**settings):
        with torch.no_grad():
            config = AttentionStatsConfig(**everything, **settings)
            return model(ids, attention_mask=mask, output_attention_stats=config).attention_stats

    whole, part, strided = measure(), measure(heads=(5,)), measure(query_stride=2)
    for name in ("max_logit", "entropy", "logsumexp", "max_weight", "effective_keys"):
        assert whole[name][0, :, 5, 7].isnan().all(), name
        assert not whole[name][0, :, :5, 7].isnan().any(), name
    for name in whole.values:
        dims = whole.labels[name].dims
        expected = whole[name].narrow(dims.index("head"), 5, 1) if "head" in dims else whole[name]
        torch.testing.assert_close(part[name][:1], expected[:1], equal_nan=True, msg=name)
        if "query" in dims and name != "visible_keys":
            rows = torch.arange(0, 37, 2)
            thinned = whole[name].index_select(dims.index("query"), rows)
            torch.testing.assert_close(strided[name][:1], thinned[:1], equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "kind",
    [
        "AutoModel",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    ],
)
def test_statistics_that_a_class_of_transformers_would_drop(kind, ids):
    config = tiny_model().config
    config.pad_token_id = 0
    model = getattr(transformers, kind).from_config(config)
    with pytest.raises(ValueError, match=r"output_attention_stats.*llama_attn\.record"):
        model(ids, output_attention_stats=True)
    model(ids, output_attention_stats=False)
    llama_attn.unregister()
    try:
        model(ids, output_attention_stats=True)
    finally:
        llama_attn.register()


def test_statistics_of_our_class_inside_another(ids):
    """It would drop them too."""
    wrapper = transformers.AutoModelForSequenceClassification.from_config(tiny_model().config)
    wrapper.model, wrapper.config.pad_token_id = tiny_model().model, 0
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification.*llama_attn\.record"):
        wrapper(ids, output_attention_stats=True)
    with torch.no_grad(), llama_attn.record(wrapper) as recording:
        wrapper(ids)
    assert recording.stats["entropy"].shape == (3, 2, 6, 37)


@pytest.mark.parametrize("model_type", ["deepseek_v32", "doge", "beit"])
def test_streaming_of_a_model_that_it_cannot_serve(model_type):
    """At load, with what to use instead."""
    config = transformers.AutoConfig.for_model(model_type)
    kind = transformers.AutoModel
    with torch.device("meta"), pytest.raises(ValueError, match=rf"do not serve '{model_type}'.*record"):
        kind.from_config(config, attn_implementation="streaming")
