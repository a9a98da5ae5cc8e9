"""What the site has besides the pages of this folder; called by MkDocs."""

from __future__ import annotations

import html
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Navigation
from nbconvert import MarkdownExporter

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Where a link of the repository leads within the site.
PAGES = {
    '"docs/': '"',
    "(docs/": "(",
    "../README.md": "overview.md",
    "../CHANGELOG.md": "changelog.md",
    "../benchmarks/claims/": "benchmarks/claims/",
    "tutorial.ipynb": "tutorial.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages and scripts from outside of this folder, and the tutorial with the outputs that its file holds."""
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
    for script in (ROOT / "benchmarks" / "claims").glob("*.py"):
        name = f"benchmarks/claims/{script.name}"
        files.append(File.generated(config, name, content=script.read_text(), inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead to the pages of the site."""
    for link, page in PAGES.items():
        markdown = markdown.replace(link, page)
    return markdown


def on_nav(nav: Navigation, config: MkDocsConfig, **_: object) -> None:
    """Keep the navigation for `on_post_build`."""
    config.extra["navigation"] = nav


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt: the pages in the order of the navigation, each with its first sentence."""
    # What it links to lies at the root of a server, where this site need not be.
    (Path(config.site_dir) / "404.html").unlink()
    lines, section = [f"# {config.site_name}", "", f"> {config.site_description}"], None
    for page in config.extra["navigation"].pages:
        if page.parent is None:
            continue
        if page.parent is not section:
            section = page.parent
            lines += ["", f"## {section.title}", ""]
        lines.append(f"- [{page.title}]({page.url}): {_sentence(page.content)}")
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n")


def _sentence(content: str) -> str:
    """The first sentence of a page, as it is read."""
    paragraph = re.search(r"<p>(.*?)</p>", content, flags=re.DOTALL)[1]
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split())
    return re.split(r"(?<=[.?]) (?=[A-Z])", text)[0].rstrip(":")
