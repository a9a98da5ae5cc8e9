"""The step of datatrove's pipelines, on its local executor: the same summary as that of a run."""

from __future__ import annotations

from corpora import CONFIG, LENGTH, Letters, assert_same, measured, model, write
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader

from llama_attn.corpus import CorpusSummary
from llama_attn.corpus.datatrove import MeasureAttention
from llama_attn.corpus.run import SHARDS


def load():
    return model(), Letters()


def test_four_tasks_of_two_workers(tmp_path):
    write(tmp_path / "texts", parts=5, count=50)
    expected = measured(tmp_path / "texts", tmp_path / "run")
    step = MeasureAttention(tmp_path / "out", load, CONFIG, max_tokens=LENGTH, batch_tokens=100, records=8, examples=3)
    LocalPipelineExecutor(
        [JsonlReader(str(tmp_path / "texts")), step], tasks=4, workers=2, logging_dir=str(tmp_path / "logs")
    ).run()
    parts = sorted((tmp_path / "out" / SHARDS).glob("*.safetensors"))
    assert [part.name for part in parts] == [f"task-{rank:05}-of-00004.safetensors" for rank in range(4)]
    assert_same(CorpusSummary.merge(CorpusSummary.load(part) for part in parts), expected)
