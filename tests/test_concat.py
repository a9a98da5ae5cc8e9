"""Texts put together afterwards are the batch that would have been measured at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model

from llama_attn import AttentionStats, AttentionStatsConfig
from llama_attn.analysis import coverage, sink_rate

LENGTHS = (23, 37, 30)
LABELS = [["a"] * 5 + [None] * 2 + ["b"] * 16, ["b"] * 20 + ["c"] * 17, ["a"] * 30]


class Words:
    def convert_ids_to_tokens(self, ids):
        return ["" if number == 0 else f"t{number}" for number in ids]


def texts():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (1, length), generator=generator) for length in LENGTHS]


def measure(model, ids, mask=None, segments=None, **settings):
    config = AttentionStatsConfig(**({"statistics": "all", "norms": True} | settings), segments=segments)
    with torch.no_grad():
        stats = model(ids, attention_mask=mask, output_attention_stats=config).attention_stats
    return stats.with_tokens(Words(), ids)


def at_once(model, **settings):
    longest = max(LENGTHS)
    rows = [torch.nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in texts()]
    labels = [row + [None] * (longest - len(row)) for row in LABELS]
    ids = torch.cat(rows)
    return measure(model, ids, (ids > 0).long(), labels, **settings)


@pytest.mark.parametrize("settings", [{}, {"layers": (2, 0), "heads": (1, 4), "query_stride": 3}, {"top_k": 40}])
def test_as_measured_at_once(settings):
    settings = {"rows": (4, 9, 15), "map_size": 37} | settings
    model = tiny_model(dtype=torch.float64)
    alone = [measure(model, ids, None, [row], **settings) for ids, row in zip(texts(), LABELS, strict=True)]
    found, expected = AttentionStats.concat(alone), at_once(model, **settings)
    assert found.names == expected.names
    assert len(found.names) > 25
    for name in expected.values:
        assert found.labels[name] == expected.labels[name]
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    for field in ("layers", "heads", "num_layers", "tokens", "segments", "first_query", "length", "rows", "direction"):
        assert getattr(found, field) == getattr(expected, field), field
    assert found.queries == expected.queries
    assert found.keys == expected.keys
    assert found.coordinates() == expected.coordinates()
    assert sink_rate(found) == sink_rate(expected)


def test_layers_that_see_different_keys():
    """One text is shorter than the window, so that its layers do not differ; the other's do."""
    window = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 25}
    from transformers import AutoModelForCausalLM, Qwen2Config

    from llama_attn import record

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 2, "use_sliding_window": True}  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **window)).double().eval()

    def recorded(ids, mask=None):
        with record(model, AttentionStatsConfig(statistics=("entropy", "received"))) as recording, torch.no_grad():
            model(ids, attention_mask=mask)
        return recording.stats

    short, long = texts()[:2]
    alone = [recorded(short), recorded(long)]
    assert [stats.visible_keys.ndim for stats in alone] == [2, 3]
    ids = torch.cat([torch.nn.functional.pad(short, (0, 14)), long])
    expected = recorded(ids, (ids > 0).long())
    found = AttentionStats.concat(alone)
    for name in expected.values:
        assert found.labels[name].dims == expected.labels[name].dims
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11, equal_nan=True)


def test_rows_of_every_text(tmp_path):
    """The last token of texts of different length: one row each, which others do not have."""
    model = tiny_model()
    alone = [measure(model, ids, statistics="entropy", norms=False, rows=(-1,)) for ids in texts()]
    found = AttentionStats.concat(alone)
    assert found.rows == (22, 29, 36)
    for b, (row, length) in enumerate(zip((0, 2, 1), LENGTHS, strict=True)):
        torch.testing.assert_close(found["row_weights"][:, b, :, row, :length], alone[b]["row_weights"][:, 0, :, 0])
        assert found["row_weights"][:, b, :, row, length:].isnan().all()
        assert found["row_weights"][:, b, :, [at for at in range(3) if at != row]].isnan().all()
    found.save(tmp_path / "joined.safetensors")
    read = AttentionStats.load(tmp_path / "joined.safetensors")
    torch.testing.assert_close(read["row_weights"], found["row_weights"], equal_nan=True)
    torch.testing.assert_close(AttentionStats.concat([found])["entropy"], found["entropy"], equal_nan=True)
    parts = [*alone[:2], AttentionStats.concat(alone[2:])]
    torch.testing.assert_close(AttentionStats.concat(parts)["entropy"], found["entropy"], equal_nan=True)


def test_pooled_answers_are_those_of_the_batch():
    model = tiny_model(dtype=torch.float64)
    config = {"statistics": ("weight_count", "weight_mass"), "norms": False}
    found = AttentionStats.concat([measure(model, ids, **config) for ids in texts()])
    expected = at_once(model, **config)
    torch.testing.assert_close(
        torch.from_numpy(coverage(found).most.values), torch.from_numpy(coverage(expected).most.values)
    )


def test_what_does_not_fit():
    model = tiny_model()
    first, second = (measure(model, ids, statistics="entropy", norms=False) for ids in texts()[:2])
    concat = AttentionStats.concat
    with pytest.raises(ValueError, match=r"at least one AttentionStats, got \[\]"):
        concat([])
    with pytest.raises(ValueError, match=r"at least one AttentionStats, got \['AttentionStats', 'int'\]"):
        concat([first, 3])
    with pytest.raises(ValueError, match=r"dim: expected 'batch', .* got 'query'"):
        concat([first, second], dim="query")
    more = measure(model, texts()[1], statistics=("entropy", "received"), norms=False)
    with pytest.raises(
        ValueError, match=r"stats\[1\]: expected the statistics of stats\[0\]; .* has \['received'\] beside"
    ):
        concat([first, more])
    with pytest.raises(ValueError, match=r"stats\[1\]: expected layers as in stats\[0\], \(0, 1, 2\), got \(1,\)"):
        concat([first, second.select(layers=1)])
    with pytest.raises(ValueError, match=r"stats\[1\]: expected config as in stats\[0\].*window=9"):
        concat([first, measure(model, texts()[1], statistics="entropy", norms=False, window=9)])
    with pytest.raises(ValueError, match=r"stats\[1\]: expected model as in stats\[0\], '', got 'another'"):
        concat([first, replace(second, model="another")])
    with pytest.raises(ValueError, match=r"stats\[1\]: expected token strings in all or in none"):
        concat([first, replace(second, tokens=None)])
    maps = [measure(model, ids, statistics="weights_map", norms=False, map_size=30) for ids in texts()[:2]]
    with pytest.raises(ValueError, match=r"bins of \['weights_map'\] are \[1, 2\] tokens wide.*map_size"):
        concat(maps)
