"""Heads that are taken out and keys that are hidden: as if the model were another, and nothing left behind."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import xarray
from any_model import state
from conftest import tiny_model
from oracle import stock_of
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    MistralConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from zoo import ENTRIES
from zoo_situations import prepare

from llama_attn import AttentionStatsConfig, ablate_heads, block_keys, record, register_backend
from llama_attn.observe import interface
from llama_attn.stats.parallel import HeadShard

BACKENDS = ("eager", "sdpa", "streaming")
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 97}
DECODERS = {
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=6),
    "gpt2": GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=97),
}


def made(config, backend):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=backend).eval()
    for weights in model.parameters():
        weights.data.normal_(0, 0.25)
    return model


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    left = interface._intervening, interface._watched, interface._shadowed, interface._cross
    assert not any(left), left


def logits(model, ids, mask=None, **inputs):
    return model(ids, attention_mask=mask, **inputs).logits


def without_columns(model, layer, heads, head_dim):
    """The same model with zeros in the columns of the output projection that take these heads."""
    other = copy.deepcopy(model)
    for head in heads:
        columns = slice(head * head_dim, (head + 1) * head_dim)
        if hasattr(other, "transformer"):
            other.transformer.h[layer].attn.c_proj.weight.data[columns] = 0
        else:
            other.model.layers[layer].self_attn.o_proj.weight.data[:, columns] = 0
    return other


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_head_that_gives_nothing(name, backend, ids, left_padding):
    model = made(DECODERS[name], backend)
    before, plain, real = state(model), logits(model, ids, left_padding), left_padding.bool()
    head_dim = 8 if name == "gpt2" else 16
    expected = logits(without_columns(model, 1, (0, 3), head_dim), ids, left_padding)
    with ablate_heads(model, {1: [3, 0]}):
        found = logits(model, ids, left_padding)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    assert float((found - plain)[real].abs().max()) > 0.01
    assert state(model) == before
    assert torch.equal(logits(model, ids, left_padding)[real], plain[real])


@torch.no_grad()
def test_means_and_numbers_of_ones_own(ids, left_padding):
    model, real = made(DECODERS["qwen3"], "sdpa"), left_padding.bool()
    given = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, at=at: given.__setitem__(at, args[0]))
        for at, layer in enumerate(model.model.layers)
    ]
    logits(model, ids, left_padding)
    plain = {at: states.unflatten(-1, (4, 16)) for at, states in given.items()}
    with ablate_heads(model, {1: 2}, mode="mean"):
        logits(model, ids, left_padding)
    changed = given[1].unflatten(-1, (4, 16))
    for row in range(2):
        mean = plain[1][row, real[row], 2].mean(0)
        torch.testing.assert_close(changed[row, :, 2], mean.expand(37, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(changed[:, :, [0, 1, 3]], plain[1][:, :, [0, 1, 3]])
    numbers = torch.randn(3, 4, 16)
    with ablate_heads(model, {0: "all", 2: [1]}, mode=numbers):
        logits(model, ids, left_padding)
    assert torch.equal(given[0].unflatten(-1, (4, 16)), numbers[0].expand(2, 37, -1, -1))
    assert torch.equal(given[2].unflatten(-1, (4, 16))[:, :, 1], numbers[2, 1].expand(2, 37, -1))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_is_of_real_queries(backend, ids):
    """Padding on the right attends to what is real, and gives numbers that nobody asked for."""
    model, mask = made(DECODERS["qwen3"], backend), torch.ones(2, 37, dtype=torch.long)
    mask[1, 20:] = 0
    alone = ids[1:, :20]
    with ablate_heads(model, {0: "all", 2: [1]}, "mean"):
        expected, found = logits(model, alone), logits(model, ids, mask)[1:, :20]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def causal(mask, window=None):
    """Who sees whom in a padded batch, (batch, 1, query, key)."""
    places = torch.arange(mask.shape[1])
    seen = places <= places[:, None]
    if window is not None:
        seen = seen & (places > places[:, None] - window)
    return (seen & mask.bool()[:, None])[:, None]


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["positions", "slice", "keys", "pairs"])
def test_hidden_keys_are_those_of_such_a_mask(form, backend, ids, left_padding):
    model, real = tiny_model(backend), left_padding.bool()
    hidden = torch.zeros(37, 37, dtype=torch.bool)
    hidden[20:, 12:15] = True
    keys = {
        "positions": [12, 13, 14],
        "slice": slice(12, 15),
        "keys": (~hidden[-1]).expand(2, -1),
        "pairs": (~hidden).expand(2, -1, -1),
    }[form]
    seen = causal(left_padding) & ~hidden
    own = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if backend == "eager" else seen
    expected = logits(model, ids, own, position_ids=torch.arange(37)[None])
    with block_keys(model, keys, first_query=0 if form == "pairs" else 20):
        found = logits(model, ids, left_padding, position_ids=torch.arange(37)[None])
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    plain = logits(model, ids, left_padding, position_ids=torch.arange(37)[None])
    assert torch.equal(found[real & (torch.arange(37) < 20)], plain[real & (torch.arange(37) < 20)])
    assert float((found - plain)[:, 20:].abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_each_layer_and_head_has_its_own_mask(name, backend, ids, left_padding):
    """What is measured are the weights of a softmax over what is left, of every KV head."""
    model, real = made(DECODERS[name], backend), left_padding.bool()
    keep = torch.rand(3, 2, 2, 30, generator=torch.Generator().manual_seed(0)) < 0.6
    first = 25
    rows = AttentionStatsConfig(rows=slice(None), statistics="entropy")
    with record(model, rows) as before, block_keys(model, keep, first_query=first):
        logits(model, ids, left_padding)
    with block_keys(model, keep, first_query=first), record(model, rows) as recording:
        logits(model, ids, left_padding)
    found = recording.stats["row_weights"]
    assert torch.equal(before.stats["row_weights"].nan_to_num(), found.nan_to_num())
    later = torch.cat([keep, torch.ones(3, 2, 2, 7, dtype=torch.bool)], -1).repeat_interleave(2, 2)
    # From there on each token still sees itself.
    places = torch.arange(37)
    blocked = ~later[:, :, :, None] & (places >= first)[:, None] & (places != places[:, None])
    seen = causal(left_padding, 6 if name == "mistral" else None)[None] & ~blocked
    for row in range(2):
        at = real[row].nonzero()[:, 0]
        # A key that nobody sees any more is no longer a real one.
        weights = found[:, row][:, :, at][..., at].nan_to_num()
        shown = seen[:, row][:, :, at][..., at]
        assert float(weights.masked_fill(shown, 0).abs().max()) == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-5)
    # The first layer has the same queries and keys with and without.
    with record(model, rows) as recording:
        logits(model, ids, left_padding)
    plain = recording.stats["row_weights"][0].nan_to_num() * seen[0]
    renormalised = plain / plain.sum(-1, keepdim=True).clamp(min=1e-9)
    error = (found[0].nan_to_num() - renormalised)[:, :, first:].abs().max()
    assert float(error) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_behind_hidden_keys(backend, ids):
    """Each step sees what one forward over the whole text sees."""
    model = stock_of(tiny_model(backend))
    model.set_attn_implementation(backend)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with block_keys(model, range(5, 30), first_query=37), record(model) as recording:
        sequences = model.generate(ids, **settings)
    assert recording.stats["visible_keys"][0, -5:].tolist() == [13, 14, 15, 16, 17]
    with block_keys(model, range(5, 30), first_query=37):
        whole = logits(model, sequences[:, :-1])
    assert torch.equal(whole[:, 36:].argmax(-1), sequences[:, 37:])
    with ablate_heads(model, {0: [1], 2: "all"}):
        sequences = model.generate(ids, **settings)
        assert torch.equal(logits(model, sequences[:, :-1])[:, 36:].argmax(-1), sequences[:, 37:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_goes_on_with_what_is_left(backend, ids):
    model = made(DECODERS["qwen3"], backend)
    other = without_columns(model, 1, (2,), 16)
    with ablate_heads(model, {1: 2}):
        model(ids, labels=ids).loss.backward()
    other(ids, labels=ids).loss.backward()
    taken = model.model.layers[1].self_attn.o_proj.weight.grad[:, 32:48]
    assert float(taken.abs().max()) == 0
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if "layers.1.self_attn.o_proj" not in name:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_encoder_and_one_stack_of_several(ids, left_padding):
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZES)).eval()
    plain = bert(ids, attention_mask=left_padding).last_hidden_state
    with block_keys(bert, [20]), record(bert) as recording:
        hidden = bert(ids, attention_mask=left_padding).last_hidden_state
    assert recording.stats["received"][..., 20].isnan().all()
    with ablate_heads(bert, {0: "all", 1: "all", 2: "all"}):
        ablated = bert(ids, attention_mask=left_padding).last_hidden_state
    assert not torch.equal(hidden, plain)
    assert not torch.equal(ablated, plain)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=32)
    ).eval()
    stacks = list(record(t5).stacks)
    cross = next(stack for stack in stacks if "EncDec" in stack)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    before = t5(**given).logits
    with block_keys(t5, [3, 4], stack=cross), record(t5, stack=cross) as recording:
        after = t5(**given).logits
    assert recording.stats["received"][..., 3:5].isnan().all()
    assert not torch.equal(before, after)
    assert torch.equal(t5(**given).logits, before)


@torch.no_grad()
def test_blocks_in_blocks_and_errors_in_them(ids):
    model = made(DECODERS["qwen3"], "sdpa")
    plain = logits(model, ids)
    with ablate_heads(model, {0: 0}), ablate_heads(model, {0: 1, 1: 3}), block_keys(model, [4], first_query=5):
        every = logits(model, ids)
    other = without_columns(without_columns(model, 0, (0, 1), 16), 1, (3,), 16)
    with block_keys(other, [4], first_query=5):
        torch.testing.assert_close(every, logits(other, ids), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="mine"), ablate_heads(model, {0: 0}):
        raise RuntimeError("mine")
    assert torch.equal(logits(model, ids), plain)
    block = ablate_heads(model, {0: 0})
    with block:
        with pytest.raises(ValueError, match="entered already"):
            block.__enter__()
        logits(model, ids)
    with block:
        assert not torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize(
    ("heads", "mode", "message"),
    [
        ({7: 0}, "zero", r"got \[7\]; there are \[0, 1, 2\]"),
        ({0: 4}, "zero", r"heads of layer 0, got \[4\]; there are 0 to 3"),
        ({0: -1}, "zero", "from 0 up, got"),
        ({0: []}, "zero", "from 0 up, got"),
        ({0: "some"}, "zero", "from 0 up, got"),
        ({}, "zero", r"expected \{layer: "),
        ([0], "zero", r"expected \{layer: "),
        ({0: 0}, "median", r"mode: expected one of \['zero', 'mean'\] or a tensor"),
        ({2: 0}, torch.zeros(2, 4, 16), "expected values of all layers up to 2, got those of 2"),
        ({0: 0}, torch.zeros(4), r"expected values of the shape \(head, value_channel\)"),
        ({0: 0}, torch.zeros(3, 4, 16, dtype=torch.long), "got torch.int64"),
    ],
)
def test_heads_that_are_not_there(heads, mode, message):
    with pytest.raises(ValueError, match=message):
        ablate_heads(made(DECODERS["qwen3"], "sdpa"), heads, mode)


@torch.no_grad()
def test_means_that_take_nothing_out(ids):
    model = made(DECODERS["qwen3"], "sdpa")
    with (
        pytest.raises(ValueError, match="has a single query, of which the mean is itself"),
        ablate_heads(model, {0: 0}, "mean"),
    ):
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    with (
        pytest.raises(ValueError, match=r"head=4, value_channel=16\) for layer 0, got \(3, 2, 16\)"),
        ablate_heads(model, {0: 0}, torch.zeros(3, 2, 16)),
    ):
        logits(model, ids)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], r"expected positions \(integers from 0 up"),
        ([-1], r"expected positions \(integers from 0 up"),
        (slice(-3, None), "a slice of positions from 0 up, as the end of the row is not known"),
        (torch.ones(2, 37), r"expected positions \(integers from 0 up"),
        (torch.ones(37, dtype=torch.bool), r"got a mask of shape \(37,\)"),
        (torch.ones(2, 2, 2, 37, dtype=torch.bool), r"of 3 layers, got one of 2"),
    ],
)
def test_masks_that_mean_nothing(keys, message):
    with pytest.raises(ValueError, match=message):
        block_keys(made(DECODERS["qwen3"], "sdpa"), keys)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_would_see_nothing(backend, ids, left_padding):
    model = tiny_model(backend)
    runs = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    with (
        pytest.raises(
            ValueError, match="got none for query 9 of row 0 in layer 0; without blocking it sees the keys 9:"
        ),
        block_keys(model, [9]),
    ):
        logits(model, ids, left_padding)
    with pytest.raises(ValueError, match="first_query"):
        block_keys(model, [9], first_query=-1)
    with pytest.raises(ValueError, match=r"batch 2 \(or 1\)"), block_keys(model, torch.ones(3, 37, dtype=torch.bool)):
        logits(model, ids, left_padding)
    hook.remove()
    assert not runs
    with block_keys(model, [9], first_query=10):
        logits(model, ids, left_padding)


@pytest.mark.parametrize(
    ("keys", "first_query"),
    [([99], None), (slice(50, None), None), (torch.arange(60)[None] < 45, None), ([3], 40)],
)
@pytest.mark.parametrize("backend", ["sdpa", "streaming"])
@torch.no_grad()
def test_keys_that_no_call_has(keys, first_query, backend, ids):
    model = made(DECODERS["qwen3"], backend)
    with (
        pytest.raises(ValueError, match="nothing was hidden, as no call had keys at the positions"),
        block_keys(model, keys, first_query=first_query),
    ):
        model(ids)
    # What may all be seen is no request.
    with block_keys(model, torch.ones(1, 3, dtype=torch.bool)):
        model(ids)


@torch.no_grad()
def test_a_block_that_is_entered_again_looks_anew(ids):
    model = made(DECODERS["qwen3"], "sdpa")
    block = block_keys(model, [20])
    with block:
        model(ids)
    with pytest.raises(ValueError, match="nothing was hidden"), block:
        model(ids[:, :10])


def test_what_is_compiled_or_has_no_attention(ids):
    with pytest.raises(ValueError, match="nothing to change"):
        block_keys(torch.nn.Linear(2, 2), [0])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ablate_heads(3, {0: 0})
    with pytest.raises(ValueError, match=r"there is no 'x'"):
        ablate_heads(tiny_model(), {0: 0}, stack="x")
    with pytest.raises(ValueError, match=r"there is no 'model\.layers'; there are .*self_attn"):
        ablate_heads(tiny_model(), {0: 0}, stack="model.layers")
    with pytest.raises(ValueError, match=r"there is no 'model\.layers'; there are .*self_attn"):
        block_keys(tiny_model(), [0], stack="model.layers")


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_of_a_window_that_moves_on(backend, ids):
    """Slots of a full window hold other positions at each step, and masks of each step look alike."""
    model = made(DECODERS["mistral"], backend)
    rows = AttentionStatsConfig(statistics=("max_weight",), rows="generated")
    with block_keys(model, [39, 40], first_query=41), record(model, rows) as recording:
        sequences = model.generate(ids, min_new_tokens=10, max_new_tokens=10, do_sample=False, pad_token_id=0)
    weights = recording.stats["row_weights"]
    at = recording.stats.row_positions if hasattr(recording.stats, "row_positions") else range(36, 46)
    for place, query in enumerate(at):
        shown = weights[:, :, :, place, 39:41].nan_to_num()
        if query >= 41:
            assert float(shown.abs().max()) == 0, query
    assert recording.stats["visible_keys"][..., 41:].reshape(-1, 5)[0].tolist() == [4, 4, 4, 4, 5]
    with block_keys(model, [39, 40], first_query=41):
        whole = logits(model, sequences[:, :-1])
    assert torch.equal(whole[:, 36:].argmax(-1), sequences[:, 37:])


@torch.no_grad()
def test_a_module_that_is_several_layers(ids):
    albert = ENTRIES["albert"].build("sdpa")
    ids = ids % 90
    output = albert.encoder.albert_layer_groups[0].albert_layers[0].attention.dense
    taken = []
    hook = output.register_forward_pre_hook(lambda _, args: taken.append(args[0][..., 8:16].abs().max()))
    with ablate_heads(albert, {1: [1]}):
        albert(ids)
        albert(ids)
    assert [float(size) == 0 for size in taken] == [False, True, False] * 2
    hook.remove()
    called = r"got \[3\]; of .* those that were called are \[0, 1, 2\]"
    with pytest.raises(ValueError, match=called), ablate_heads(albert, {3: [1]}):
        albert(ids)


def test_layers_that_run_again_for_the_backward(ids):
    model = made(DECODERS["qwen3"], "sdpa")
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.train(checkpointed)
        if checkpointed:
            for layer in model.model.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        with ablate_heads(model, {1: 2}, "mean"), block_keys(model, 0, first_query=1):
            model(ids, labels=ids).loss.backward()
        gradients.append([weights.grad.clone() for weights in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_part_of_the_heads_of_every_layer(ids, monkeypatch):
    """Each process of tensor parallelism takes out, and hides keys of, the heads that it holds."""
    model = made(DECODERS["qwen3"], "sdpa")
    keep = torch.rand(3, 2, 2, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    with ablate_heads(model, {1: [1]}), block_keys(model, keep, first_query=10):
        expected = logits(model, ids)
    for rank in range(2):
        shard = SimpleNamespace(size=2, rank=rank)
        monkeypatch.setattr(HeadShard, "of_attention", lambda _, shard=shard: shard)
        parts = torch.ones(3, 2, 4, 30, dtype=torch.bool)
        parts[:, :, 2 * rank : 2 * rank + 2] = keep
        with ablate_heads(model, {1: [4 * rank + 1, 4 * (1 - rank) + 2]}), block_keys(model, parts, first_query=10):
            assert torch.equal(logits(model, ids), expected)
        with pytest.raises(ValueError, match=r"got \[8\]; there are 0 to 7"), ablate_heads(model, {1: [8]}, stack=None):
            logits(model, ids)


@torch.no_grad()
def test_an_array_with_names(ids):
    """Layers and keys by their coordinates, whatever the order of the axes; other layers are left alone."""
    model = made(DECODERS["qwen3"], "sdpa")
    keep = torch.rand(2, 2, 2, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    named = xarray.DataArray(keep.numpy(), dims=("layer", "batch", "kv_head", "key"), coords={"layer": [2, 0]})
    whole = torch.ones(3, 2, 2, 30, dtype=torch.bool)
    whole[[2, 0]] = keep
    for array, mask in (
        (named, whole),
        (named.transpose("key", "kv_head", "layer", "batch"), whole),
        (
            named.isel(key=slice(4, None)).assign_coords(key=range(6, 32)),
            torch.nn.functional.pad(whole[..., 4:], (6, 0), value=True),
        ),
    ):
        with block_keys(model, mask, first_query=5):
            expected = logits(model, ids)
        with block_keys(model, array, first_query=5):
            assert torch.equal(logits(model, ids), expected)
    for wrong, message in (
        (named.isel(batch=0), r"got bool with \('layer', 'kv_head', 'key'\)"),
        (named.astype(int), "got int64 with"),
        (named.assign_coords(layer=[0, 9]), "of 3 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            block_keys(model, wrong)


@torch.no_grad()
def test_backends_that_take_no_matrix(ids, restored_registry):
    model = made(DECODERS["qwen3"], "sdpa")
    register_backend("mine", sdpa_attention_forward)
    register_backend("of_vectors", sdpa_attention_forward, lambda **_: None)
    with block_keys(model, [3], first_query=4):
        expected = logits(model, ids)
    model.set_attn_implementation("mine")
    with block_keys(model, [3], first_query=4):
        assert torch.equal(logits(model, ids), expected)
    model.set_attn_implementation("of_vectors")
    with pytest.raises(ValueError, match="takes a 4-D mask, got 'of_vectors'"), block_keys(model, [3], first_query=4):
        logits(model, ids)
    with ablate_heads(model, {0: [1]}):
        logits(model, ids)


@torch.no_grad()
def test_a_slice_without_an_end_and_every_second_key(ids):
    model = made(DECODERS["qwen3"], "sdpa")
    for given, positions in (
        (slice(20, None), range(20, 37)),
        (slice(4, None, 2), range(4, 37, 2)),
        (slice(4, 9), range(4, 9)),
    ):
        with block_keys(model, positions):
            expected = logits(model, ids)
        with block_keys(model, given):
            assert torch.equal(logits(model, ids), expected)
    with pytest.raises(ValueError, match="expected a slice of positions"):
        block_keys(model, slice(9, 4, -1))
    with pytest.raises(ValueError, match="leaves every row some keys, got none in row 1"):
        block_keys(model, torch.tensor([[True, False], [False, False]]))


@torch.no_grad()
def test_a_block_that_changes_nothing_says_so(ids):
    model, clip = made(DECODERS["qwen3"], "sdpa"), ENTRIES["siglip"]
    for block in (lambda: ablate_heads(model, {0: [1]}), lambda: block_keys(model, [3])):
        with pytest.raises(ValueError, match="nothing was changed"), block():
            pass
    two = clip.build("sdpa")
    with pytest.raises(ValueError, match=r"its stacks are \['text_model"), ablate_heads(two, {0: [1]}):
        prepare(clip, two, "plain").play()


@torch.no_grad()
def test_the_decoder_is_meant_where_there_are_several_stacks(ids):
    t5 = ENTRIES["t5"]
    model = t5.build("sdpa")
    plain = prepare(t5, model, "plain").play()[0]
    with ablate_heads(model, {1: "all"}):
        lazily = prepare(t5, model, "plain").play()[0]
    with ablate_heads(model, {1: "all"}, stack=t5.stacks[0].path):
        named = prepare(t5, model, "plain").play()[0]
    assert torch.equal(lazily.logits, named.logits)
    assert not torch.equal(lazily.logits, plain.logits)
    assert torch.equal(lazily.encoder_last_hidden_state, plain.encoder_last_hidden_state)
    with pytest.raises(ValueError, match=r"got \[9\]; there are"), ablate_heads(model, {9: "all"}):
        prepare(t5, model, "plain").play()
    cross = next(stack for stack in t5.stacks if stack.cross)
    for keys, first in (([1], 2), (torch.ones(1, 7, 10, dtype=torch.bool), None)):
        with (
            pytest.raises(ValueError, match="have no positions among its keys"),
            block_keys(model, keys, first_query=first, stack=cross.path),
        ):
            prepare(t5, model, "plain").play()
    with block_keys(model, [1], stack=cross.path), record(model, stack=cross.path) as recording:
        prepare(t5, model, "cached").play()
    assert recording.stats["received"][..., 1].isnan().all()
    assert recording.stats["visible_keys"].unique().tolist() == [9]
    assert recording.stats["visible_keys"].shape[-1] == 7
    assert [stats.to_xarray()["query"].values[0] for stats in recording.forwards] == [0, 5, 6]
