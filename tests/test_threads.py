"""The torch engine works on several blocks at a time, each in a thread of its own."""

from __future__ import annotations

import threading

import pytest
import torch

from llama_attn import AttentionStatsConfig
from llama_attn.engines import torch as engine
from llama_attn.engines._threads import in_threads
from llama_attn.stats.block import Wanted
from llama_attn.stats.table import statistics_table
from llama_attn.testing import make_inputs


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_number_of_threads_does_not_matter(padding, four_threads):
    inputs = make_inputs(queries=41, cached=4, padding=padding, dtype=torch.float64)
    segments, tokens = torch.zeros(2, 45, dtype=torch.long), torch.arange(90).view(2, 45) % 5
    config = AttentionStatsConfig(statistics="all", segments=segments)
    statistics = [statistic for statistic in statistics_table().values() if not statistic.is_norm]
    wanted = Wanted(statistics, config, segments, 1, tokens, keep=tokens[:, None] < 2)

    def walk():
        arguments = (inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring, wanted)
        # Nine blocks of which the last is short; more than threads.
        return engine.walk(*arguments, block_rows=5)

    many = walk()
    torch.set_num_threads(1)
    one = walk()
    torch.testing.assert_close(many.output, one.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(many.logsumexp, one.logsumexp, rtol=1e-12, atol=1e-12)
    assert many.raw.keys() == one.raw.keys() == {statistic.name for statistic in statistics}
    for name, expected in one.raw.items():
        torch.testing.assert_close(many.raw[name], expected, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


def test_as_many_blocks_as_memory_allows(four_threads, monkeypatch):
    inputs = make_inputs(queries=41)
    # Scores of five queries.
    block_bytes = 5 * 4 * inputs.query.shape[0] * inputs.query.shape[1] * inputs.visibility.num_keys
    counts = []
    monkeypatch.setattr(engine, "in_threads", lambda work, count: counts.append(count) or in_threads(work, count))
    for allowed in (4 * block_bytes, 3 * block_bytes - 1, 1):
        monkeypatch.setattr(engine, "ALL_BLOCKS_BYTES", allowed)
        engine.walk(inputs.query, inputs.key, inputs.value, inputs.visibility, inputs.scoring, block_rows=5)
    assert counts == [4, 2, 1]


def test_calls_share_the_threads_and_the_caller_keeps_his(four_threads):
    meet = {count: threading.Barrier(count, timeout=30) for count in (2, 3)}

    def work(worker, count=3):
        # Nobody gets here alone.
        meet[count].wait()
        return worker, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        assert in_threads(work, 3) == [(worker, 1, False, True) for worker in range(3)]
    with torch.no_grad():
        assert in_threads(work, 3) == [(worker, 1, False, False) for worker in range(3)]
    assert in_threads(work, 3) == [(worker, 1, True, False) for worker in range(3)]
    assert in_threads(lambda worker: work(worker, 2), 2) == [(worker, 2, True, False) for worker in range(2)]
    assert torch.get_num_threads() == 4


def test_what_goes_wrong_in_a_thread_is_told(four_threads):
    def work(worker):
        if worker == 1:
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        in_threads(work, 3)
    assert torch.get_num_threads() == 4
