"""The HTML report: what the file holds is what was measured."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_viz import TOKENS, Tokenizer

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import classify_heads, head_means, layer_evolution, sink_rate
from llama_attn.token_text import readable
from llama_attn.viz import html, report
from llama_attn.viz.contents import along_text, one_row
from llama_attn.viz.embedding import Level, Part, embed, embed_rounded, fit
from llama_attn.viz.pooling import pool_tokens, pool_top_keys, widths

AXES = ("layer", "hidden_layer", "head", "kv_head", "query", "key")


def measured(ids, mask=None, model=None, statistics="all", norms=True, tokens=True, **settings):
    config = AttentionStatsConfig(statistics=statistics, norms=norms, **settings)
    with torch.no_grad():
        stats = (model or tiny_model())(ids, attention_mask=mask, output_attention_stats=config).attention_stats
    numbers = torch.arange(ids.numel()).view(ids.shape)
    return stats.with_tokens(Tokenizer(), numbers) if tokens else stats


class Page:
    """A report, read back without a browser."""

    def __init__(self, path):
        self.html = path.read_text("utf-8")
        self.blocks = dict(
            re.findall(r'<script type="application/octet-stream" id="(\w+)">([\w+/=]*)</script>', self.html)
        )
        self.about = json.loads(self.inflate("about"))

    def inflate(self, name):
        return zlib.decompress(base64.b64decode(self.blocks[name]))

    def __contains__(self, name):
        return name in self.about["arrays"]

    def array(self, name):
        """The numbers of an array, and how far each may be off."""
        entry = self.about["arrays"][name]
        planes = np.frombuffer(self.inflate(entry["id"]), np.uint8)
        size = int(entry["dtype"][1])
        values = np.ascontiguousarray(planes.reshape(size, -1).T).view("<" + entry["dtype"]).reshape(entry["shape"])
        if "scale" not in entry:
            return values, np.zeros(values.shape)
        scale, low, step = (
            np.reshape(entry[key], (-1,) + (1,) * (values.ndim - 1)) for key in ("scale", "low", "step")
        )
        numbers = np.where(values == 0, np.nan, scale * np.sinh(low + step * (values.astype(float) - 1)))
        return numbers, entry["rounding"] * np.maximum(np.abs(numbers), scale)

    def stated(self, name, layer):
        """The stated rounding of a layer as tolerances of `assert_allclose`."""
        entry = self.about["arrays"][name]
        return {"rtol": entry["rounding"], "atol": entry["rounding"] * entry["scale"][layer]}

    def check(self, name, expected):
        """Within the stated rounding, beside that of means in float32; NaN where NaN is."""
        numbers, allowed = self.array(name)
        expected = np.asarray(expected, dtype=float)
        np.testing.assert_array_equal(np.isnan(numbers), ~np.isfinite(expected), err_msg=name)
        known = np.isfinite(expected)
        allowed = allowed + np.finfo(np.float32).eps * np.abs(expected)
        assert (np.abs(numbers - expected)[known] <= allowed[known]).all(), name


def written(source, tmp_path, **settings):
    return Page(report(source, tmp_path / "report.html", **settings))


def ordered(values):
    return values.transpose(*[axis for axis in AXES if axis in values.dims]).values


@pytest.mark.parametrize("batch", [0, 1])
def test_every_statistic_is_there_within_the_stated_rounding(batch, ids, left_padding, tmp_path):
    stats = measured(ids, left_padding)
    dataset = stats.to_xarray()
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
    assert page.about["notShown"] == ["logits_map"]
    assert (page.about["row"], page.about["rows"]) == (batch, 2)


def test_the_check_can_fail(ids, tmp_path):
    page = written(measured(ids), tmp_path)
    numbers, allowed = page.array("mean entropy")
    page.check("mean entropy", numbers)
    with pytest.raises(AssertionError):
        page.check("mean entropy", numbers + 1.5 * allowed.max())


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_as_stated(bits):
    generator = np.random.default_rng(0)
    wide = np.exp(4 * generator.standard_normal((5, 999)))
    for values in (wide, -wide, wide - 20, np.where(wide > 1, wide, 0.0), np.full((2, 7), 3.5), np.zeros((1, 3))):
        values = values.astype(np.float32)
        values[0, 0] = np.nan
        packed = embed_rounded(values, bits)
        codes = np.frombuffer(zlib.decompress(base64.b64decode(packed.text)), np.uint8)
        codes = codes.reshape(bits // 8, -1).T.astype(int) @ [1, 256][: bits // 8]
        codes = codes.reshape(values.shape)
        about = {key: np.array(packed.about[key])[:, None] for key in ("scale", "low", "step")}
        numbers = about["scale"] * np.sinh(about["low"] + about["step"] * (codes - 1))
        assert (codes == 0).sum() == 1
        known = codes > 0
        allowed = packed.about["rounding"] * np.maximum(np.abs(values), about["scale"])
        error = np.abs(numbers - values)
        assert (error[known] <= allowed[known] * (1 + 1e-6) + 1e-12).all()
        if values.std() > 0 and bits == 8:
            assert error[known].max() > 0.2 * allowed[known].min(), "the bound says something"
        np.testing.assert_array_equal(numbers[known & (values == 0)], 0.0)


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
        elif name in ("topk_position", "hidden_max_channel"):
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
        stats = model(ids[:, 20:], past_key_values=cache, output_attention_stats=True).attention_stats
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


def test_everything_fits_into_the_budget(ids, tmp_path):
    """Less room, less detail; what is stored is what the page says it is."""
    stats = measured(ids.repeat(1, 6)[:, :211], model=tiny_model(num_attention_heads=12, num_key_value_heads=2))
    row = one_row(stats.to_xarray(), 0)
    full = (written(stats, tmp_path)).html
    least = least_megabytes(stats, tmp_path)
    seen = set()
    for share in (0.8, 0.5, 0.2, 0):
        budget = least + share * (len(full.encode()) / 1e6 - least)
        page = written(stats, tmp_path, max_megabytes=budget)
        assert (tmp_path / "report.html").stat().st_size <= budget * 1e6
        for name in along_text(row):
            values = row[name].isel(batch=0)
            exact = ordered(values).astype(float)
            with_heads = {"head", "kv_head"} & set(values.dims)
            entry = page.about["arrays"][f"mean {name}"]
            page.check(f"mean {name}", pool_tokens(exact.mean(1) if with_heads else exact, entry["width"]))
            seen.add(("mean", entry["bits"], entry["width"]))
            if f"heads {name}" in page:
                entry = page.about["arrays"][f"heads {name}"]
                page.check(f"heads {name}", pool_tokens(exact, entry["width"]))
                seen.add(("heads", entry["bits"], entry["width"]))
            elif with_heads:
                seen.add("without heads")
        np.testing.assert_array_equal(page.array("grid entropy")[0], head_means(row, "entropy").values)
    assert {("mean", 16, 1), ("mean", 8, 1), ("mean", 8, 2), ("heads", 8, 1), ("heads", 8, 2), "without heads"} <= seen


def least_megabytes(stats, tmp_path):
    """What the error says is needed."""
    with pytest.raises(ValueError, match=r"max_megabytes: 1 is too small for this run; .* it needs 2\.\d+") as error:
        report(stats, tmp_path / "report.html", max_megabytes=1)
    return float(str(error.value).split()[-1])


def test_too_small_a_budget_leaves_no_file(ids, tmp_path):
    stats = measured(ids)
    least = least_megabytes(stats, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert 2 < least < 2.5
    written(stats, tmp_path, max_megabytes=least)
    with pytest.raises(ValueError, match="is too small"):
        report(stats, tmp_path / "report.html", max_megabytes=least - 0.01)


def test_the_file_appears_only_when_complete(ids, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(html, "_page", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
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


def test_pooling_of_tokens():
    values = np.array([[1.0, 3.0, np.nan, 5.0, np.nan], [0.0, 0.0, np.nan, np.nan, 7.0]])
    pooled = pool_tokens(values, 2)
    np.testing.assert_array_equal(pooled, [[2.0, 5.0, np.nan], [0.0, np.nan, 7.0]])
    assert pool_tokens(values, 1) is values
    assert widths(130, 64) == [1, 2]
    assert widths(4096, 64) == [1, 2, 4, 8, 16, 32, 64]
    assert widths(1, 64) == [1]


@pytest.mark.parametrize("width", [1, 2, 5])
def test_pooling_of_most_attended_keys(width):
    generator = np.random.default_rng(1)
    heads, queries, ranks = 2, 11, 3
    position = np.stack([[generator.permutation(11)[:ranks] for _ in range(queries)] for _ in range(heads)])
    weight = generator.random((heads, queries, ranks)).astype(np.float32)
    real = np.arange(queries) != 4
    weight[:, 4], position[:, 4] = np.nan, -1
    means, keys = pool_top_keys(weight, position, real, width, 3)
    for head in range(heads):
        for start in range(0, queries, width):
            sums = {}
            inside = [query for query in range(start, min(start + width, queries)) if real[query]]
            for query in inside:
                for key, share in zip(position[head, query], weight[head, query], strict=True):
                    sums[int(key)] = sums.get(int(key), 0.0) + float(share)
            best = sorted(sums.items(), key=lambda item: -item[1])[:3]
            found = [
                (int(key), float(share))
                for key, share in zip(keys[head, start // width], means[head, start // width], strict=True)
                if key >= 0
            ]
            assert [key for key, _ in found] == [key for key, _ in best]
            np.testing.assert_allclose(
                [share for _, share in found], [total / len(inside) for _, total in best], rtol=1e-5
            )


def test_fitting_takes_from_the_largest_first():
    def part(name, sizes, worth=1.0):
        def level(size):
            return Level(size, lambda: {name: embed(np.random.default_rng(0).integers(256, size=size, dtype=np.uint8))})

        return Part(name, [level(size) for size in sizes], worth)

    parts = [part("large", [4000, 2000, 1000]), part("worthy", [4000, 2000], worth=5), part("small", [400, 200])]
    assert len(fit(parts, 20_000)) == 3
    assert [each.level for each in parts] == [0, 0, 0]
    fit(parts, 9_000)
    assert [each.level for each in parts] == [1, 0, 0]
    fit(parts, 4_800)
    assert [each.level for each in parts] == [2, 1, 0]
    with pytest.raises(ValueError, match="most: 100 characters are too few"):
        fit(parts, 100)
