"""Statistics of a corpus: any number of texts, on any number of processes, in one summary of fixed size."""

from llama_attn.corpus.comparing import compare
from llama_attn.corpus.summary import CorpusSummary

__all__ = ["CorpusSummary", "compare"]
