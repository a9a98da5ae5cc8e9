"""Many mutated files, loaded and looked at: ``make fuzz``, or ``python tests/attacks/fuzz.py --files 1000 --seed 7``.

Each file has a number, and with the seed it is the same file again: ``--only 4711`` tries one alone. A file may be
refused with a ValueError that names its path; of one that loads, everything must work that is done first. Figures and
reports, of every ``--draw``-th file that loads, may refuse it as well, if it is our code that says why.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

# The helpers of all tests lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib as mpl

mpl.use("agg")

import hostile
from matplotlib import pyplot as plt
from mutations import mutated

import llama_attn
from llama_attn import AttentionStats, viz
from llama_attn.corpus import CorpusSummary
from llama_attn.stats import formats

PACKAGE = str(Path(llama_attn.__file__).parent)
MOST_SECONDS = 2.0
# Address space beyond what is taken before a file is looked at, whatever it holds; for figures and pages.
MOST_BYTES, MOST_BYTES_DRAWN = 64 * 2**20, 384 * 2**20
# What Python says to auditors when code is run, a program started, a library loaded or another machine asked.
CODE = {"exec", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
        "ctypes.dlopen", "socket.connect"}  # fmt: skip
# Modules that are installed may be imported at any time.
INSTALLED = (PACKAGE, sys.prefix, sys.base_prefix, "<frozen")
FIGURES = [
    lambda path: viz.plot_head_grid(path, "entropy"),
    viz.plot_attention_map, viz.plot_coverage, viz.plot_distance_histogram, viz.plot_head_roles, viz.plot_hidden_norms,
    viz.plot_kv_norms, viz.plot_layer_heads, viz.plot_layer_profile, viz.plot_massive_activations, viz.plot_model_view,
    viz.plot_sources, viz.plot_token_strip,
]  # fmt: skip


class Watch:
    """Code that runs while something is watched."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.on and event in CODE and not getattr(arguments[0], "co_filename", "").startswith(INSTALLED):
            self.seen.append((event, repr(arguments)[:200]))


def draw_run(path: Path, folder: Path, number: int) -> None:
    """A report, or one of the figures."""
    at = number % (len(FIGURES) + 1)
    if at == len(FIGURES):
        viz.report(AttentionStats.load(path), folder / "page.html")
    else:
        FIGURES[at](AttentionStats.load(path)).savefig(folder / "figure.png", dpi=30)
    plt.close("all")


def draw_corpus(path: Path, folder: Path, number: int) -> None:
    """A report as a page or as JSON; or the merge with the real file, saved and loaded again."""
    summary = CorpusSummary.load(path)
    if number % 3 == 0:
        viz.corpus_report(summary, folder / "page.html")
    elif number % 3 == 1:
        viz.corpus_json(summary, folder / "corpus.json")
    else:
        real = folder / "real.safetensors"
        real.write_bytes(hostile.corpus_file())
        CorpusSummary.merge([CorpusSummary.load(real), summary]).save(folder / "merged.safetensors")
        CorpusSummary.load(folder / "merged.safetensors")


def said_by_us(error: BaseException) -> bool:
    """Whether it is a ValueError that our own code raises."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_code.co_filename.startswith(PACKAGE)


def limited(most: int | None) -> None:
    """Let this process take no more address space than ``most`` bytes beyond what it has."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if most is None else taken + most, hard))


def look(path: Path, kind: str) -> str:
    """Look at a file; whether it is "refused" or "loaded"."""
    try:
        hostile.look_at(path, kind)
    except ValueError as error:
        said = str(error)
        if not (said_by_us(error) and said.startswith("path: ") and said.isprintable() and len(said) < 2000):
            raise
        return "refused"
    return "loaded"


def drawn(path: Path, kind: str, folder: Path, number: int) -> str:
    try:
        (draw_corpus if kind == formats.SUMMARY else draw_run)(path, folder, number)
    except ValueError as error:
        if not said_by_us(error):
            raise
        return "not drawn"
    return "drawn"


def run(first: int, count: int, seed: int, every: int, folder: Path) -> int:
    """Try files; how many of them did something that none may do."""
    real = {hostile.format_of(data): data for data in (hostile.run_file(), hostile.corpus_file())}
    path, watch = folder / "mutated.safetensors", Watch()
    done, slowest, failed, loaded = collections.Counter(), (0.0, 0), 0, 0
    # What is imported on the first use is code, and takes memory.
    for kind, data in real.items():
        path.write_bytes(data)
        for number in range(len(FIGURES) + 1):
            look(path, kind)
            drawn(path, kind, folder, number)
    largest, began = max(map(len, real.values())), time.monotonic()
    print(f"seed {seed}, files {first} to {first + count - 1}, the largest real one has {largest:,} bytes", flush=True)
    for number in range(first, first + count):
        draw = random.Random(f"{seed}-{number}")  # noqa: S311 (the same files again are wanted)
        kind = draw.choice(list(real))
        path.write_bytes(mutated(real[kind], draw))
        watch.seen.clear()
        start, cpu = time.monotonic(), time.process_time()
        try:
            faulthandler.dump_traceback_later(60, exit=True)
            limited(MOST_BYTES)
            watch.on = True
            result = look(path, kind)
            took = time.process_time() - cpu
            if result == "loaded":
                loaded += 1
                if loaded % every == 0:
                    limited(MOST_BYTES_DRAWN)
                    begun = time.process_time()
                    done[kind, drawn(path, kind, folder, loaded // every)] += 1
                    took = max(took, time.process_time() - begun)
            watch.on = False
            slowest = max(slowest, (took, number))
            if took > MOST_SECONDS:
                raise TimeoutError(f"{took:.1f} s, {time.monotonic() - start:.1f} s by the clock")
            if watch.seen:
                raise PermissionError(f"code was run: {watch.seen[:3]}")
        except Exception as error:
            watch.on, result = False, "failed"
            limited(None)
            failed += 1
            kept = folder / f"failed-{seed}-{number}.safetensors"
            kept.write_bytes(path.read_bytes())
            print(f"\nfile {number} ({kind}), kept as {kept}: {type(error).__name__}: {str(error)[:300]}")
            traceback.print_exception(error, limit=-4)
        finally:
            watch.on = False
            limited(None)
            faulthandler.cancel_dump_traceback_later()
        done[kind, result] += 1
        if (number + 1 - first) % 10_000 == 0:
            print(f"{number + 1 - first:,} files in {time.monotonic() - began:,.0f} s, {failed} failed", flush=True)
    for (kind, result), times in sorted(done.items()):
        print(f"{kind}: {times:,} {result}")
    print(f"{count:,} files in {time.monotonic() - began:,.0f} s; the slowest, {slowest[1]}, took {slowest[0]:.2f} s; "
          f"most memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB; {failed} failed")  # fmt: skip
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which; printed, so that a run can be repeated")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--only", type=int, help="one file alone, drawn too if it loads")
    parser.add_argument("--draw", type=int, default=50, help="of how many that load one is drawn")
    parser.add_argument("--folder", type=Path, help="where files are kept that fail; by default a new one")
    given = parser.parse_args()
    faulthandler.enable()
    # A number that is not finite is no mistake of ours.
    warnings.simplefilter("ignore")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="llama_attn_fuzz_"))
    folder.mkdir(exist_ok=True)
    first, count, every = (given.first, given.files, given.draw) if given.only is None else (given.only, 1, 1)
    raise SystemExit(bool(run(first, count, given.seed, every, folder)))


if __name__ == "__main__":
    main()
