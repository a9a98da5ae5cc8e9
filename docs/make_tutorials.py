"""Draw the pictures of tutorials by running what stands there: ``python docs/make_tutorials.py generation own_statistic``.

Each is what the code of its page saves, and is named after the page.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))
IMAGES = DOCS / "images" / "tutorials"
DRAWN = ("generation", "own_statistic")


def draw(page: str) -> None:
    """Keep the picture that the page saves."""
    from pages import blocks, run

    known: dict[str, object] = {}
    picture = IMAGES / f"{page}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        # What the first page loads is what the others begin with.
        for name in ("index", page):
            for code in blocks((DOCS / "tutorials" / f"{name}.md").read_text()):
                run(code, known)
        [saved] = Path().glob("*.png")
        shutil.copyfile(saved, picture)


if __name__ == "__main__":
    for page in sys.argv[1:] or DRAWN:
        draw(page)
