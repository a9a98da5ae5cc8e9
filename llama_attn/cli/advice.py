"""What is said on the command line of what was not measured, and of other files: commands where the library says Python."""

from __future__ import annotations

from llama_attn.analysis.not_measured import NotMeasuredError
from llama_attn.stats.formats import STATS, SUMMARY, OtherFileError

# Statistics that need more than their name, and how they are measured.
ELSEWHERE = {
    "segment_mass": "needs segments; give several --file with --documents",
    "kept_mass": "needs the keys that are kept; `llama-attn budget` chooses them and tells it",
    "row_weights": "needs the queries that it is of: llama-attn run MODEL … --rows -1",
}
# What else than statistics may be missing: without an option for it, a run measures what is asked for here.
PARAMETERS = {
    "generated": "measure with llama-attn run MODEL … --generate N, of which the model writes 2 tokens or more",
    "heads": "measure with llama-attn run MODEL …, which measures all heads",
    "query_stride": "measure with llama-attn run MODEL … --generate N, which measures every query",
    "rows": "measure with llama-attn run MODEL … --rows -1",
    "segments": "measure with llama-attn run MODEL --file ONE --file OTHER --documents --generate N",
    "sink_tokens": "measure with llama-attn run MODEL …, whose sink is one token",
}
# What takes a file, by what it holds.
TAKING = {
    STATS: "llama-attn plot, report and compare take it",
    SUMMARY: "llama-attn report, compare and merge take it",
}


def advised(error: BaseException) -> str:
    """The message of an error, with advice that can be followed on the command line."""
    if isinstance(error, NotMeasuredError):
        return error.advising(_how_to_measure(error.missing))
    if isinstance(error, OtherFileError) and error.holds is not None:
        return error.advising(TAKING[error.holds])
    return str(error)


def _how_to_measure(missing: tuple[str, ...]) -> str:
    if parameters := [PARAMETERS[name] for name in missing if name in PARAMETERS]:
        return parameters[0]
    if special := [name for name in missing if name in ELSEWHERE]:
        return f"{special[0]} {ELSEWHERE[special[0]]}"
    return f"measure with llama-attn run MODEL … --statistics {','.join(missing)}"
