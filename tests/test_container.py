"""`AttentionStats`: labels, selection, tokens, files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import struct

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from conftest import tiny_model
from safetensors.torch import save_file
from transformers import BatchEncoding

from llama_attn import AttentionStats, AttentionStatsConfig, Statistic, register_statistic
from llama_attn.stats.table import statistics_table


@pytest.fixture
def stats(ids, left_padding):
    config = AttentionStatsConfig(
        statistics="all", norms=True, layers=(2, 0), heads=(1, 4, 3), query_stride=2, map_size=8, top_k=3,
        segments=[["system"] * 10 + ["user"] * 20 + [None] * 7] * 2, rows=(-1, 4), keep=ids >= 0,
    )  # fmt: skip
    with torch.no_grad():
        return tiny_model()(ids, attention_mask=left_padding, output_attention_stats=config).attention_stats


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [f"t{i}" for i in ids]


def same(a: AttentionStats, b: AttentionStats) -> bool:
    fields = {field.name for field in dataclasses.fields(AttentionStats)} - {"values"}
    equal = all(torch.equal(a[n].nan_to_num(), b[n].nan_to_num()) and a[n].dtype == b[n].dtype for n in a.values)
    return equal and all(getattr(a, f) == getattr(b, f) for f in fields) and list(a.values) == list(b.values)


def test_access(stats):
    assert stats["entropy"].shape == (2, 2, 3, 19)
    assert stats["entropy"].dtype == torch.float32
    assert stats["topk_position"].dtype == stats["hidden_max_channel"].dtype == torch.int32
    assert stats.layers == (2, 0)
    assert stats.heads == (1, 4, 3)
    assert stats.hidden_layers == (2, 0, 3)
    assert stats["hidden_norm"].shape == (3, 2, 19)
    assert stats["key_norm"].shape == (2, 2, 2, 37)
    assert stats["value_output_norm"].shape == (2, 2, 3, 37)
    assert stats.queries == range(0, 37, 2)
    assert "entropy" in stats
    assert "entropie" not in stats
    assert list(stats) == list(stats.names)
    assert len(stats) == len(stats.names) == len(statistics_table())
    with pytest.raises(KeyError, match=r"no statistic 'entropie'; there are \['entropy'"):
        stats["entropie"]


def test_padding_is_nan_or_minus_one(stats):
    assert stats["entropy"][:, 0, :, :5].isnan().all()
    assert not stats["entropy"][:, 0, :, 5:].isnan().any()
    assert (stats["topk_position"][:, 0, :, :5] == -1).all()
    assert (stats["hidden_max_channel"][:, 0, :5] == -1).all()
    assert stats["key_norm"][:, 0, :, :9].isnan().all()
    assert stats["received"][:, 0, :, :9].isnan().all()
    assert stats["weights_map"][:, 0, :, 0].isnan().all(), "the first bin of queries is padding"
    assert stats.visible_keys[0].tolist() == [0] * 5 + list(range(2, 29, 2))
    assert stats.visible_queries[0, :12].tolist() == [0] * 9 + [14, 14, 13]


def test_select(stats):
    part = stats.with_tokens(Tokenizer(), torch.arange(74).view(2, 37)).select(layers=[0], heads=3, batch=1)
    assert (part.layers, part.heads, part.batch) == ((0,), (3,), 1)
    assert torch.equal(part["entropy"], stats["entropy"][1:2, 1:2, 2:3])
    assert torch.equal(part["hidden_norm"], stats["hidden_norm"][[1, 2], 1:2])
    assert torch.equal(part["key_norm"], stats["key_norm"][1:2, 1:2])
    assert torch.equal(part.visible_keys, stats.visible_keys[1:2])
    assert part.tokens == [[f"t{i}" for i in range(37, 74)]]
    assert part.select(layers=0).layers == (0,)
    for axis, index, there in (
        ("layers", 1, [2, 0]),
        ("heads", [0], [1, 4, 3]),
        ("batch", 2, [0, 1]),
        ("layers", -1, [2, 0]),
    ):
        with pytest.raises(
            ValueError, match=rf"{axis}: expected some of {there}".replace("[", r"\[").replace("]", r"\]")
        ):
            stats.select(**{axis: index})
    with pytest.raises(ValueError, match="heads"):
        stats.select(heads=[])


def test_with_tokens(stats):
    ids = torch.arange(74).view(2, 37)
    labelled = stats.with_tokens(Tokenizer(), ids)
    assert stats.tokens is None, "a copy is returned"
    assert labelled.tokens[1][0] == "t37"
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    assert stats.with_tokens(Tokenizer(), longer).tokens == labelled.tokens
    assert stats.with_tokens(Tokenizer(), ids.tolist()).tokens == labelled.tokens
    for encoding in (BatchEncoding({"input_ids": ids}), BatchEncoding({"input_ids": ids.tolist(), "length": [37, 37]})):
        assert stats.with_tokens(Tokenizer(), encoding).tokens == labelled.tokens
    for wrong in (ids.double(), {"ids": ids}, [[1, 2], [3]], "text", None):
        with pytest.raises(ValueError, match="input_ids: expected"):
            stats.with_tokens(Tokenizer(), wrong)
    for wrong in (ids[:, :-1], ids[:1], ids[0]):
        with pytest.raises(ValueError, match=r"input_ids: expected shape \(2, 37\), got"):
            stats.with_tokens(Tokenizer(), wrong)


class PaddedVocabulary:
    """As transformers' tokenizers: ids beyond the tokenizer are None in fast ones, errors in others."""

    def convert_ids_to_tokens(self, ids):
        if max(ids) >= 70:
            raise IndexError("piece id is out of range")
        if min(ids) < 0:
            raise OverflowError("number too small to fit in target type")
        return [f"t{i}" if i < 60 else None for i in ids]


