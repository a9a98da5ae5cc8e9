"""The HTML report: what the file holds is what was measured."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import CACHE, tiny_model
from own_text import own_text
from report_page import measured, ordered, written
from test_viz import TOKENS

from llama_attn.analysis import classify_heads, head_means, layer_evolution, sink_rate
from llama_attn.stats.token_text import readable
from llama_attn.viz import report
from llama_attn.viz.report import assembly


@pytest.mark.parametrize("batch", [0, 1])
def test_every_statistic_is_there_within_the_stated_rounding(batch, ids, left_padding, tmp_path):
    stats = measured(ids, left_padding)
    dataset = own_text(stats, batch).to_xarray()
    page = written(stats, tmp_path, batch=batch)
    row = dataset.sel(batch=batch)
    names = [each["name"] for each in page.about["statistics"]]
    assert {"entropy", "received", "induction", "hidden_norm", "key_norm", "value_output_norm"} <= set(names)
    for name in names:
        values = ordered(row[name]).astype(float)
        with_heads = {"head", "kv_head"} & set(row[name].dims)
        page.check(f"mean {name}", values.mean(1) if with_heads else values)
        if with_heads:
            page.check(f"heads {name}", values)
        assert page.about["arrays"][f"mean {name}"]["rounding"] < 2e-4
    evolution = layer_evolution(dataset.sel(batch=[batch]))
    for name in names:
        np.testing.assert_array_equal(page.array(f"layers {name}")[0], evolution[name].values.astype(np.float32))
    means = head_means(dataset.sel(batch=[batch]), "entropy")
    np.testing.assert_array_equal(page.array("grid entropy")[0], means.values)
    np.testing.assert_array_equal(page.array("real")[0], dataset.visible_queries[batch] > 0)
    np.testing.assert_array_equal(page.array("distance_histogram")[0], row.distance_histogram.values)
    maps = row.weights_map.values.copy()
    maps[np.broadcast_to(~np.nan_to_num(maps).any(1, keepdims=True), maps.shape)] = np.nan
    page.check("weights_map", maps)
    assert page.about["arrays"]["weights_map"]["width"] == 1
    page.check("topk_weight", np.nan_to_num(row.topk_weight.values))
    np.testing.assert_array_equal(page.array("topk_position")[0], row.topk_position.values + 1)
    roles = classify_heads(dataset.sel(batch=[batch])).role.tolist()
    assert [role for layer in page.about["roles"] for role in layer] == roles
    assert page.about["missing"] == []
    assert page.about["notShown"] == ["logits_map", "weight_count", "weight_mass"]
    assert (page.about["row"], page.about["rows"]) == (batch, 2)


def test_the_check_can_fail(ids, tmp_path):
    page = written(measured(ids), tmp_path)
    numbers, allowed = page.array("mean entropy")
    page.check("mean entropy", numbers)
    with pytest.raises(AssertionError):
        page.check("mean entropy", numbers + 1.5 * allowed.max())


def test_findings_are_those_of_the_analysis(ids, tmp_path):
    stats = measured(ids)
    page = written(stats, tmp_path)
    findings = page.about["findings"]
    assert len(findings) == 5
    assert all(finding["words"] and not finding["missing"] for finding in findings)
    rate = float(sink_rate(stats.to_xarray().sel(batch=[0])))
    assert f"{100 * rate:.1f}%" in (findings[0]["figure"], findings[0]["figure"].replace("%", ".0%"))
    assert {"token": 0} in findings[0]["words"]


def test_nothing_is_asked_of_a_network(ids, tmp_path):
    page = written(measured(ids), tmp_path)
    assert re.findall(r'\b(?:src|href|action)="([^"]*)"', page.html) == ["data:,", "#findings"]
    assert "default-src 'none'" in page.html
    assert "url(" not in page.html
    assert "import" not in re.sub(r"<style>.*?</style>", "", page.html.split("<script>")[0], flags=re.S)
    assert page.inflate("plotly").startswith(b"/**\n* plotly.js")


def test_tokens_are_data(ids, tmp_path):
    page = written(measured(ids), tmp_path)
    # One block per array, and the page's own code.
    assert page.html.count("<script") == page.html.count("</script>") == len(page.blocks) + 1
    for token in ("שלום", "🦜", "a" * 100, "$x$"):
        assert token not in page.html
    shown = page.about["tokens"][: len(TOKENS)]
    assert shown[:8] == ["<|im_start|>", "␣the", "⏎", "$x$", "</script>", "··", "שלום", "🦜"]
    assert shown[8] == "a" * 79 + "…[10,000 characters]"
    assert shown[9:] == [readable(token, 80) for token in TOKENS[9:]]


def test_a_folder_is_not_told(ids, tmp_path):
    stats = measured(ids)
    object.__setattr__(stats, "model", "/home/someone/models/parrot")
    assert written(stats, tmp_path).about["model"] == "parrot"
    object.__setattr__(stats, "model", "HuggingFaceTB/SmolLM2")
    assert written(stats, tmp_path).about["model"] == "HuggingFaceTB/SmolLM2"


@pytest.mark.parametrize("length", [1, 2, 7])
def test_short_texts(length, ids, tmp_path):
    page = written(measured(ids[:, :length]), tmp_path)
    assert page.about["length"] == length
    assert page.array("mean entropy")[0].shape == (3, length)


def test_layers_without_data(ids, tmp_path):
    stats = measured(ids)
    for name, tensor in stats.values.items():
        if tensor.is_floating_point():
            tensor[1] = torch.nan
        elif name in ("topk_position", "hidden_max_channel", "hidden_top_channel"):
            tensor[1] = -1
    page = written(stats, tmp_path)
    assert np.isnan(page.array("heads entropy")[0][1]).all()
    assert page.about["roles"][1] == [None] * 6
    assert page.about["massive"]["largest"][1] is None
    for tensor in stats.values.values():
        if tensor.is_floating_point():
            tensor[:] = torch.nan
    page = written(stats, tmp_path)
    assert [finding["caption"] for finding in page.about["findings"]] == ["no data"] * 5


def test_some_layers_and_heads(ids, tmp_path):
    stats = measured(ids, layers=(2, 0), heads=(4, 1))
    page = written(stats, tmp_path)
    assert page.about["layers"] == [0, 2]
    assert page.about["heads"] == [1, 4]
    assert page.about["hiddenLayers"] == [0, 2, 3]
    dataset = stats.to_xarray().sel(batch=0)
    page.check("heads entropy", dataset.entropy.sel(layer=[0, 2], head=[1, 4]).values)
    page.check("mean hidden_norm", dataset.hidden_norm.sel(hidden_layer=[0, 2, 3]).values)


def test_other_axes_segments_strides_and_caches(ids, tmp_path):
    segments = torch.arange(37).repeat(2, 1) // 20
    stats = measured(ids, segments=segments, query_stride=3)
    page = written(stats.to_xarray().transpose(..., "layer", "batch"), tmp_path)
    page.check("heads segment_mass 1", stats["segment_mass"][:, 0, ..., 1])
    assert page.about["queries"] == {"first": 0, "stride": 3, "count": 13}
    model = tiny_model()
    with torch.no_grad():
        cache = model(ids[:, :20]).past_key_values
        stats = model(ids[:, 20:], **{CACHE: cache}, output_attention_stats=True).attention_stats
    page = written(stats, tmp_path)
    assert page.about["queries"] == {"first": 20, "stride": 1, "count": 17}
    assert page.about["length"] == 37
    assert page.about["tokens"] is None


def test_what_is_missing_is_named(ids, tmp_path):
    stats = measured(ids, statistics=("received", "topk_weight"), norms=False)
    page = written(stats, tmp_path)
    assert {"weights_map", "topk_position", "entropy", "hidden_max", "induction"} <= set(page.about["missing"])
    assert not {"received", "topk_weight"} & set(page.about["missing"])
    assert [bool(finding["missing"]) for finding in page.about["findings"]] == [False, True, True, True, True]
    assert "topk_weight" not in page
    assert page.about["roles"] is page.about["massive"] is None
    page = written(measured(ids, statistics=("hidden_norm",), norms=False), tmp_path)
    assert page.about["layers"] == [0, 1, 2]
    assert page.about["heads"] == []
    assert [each["name"] for each in page.about["statistics"]] == ["hidden_norm"]


def test_the_file_appears_only_when_complete(ids, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(assembly.Shell, "filled", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report(measured(ids), path)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_every_kind_of_source_gives_the_same_file(ids, tmp_path):
    stats = measured(ids)
    stats.save(tmp_path / "run.safetensors")
    pages = [written(source, tmp_path).html for source in (stats, stats.to_xarray(), tmp_path / "run.safetensors")]
    assert pages[0] == pages[1] == pages[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 2}, r"batch: 2 was not measured; there are \[0, 1\]"),
        ({"max_megabytes": 0}, "max_megabytes: expected a positive number, got 0"),
        ({"max_megabytes": True}, "max_megabytes: expected a positive number, got True"),
        ({"max_megabytes": float("nan")}, "max_megabytes: expected a positive number, got nan"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message, ids, tmp_path):
    with pytest.raises(ValueError, match=message):
        report(measured(ids), tmp_path / "report.html", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_other_bad_requests(ids, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report(measured(ids), tmp_path / "missing" / "report.html")
    mask = torch.ones_like(ids)
    mask[0] = 0
    with pytest.raises(ValueError, match="batch: row 0 is all padding"):
        report(measured(ids, mask), tmp_path / "report.html")
    with pytest.raises(TypeError, match="expected AttentionStats"):
        report(tiny_model(), tmp_path / "report.html")
