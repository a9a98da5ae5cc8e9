"""Run transformers' own model tests on its models and on those that this library observes, and compare the two.

    pip download --no-deps --no-binary :all: transformers==5.23.0
    pip install parameterized==0.9.0
    python tests/upstream/run.py transformers-5.23.0.tar.gz [--families llama qwen3] [--classes stock recorded] [-k save]

``make upstream`` does all of it. The classes are transformers' own (``stock``), the same with every forward and every
``generate`` inside ``llama_attn.record`` (``recorded``), and for Llama this library's (``ours``), also with
statistics in every forward (``observed``). Whatever else is given goes to pytest.

The source distribution has ``tests/test_*.py``, the mixins with the checks, and none of the folders below ``tests/``.
A package ``upstream_tests`` is put together from those mixins and from the files beside this one:

- ``suite.py`` applies the mixins to a model, as upstream's ``tests/models/llama`` does,
- ``families.py`` says to which models and ``classes.py`` to which classes of them,
- ``generation.py`` and ``distributed.py`` stand in for two modules that the mixins import from the missing folders;
  so do the few lines in `MISSING`.

Nothing here is a test of the ordinary run: no file is named ``test_*.py``.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from families import FAMILIES

HERE = Path(__file__).parent
CLASSES = ("stock", "ours", "observed", "recorded")
SHIPPED = ("test_*_common.py", "test_*_mixin.py", "test_executorch.py")
OURS = {
    "suite.py": "test_models.py",
    "families.py": "families.py",
    "classes.py": "classes.py",
    "generation.py": "generation/test_utils.py",
    "distributed.py": "distributed_testing_utils.py",
}
MISSING = {
    # The processes of distributed tests import the package and nothing else of ours.
    "__init__.py": "import upstream_tests.classes\n",
    "generation/__init__.py": "",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": """\
config_common_kwargs = {
    "return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": "float16",
    "chunk_size_feed_forward": 5, "architectures": ["BertModel"], "id2label": {0: "label"}, "label2id": {"label": "0"},
    "problem_type": "regression",
}
""",
    "exporters/__init__.py": "",
    # Its checks are not shipped; `generation.py` has exports of its own.
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
}

# Why `record` may refuse a forward of these tests: what upstream does there leaves nothing to record.
REFUSALS = ()

Outcomes = dict[str, collections.Counter[str]]


@dataclass(frozen=True)
class Run:
    """What one run of the suite gave.

    Args:
        outcomes: How often every test, its subtests included, had which outcome.
        recordings: How many recordings ended how.
    """

    outcomes: Outcomes
    recordings: collections.Counter[str]

    @property
    def summary(self) -> str:
        """Counts of tests and recordings."""
        counts = sum(self.outcomes.values(), collections.Counter())
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        recorded = f"; {self.recordings['recorded']} recordings" if self.recordings else ""
        return f"{len(self.outcomes)} tests; {kinds}{recorded}"

    @property
    def failed(self) -> bool:
        """Whether a test failed."""
        return any(outcomes[kind] for outcomes in self.outcomes.values() for kind in ("failure", "error"))

    @property
    def unexpected(self) -> list[str]:
        """How recordings ended that should not have."""
        fine = ("recorded", *REFUSALS)
        return [f"{n} x {end}" for end, n in sorted(self.recordings.items()) if not end.startswith(fine)]


def build_package(sdist: Path, folder: Path) -> None:
    """Lay out ``upstream_tests`` in ``folder``."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    package = folder / "upstream_tests"
    package.mkdir()
    for pattern in SHIPPED:
        for file in (folder / "sdist").glob(f"*/tests/{pattern}"):
            shutil.copy(file, package)
    for name, text in MISSING.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text)
    for name, destination in OURS.items():
        shutil.copy(HERE / name, package / destination)


def run(folder: Path, family: str, classes: str, options: list[str]) -> Run:
    """Run the suite in a process of its own."""
    report, recordings = folder / f"{family}-{classes}.xml", folder / f"{family}-{classes}.txt"
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "UPSTREAM_FAMILY": family,
        "UPSTREAM_CLASSES": classes,
        "UPSTREAM_RECORDINGS": str(recordings),
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", "--tb=short"]
    command += [f"--rootdir={folder}", "-c", os.devnull, f"--junitxml={report}", *options]
    command += [str(folder / "upstream_tests" / "test_models.py")]
    status = subprocess.run(command, env=environment, cwd=folder, check=False).returncode
    if status not in (0, 1):
        raise SystemExit(f"pytest did not run the tests of {family} {classes}, it exited with {status}")
    outcomes: Outcomes = collections.defaultdict(collections.Counter)
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 (written by the line above)
        # One child for the test, or one for each of its subtests that did not pass.
        found = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        outcomes[name].update(found or ["passed"])
    return Run(outcomes, collections.Counter(recordings.read_text().splitlines() if recordings.exists() else []))


def differences(first: Outcomes, second: Outcomes) -> list[str]:
    """Tests that did not have the same outcomes."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def main() -> int:
    """Run, count and compare; 1 if a class under test differs from stock, or a recording ended as it should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="transformers-*.tar.gz")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), choices=list(CLASSES))
    arguments, options = parser.parse_known_args()
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        build_package(arguments.sdist, Path(folder))
        for family in arguments.families:
            classes = [name for name in arguments.classes if family == "llama" or name in ("stock", "recorded")]
            bad = compare({name: run(Path(folder), family, name, options) for name in classes}, family) or bad
    return int(bad)


def compare(runs: dict[str, Run], family: str) -> bool:
    """Print what the runs of a family gave; whether anything is amiss in them."""
    (base, first), *others = runs.items()
    # Tests that fail in stock are upstream's.
    bad = first.failed and not others
    print(f"{family}, {base}: {first.summary}")
    for classes, other in others:
        names = differences(first.outcomes, other.outcomes)
        print(f"{family}, {classes}: {other.summary}; differs from {base} in {len(names)} tests")
        for name in names:
            theirs, ours = (dict(found.get(name, {})) for found in (first.outcomes, other.outcomes))
            print(f"  {name}: {base} {theirs}, {classes} {ours}")
        for end in other.unexpected:
            print(f"  {end}")
        bad = bad or bool(names or other.unexpected)
        if classes == "recorded" and not other.recordings["recorded"]:
            print("  nothing was recorded")
            bad = True
    return bad


if __name__ == "__main__":
    sys.exit(main())
