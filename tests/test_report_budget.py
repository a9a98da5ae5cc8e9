"""The HTML report in little room: what is rounded and pooled is as the page says."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest
from conftest import tiny_model
from report_page import measured, ordered, written

from llama_attn.analysis import head_means
from llama_attn.viz import report
from llama_attn.viz.report.contents import along_text, one_row
from llama_attn.viz.report.embedding import Level, Part, embed, embed_rounded, fit
from llama_attn.viz.report.pooling import pool_tokens, pool_top_keys, widths


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


def test_everything_fits_into_the_budget(ids, tmp_path):
    """Less room, less detail; what is stored is what the page says it is."""
    stats = measured(ids.repeat(1, 6)[:, :211], model=tiny_model(num_attention_heads=12, num_key_value_heads=2))
    row = one_row(stats.to_xarray(), 0)
    full = (written(stats, tmp_path)).html
    least = least_megabytes(stats, tmp_path)
    seen = set()
    for share in (0.8, 0.5, 0.2, 0.05, 0):
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
