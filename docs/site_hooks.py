"""What the site has besides the pages of this folder; called by MkDocs."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Where a link of the repository leads within the site.
PAGES = {
    '"docs/': '"',
    "(docs/": "(",
    "../README.md": "overview.md",
    "../CHANGELOG.md": "changelog.md",
    "tutorial.ipynb": "tutorial.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages from outside of this folder, and the tutorial with the outputs that its file holds."""
    tutorial, resources = MarkdownExporter().from_filename(
        str(DOCS / "tutorial.ipynb"), resources={"output_files_dir": "images/tutorial"}
    )
    added = {
        "overview.md": (ROOT / "README.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "tutorial.md": tutorial,
        **resources["outputs"],
    }
    for name, content in added.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead to the pages of the site."""
    for link, page in PAGES.items():
        markdown = markdown.replace(link, page)
    return markdown