def test_ids_beyond_the_tokenizer(stats, tmp_path):
    ids = torch.arange(-1, 73).view(2, 37)
    labelled = stats.with_tokens(PaddedVocabulary(), ids)
    assert labelled.tokens[0][:2] == ["<id:-1>", "t0"]
    assert labelled.tokens[1][-15:] == ["t58", "t59", *(f"<id:{i}>" for i in range(60, 73))][-15:]
    assert "id:-1" in labelled._repr_html_()
    assert labelled.to_xarray().key_token.values[1, -1] == "<id:72>"
    labelled.save(tmp_path / "run.safetensors")
    assert AttentionStats.load(tmp_path / "run.safetensors").tokens == labelled.tokens


def test_xarray_is_labelled(stats):
    dataset = stats.with_tokens(Tokenizer(), torch.arange(74).view(2, 37)).to_xarray()
    assert dataset.attrs["replayed"] == 0
    assert dataclasses.replace(stats, replayed=True).to_xarray().attrs["replayed"] == 1
    assert set(dataset.data_vars) == {*stats.names, "visible_keys", "visible_queries"}
    for name, variable in dataset.data_vars.items():
        assert variable.attrs["units"], name
        assert variable.attrs["long_name"], name
        assert variable.attrs["source"], name
        assert set(variable.dims) <= set(dataset.coords), f"an axis of {name} has no coordinate"
    np.testing.assert_array_equal(dataset.entropy.sel(layer=0, head=4), stats["entropy"][1, :, 1])
    assert dataset.hidden_layer.values.tolist() == [2, 0, 3]
    assert dataset.segment.values.tolist() == ["system", "user"]
    assert dataset.key_bin.values.tolist() == [0, 8, 16, 24, 32]
    assert dataset.distance_bin.values.tolist() == [0, 1, 3, 7, 15, 31]
    assert dataset["query"].values.tolist() == list(range(0, 37, 2))
    assert dataset.query_token.sel(batch=0, query=4).item() == "t4"
    assert dataset.attrs["backend"] == "sdpa"
    assert json.loads(dataset.attrs["config"])["query_stride"] == 2


def test_save_and_load(stats, tmp_path):
    stats = stats.with_tokens(Tokenizer(), torch.arange(74).view(2, 37))
    stats = dataclasses.replace(stats, model="tiny", replayed=True)
    stats.save(tmp_path / "run.safetensors")
    assert same(AttentionStats.load(tmp_path / "run.safetensors"), stats)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]
    loaded = AttentionStats.load(str(tmp_path / "run.safetensors"))
    loaded.select(layers=2).save(tmp_path / "run.safetensors")
    assert AttentionStats.load(tmp_path / "run.safetensors").layers == (2,)


