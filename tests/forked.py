"""Processes that begin with torch, transformers and the like imported, which takes longer than most of what tests run.

They are forked from a server that has nothing else: each imports the library itself, and whatever it needs of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

IMPORTED = (
    "gguf", "hypothesis.strategies", "matplotlib.figure", "pandas", "pytest", "torch._dynamo", "typer",
    "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "transformers.masking_utils", "xarray",
)  # fmt: skip
TESTS = Path(__file__).parent
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([*IMPORTED])


class Python:
    """What ``python`` with these arguments would be: ``-c`` and code, ``-m`` and a module, or a script, and what follows."""

    def __init__(
        self, *arguments: object, folder: Path | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115
        told = ([*map(str, arguments)], folder or Path.cwd(), dict(environment), self._output.name)
        self._process = processes.Process(target=_run, args=told)
        self._process.start()

    def ended(self, seconds: float = 300) -> tuple[int, str]:
        """Its exit status, and what it has printed, errors too; killed if it takes longer."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._output.seek(0)
        return self._process.exitcode, self._output.read().decode()


def _run(arguments: list[str], folder: Path, environment: dict[str, str], output: str) -> None:
    with open(output, "wb") as file:  # noqa: PTH123
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first, *rest = arguments
    ahead = [
        str(Path(first).parent.resolve()) if not first.startswith("-") else "",
        *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    # Those of the process that started this one, but for the tests: pytest has put them there.
    sys.path[:] = [*ahead, *(path for path in sys.path if path and not Path(path).is_relative_to(TESTS))]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")
