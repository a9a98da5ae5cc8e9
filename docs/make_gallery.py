"""Write the gallery and draw its pictures, each a file in the folder of its question, from SmolLM2 on a real text.

``python docs/make_gallery.py`` draws all and writes the page on analysis too, ``… attention_map rows`` draws some,
from the runs that these show alone, and ``… --page`` writes the page only, for which no model is needed.
"""

from __future__ import annotations

import argparse
import ast
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
GALLERY, IMAGES = DOCS / "gallery", DOCS / "images" / "gallery"
# By folder, whose number is its place on the page, and by name; a name is of one picture.
PICTURES = {path.stem: path for path in sorted(GALLERY.glob("*/*.py"))}
# The labels of tokens are readable, and no picture is larger than 200 kB.
DPI = 110
INTRODUCTION = """# Gallery

Every figure by the question that it answers, drawn from SmolLM2-135M-Instruct on the opening of *Moby-Dick* but for one,
which says so. What the code reads are `AttentionStats`, datasets or saved files: `text` is the opening, `beginning` its
first 40 tokens, `other` the same with `<|im_start|>` in place of the first token, `repeated` four rows of the token
`<|im_start|>` and a random sequence of 64 tokens, twice. With `model`, `tokenizer` and `inputs` as on the page of
[concepts](concepts/index.md#model-and-text):

```python
import torch

from llama_attn import AttentionStatsConfig


def run(ids):
    with torch.no_grad():
        outputs = model(ids, output_attention_stats=AttentionStatsConfig(statistics="all", norms=True))
    return outputs.attention_stats.with_tokens(tokenizer, ids)


ids, start = inputs["input_ids"], tokenizer.bos_token_id
text, beginning = run(ids), run(ids[:, :40])
other = run(torch.cat([torch.tensor([[start]]), ids[:, 1:40]], -1))
half = torch.randint(100, 48_000, (4, 64), generator=torch.Generator().manual_seed(0))
repeated = run(torch.cat([torch.full((4, 1), start), half, half], -1))
```

Figures of one pair of axes take `ax=`, and draw there. Grey is "no data": pairs that may not see each other, padding, layers
that were not measured. This page is written by `docs/make_gallery.py` from the files in `docs/gallery`, whose code drew the
pictures; numbers that answer the same questions are in [Analysis](analysis.md).
"""


def gallery_page() -> str:
    """The page, from the files alone."""
    sections, asked = [INTRODUCTION], ""
    for path in PICTURES.values():
        question = path.parent.name.partition("_")[2].replace("_", " ").capitalize()
        if question != asked:
            sections.append(f"## {question}?\n")
            asked = question
        sections.append(section(path))
    return "\n".join(sections)


def section(path: Path) -> str:
    """What the docstring of a picture says, and the code below it."""
    source = path.read_text()
    module = ast.parse(source)
    title, reading = ast.get_docstring(module).split("\n\n", 1)
    code = "\n".join(source.splitlines()[module.body[0].end_lineno :]).strip()
    picture = f"![{path.stem.replace('_', ' ')}](images/gallery/{path.stem}.png)"
    return f"### {title.removesuffix('.')}\n\n{picture}\n\n```python\n{code}\n```\n\n{reading}\n"


def read_by(path: Path, runs: object) -> dict[str, object]:
    """The runs that the code of a picture names, and no others: each is measured when it is asked for."""
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    return {name: getattr(runs, name) for name in sorted(names) if hasattr(type(runs), name)}


def draw(path: Path, runs: dict[str, object]) -> None:
    """Run the file of a picture, in which the runs have names, and save its figure."""
    figure: Figure = runpy.run_path(str(path), runs)["figure"]
    figure.savefig(IMAGES / f"{path.stem}.png", dpi=DPI, pil_kwargs={"optimize": True})


def main() -> None:
    """Write the page; draw what is asked for, and measure what that shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="picture to draw; all by default")
    parser.add_argument("--page", action="store_true", help="draw none")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(PICTURES):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(sorted(PICTURES))}")
    (DOCS / "gallery.md").write_text(gallery_page())
    if asked.page:
        return
    # Here, since the page needs no model.
    from make_analysis import analysis_page
    from measured_runs import Runs

    runs = Runs()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in asked.names or PICTURES:
        draw(PICTURES[name], read_by(PICTURES[name], runs))
    if not asked.names:
        (DOCS / "analysis.md").write_text(analysis_page(runs))


if __name__ == "__main__":
    main()