def test_save_whatever_the_layout_in_memory(stats, tmp_path):
    """Tensors that are one and the same, or strided, which safetensors refuses."""
    path = tmp_path / "run.safetensors"
    values = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in stats.values.items()}
    values["max_logit"] = values["logsumexp"]
    odd = dataclasses.replace(stats, values=values)
    odd.save(path)
    assert same(AttentionStats.load(path), odd)


def test_a_failed_save_leaves_the_old_file(stats, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    stats.save(path)
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing' does not exist"):
        stats.save(tmp_path / "missing" / "run.safetensors")

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("llama_attn.stats.container.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        stats.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _with_header(path, change):
    """Rewrite the JSON header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _change_ours(change):
    def apply(header):
        ours = json.loads(header["__metadata__"]["llama_attn.AttentionStats"])
        change(ours)
        header["__metadata__"]["llama_attn.AttentionStats"] = json.dumps(ours)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("layers"),
        lambda h: h.update(layers=[0]),
        lambda h: h.update(layers="02"),
        lambda h: h.update(version=99),
        lambda h: h.update(first_query=None),
        lambda h: h.update(first_query="a"),
        lambda h: h["labels"]["entropy"].update(dims=["layer", "batch"]),
        lambda h: h["labels"]["entropy"].update(dims=["layer", "batch", "head", "__class__"]),
        lambda h: h["labels"].pop("visible_keys"),
        lambda h: h["labels"].update(nothing=h["labels"]["entropy"]),
        lambda h: h["config"].update(surprise=1),
        lambda h: h["config"].update(top_k=-1),
        lambda h: h.update(tokens=[["a"]]),
        lambda h: h.update(tokens=[[None] * 37] * 2),
        lambda h: h.update(unexpected=1),
        lambda h: h.clear(),
    ],
)
def test_damaged_headers(change, stats, tmp_path):
    path = tmp_path / "run.safetensors"
    stats.save(path)
    _with_header(path, _change_ours(change))
    with pytest.raises(ValueError, match=r"path: the header of .* is damaged"):
        AttentionStats.load(path)


def test_files_that_are_not_ours(stats, tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        AttentionStats.load(path)
    save_file({"entropy": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="was not written by AttentionStats"):
        AttentionStats.load(path)
    stats.save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"path: .* is not a complete safetensors file"):
            AttentionStats.load(path)
    path.write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match=r"path: .* is not a complete safetensors file"):
        AttentionStats.load(path)


def test_copies(stats):
    assert same(pickle.loads(pickle.dumps(stats)), stats)  # noqa: S301
    assert same(copy.deepcopy(stats), stats)
    doubled = pytree.tree_map(lambda t: t * 2, stats)
    torch.testing.assert_close(doubled["entropy"], stats["entropy"] * 2, equal_nan=True)
    assert doubled.layers == stats.layers


def test_immutable(stats):
    with pytest.raises(AttributeError):
        stats.layers = (0,)
    with pytest.raises(TypeError):
        stats["entropy"] = torch.zeros(1)


def test_repr_says_what_is_inside(stats):
    text = repr(stats)
    assert "2 layers × 3 heads, batch 2, 19 queries, 37 keys" in text
    assert f"measured by {stats.engine!r} on backend 'sdpa'" in text
    assert "torch" in stats.engine
    assert "entropy" in text
    assert "(layer: 2, batch: 2, head: 3, query: 19)  [nat]" in text


def test_repr_leaves_out_what_is_not_known(stats):
    """As of norms alone, or statistics of the user's own of other tensors than attention, which no engine measures."""
    assert "  measured on backend 'sdpa'\n" in repr(dataclasses.replace(stats, engine="", model=""))
    assert "  measured by 'torch'\n" in repr(dataclasses.replace(stats, engine="torch", backend="", model=""))
    assert "''" not in repr(dataclasses.replace(stats, engine="", backend="", model=""))


def test_offload_and_float64(ids):
    model = tiny_model(dtype=torch.float64)
    config = AttentionStatsConfig(offload="cpu", norms=True)
    with torch.no_grad():
        stats = model(ids, output_attention_stats=config).attention_stats
    assert {t.dtype for t in stats.values.values()} == {torch.float64, torch.int32}
    assert {t.device.type for t in stats.values.values()} == {"cpu"}


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_where_the_numbers_end(offload, ids):
    """On the device of the logits, which a model spread over several need not share with its layers, or on the CPU."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.to("meta"))
    with torch.no_grad():
        outputs = model(ids, output_attention_stats=AttentionStatsConfig(offload=offload, norms=True))
    assert outputs.logits.device.type == "meta"
    assert {t.device.type for t in outputs.attention_stats.values.values()} == {offload or "meta"}


@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize(("offload", "first"), [("cpu", 1), (None, 3)])
def test_offload_moves_each_layers_numbers_at_once(offload, first, ids):
    """The meta device stands for an accelerator: whoever copies from it is caught in the act."""
    far = Statistic("far", ("layer", "batch", "head"), "-", "-", textbook=lambda reference: None,
                    stream=lambda block: block.scale.sum(-1).to("meta"))  # fmt: skip
    register_statistic(far)
    model, begun = tiny_model(), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: begun.append(True))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model(ids, output_attention_stats=AttentionStatsConfig(statistics=("far",), offload=offload))
    assert len(begun) == first


def test_select_reorders(stats):
    turned = stats.select(layers=[0, 2], heads=[3, 4, 1], batch=[1, 0])
    assert torch.equal(turned["entropy"].nan_to_num(), stats["entropy"].flip(0, 1, 2)[:, :, [0, 1, 2]].nan_to_num())
    assert torch.equal(turned["hidden_norm"].nan_to_num(), stats["hidden_norm"][[1, 0, 2]].flip(1).nan_to_num())
    assert turned.heads == (3, 4, 1)
    twice = stats.select(heads=torch.tensor([4, 4, 4]))
    assert twice.heads == (4, 4, 4)
    assert torch.equal(twice["entropy"].nan_to_num(), stats["entropy"][:, :, [1, 1, 1]].nan_to_num())
    for four in (np.int64(4), torch.tensor(4), np.array(4), np.array([4]), [torch.tensor(4)], range(4, 5)):
        assert stats.select(heads=four).heads == (4,)
        assert json.dumps(stats.select(heads=four).heads) == "[4]"
    for wrong in (slice(0, 2), True, "a", [1.5], [True], torch.tensor(True), torch.tensor([True]), np.bool_(True)):
        with pytest.raises(ValueError, match="heads: expected some of"):
            stats.select(heads=wrong)


def test_a_statistic_of_another_process_can_be_loaded(stats, tmp_path):
    path = tmp_path / "run.safetensors"
    stats.save(path)
    _with_header(path, _change_ours(lambda h: h["config"].update(statistics=["entropy", "varentropy"])))
    assert AttentionStats.load(path).config.statistics == ("entropy", "varentropy")


def test_save_to_a_folder(stats, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        stats.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_token_knows_its_segment(stats, tmp_path, ids):
    """In the file and in the dataset; what was generated is told apart, and padding behind the end has none."""
    words = ["system"] * 10 + ["user"] * 20 + [""] * 7
    assert "key_segment" not in stats.names
    for run in (stats, stats.select(layers=0, queries=30)):
        run.save(tmp_path / "run.safetensors")
        dataset = AttentionStats.load(tmp_path / "run.safetensors").to_xarray()
        assert dataset.key_segment.dims == ("batch", "key")
        assert dataset.key_segment.values.tolist() == [words] * 2
    assert stats.select(batch=1)["key_segment"].tolist() == [[0] * 10 + [1] * 20 + [-1] * 7]
    model = tiny_model()
    ends = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()
    outputs = model.generate(
        ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, pad_token_id=0, eos_token_id=ends,
        output_attention_stats=AttentionStatsConfig(segments=[["a"] * 37, ["b"] * 37]),
    )  # fmt: skip
    run = outputs.attention_stats
    assert outputs.sequences[0, 37:].tolist() == [ends, 0, 0, 0, 0], "the first row must end before the second"
    assert run.to_xarray().key_segment.values.tolist() == [
        ["a"] * 37 + [""] * 4, ["b"] * 37 + ["generated"] * 4,
    ]  # fmt: skip
    with torch.no_grad():
        assert "key_segment" not in model(ids, output_attention_stats=True).attention_stats
