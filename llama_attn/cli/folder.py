"""The folder that a command writes: one run's, from the first file to the last."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llama_attn.cli.terminal import fail, first_line

STATS, REPORT, ROLES, ROLES_PICTURE = "stats.safetensors", "report.html", "head_roles.csv", "head_roles.png"
ABLATION, ABLATION_TABLE, ABLATION_PICTURE = "ablation.json", "ablation.csv", "ablation.png"
BUDGET, BUDGET_PICTURE = "budget.csv", "budget.png"
# What a run writes beside its statistics.
WRITTEN = re.compile(
    r"(layer_\d+_attention|hidden_states_\d+_norm|kv_\d+_norm)\.png|"
    + "|".join(
        map(
            re.escape,
            (REPORT, ROLES, ROLES_PICTURE, ABLATION, ABLATION_TABLE, ABLATION_PICTURE, BUDGET, BUDGET_PICTURE),
        )
    )
)


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """A folder that can be written to. If the command fails, what was made for it is taken away.

    Made before the work, so that nobody waits for a model and then learns that there is no room for its pictures.
    """
    new = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        _remove(new)
        fail(f"--out: cannot make the folder {out}: {first_line(error)}")
    try:
        yield out
    except OSError as error:
        _remove(new)
        fail(f"--out: cannot write to {out}: {first_line(error)}")
    except BaseException:
        _remove(new)
        raise


def clear(out: Path) -> int:
    """Take away what an older run left, so that no picture of it stands among those of another.

    Only names that a run writes go, in the folder itself and, where an older run's statistics lie in it, in the folders
    of its rows. A folder with statistics of its own is another run's. What a user put there stays.

    Returns:
        How many files went.
    """
    places = [out]
    if (out / STATS).exists():
        rows = (path for path in sorted(out.iterdir()) if path.is_dir() and not path.is_symlink())
        places += [row for row in rows if not (row / STATS).exists()]
    gone = 0
    for place in places:
        old = [path for path in place.iterdir() if WRITTEN.fullmatch(path.name) and not path.is_dir()]
        for path in old:
            path.unlink()
        gone += len(old)
        if old and place != out:
            _remove([place])
    return gone


def _remove(folders: Sequence[Path]) -> None:
    for path in folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
