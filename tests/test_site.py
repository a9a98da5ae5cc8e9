"""The site is built in strict mode, all that it links to and loads is in it, and it names every public name."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
CONCEPTS = ROOT / "docs" / "concepts"
SAID = json.loads((CONCEPTS / "measured.json").read_text())
# Tags whose address a browser loads by itself.
LOADED = {"img", "link", "script", "iframe", "source"}


class Page(HTMLParser):
    """Anchors of a page, the addresses it names, and which of these are loaded by themselves."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.addresses, self.loaded = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.anchors |= {named[name] for name in ("id", "name") if named.get(name)}
        for address in (named[name] for name in ("href", "src") if named.get(name)):
            self.addresses.append(address)
            if tag in LOADED:
                self.loaded.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def astray(pages):
    """Links within the site that lead nowhere."""
    found = []
    for path, page in pages.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchored = not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            if not target.is_file() or not anchored:
                found.append(f"{path.name}: {address}")
    return found


def test_links_lead_somewhere(pages, site, tmp_path):
    assert len(pages) > 30
    assert astray(pages) == []
    wrong = tmp_path / "wrong.html"
    wrong.write_text('<a href="nowhere.html">a</a><a href="#nothing">b</a><a href="https://a.b/c">c</a>')
    assert astray({wrong: Page(wrong)}) == ["wrong.html: nowhere.html", "wrong.html: #nothing"], "the check can fail"


def test_what_pages_are_written_by_is_no_part_of_it(site):
    assert (site / "gallery.html").is_file()
    found = [path.relative_to(site) for path in site.rglob("*") if path.suffix == ".py" or path.name == "measured.json"]
    # The claims are read: README and the benchmarks link them.
    assert [path for path in found if path.parts[:2] != ("benchmarks", "claims")] == []
    assert found


def test_nothing_is_loaded_from_elsewhere(pages, site):
    assert [address for page in pages.values() for address in page.loaded if urlsplit(address).netloc] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text()), style


@pytest.mark.parametrize("name", [f"llama_attn{part}" for part in ("", ".analysis", ".viz", ".corpus", ".testing")])
def test_every_public_name_is_in_the_reference(name, site):
    page = Page(site / "reference" / f"{name.removeprefix('llama_attn.')}.html")
    documented = {anchor.rsplit(".", 1)[-1] for anchor in page.anchors if anchor.startswith("llama_attn.")}
    assert set(importlib.import_module(name).__all__) - documented == set()


# What the guides speak of, and what public functions are given or return.
MEANT = {
    "llama_attn": (
        "observe.recording.Recording.stats", "observe.recording.Recording.forwards", "observe.recording.Recording.stacks",
        "stats.images.ImageSegments", "stats.images.ImageSpan", "stats.labels.Label", "stats.block.Block.weights",
        "stats.reference.Reference.weights", "stats.block.HIDDEN_SCORE", "stats.parameters.Parameters.sink_tokens", "observe.training.AttentionStatsCallback", "demo.demo_checkpoint",
    ),
    "corpus": (
        "corpus.summary.About", "corpus.moments.Moments", "corpus.table.Table", "corpus.examples.Strongest",
        "corpus.examples.Sample", "corpus.datatrove.MeasureAttention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_what_public_functions_give_is_in_the_reference(name, site):
    page = Page(site / "reference" / f"{name}.html")
    assert [path for path in MEANT[name] if f"llama_attn.{path}" not in page.anchors] == []
    # An observer, of which nobody but the library makes use.
    assert "llama_attn.LlamaForCausalLM.observe" not in page.anchors
    assert "llama_attn.Statistic" in page.anchors or name != "llama_attn"


def test_headings_of_the_reference_are_public_names(site):
    for page in ("analysis", "viz"):
        text = (site / "reference" / f"{page}.html").read_text()
        headings = re.findall(r'<h2 id="([^"]+)"[^>]*>\s*(.*?)</h2>', text, re.DOTALL)
        assert len(headings) > 15
        assert [at for at, heading in headings if "llama_attn." in re.sub(r"<[^>]+>", "", heading)] == []


def test_llms_txt_names_every_page(site):
    listed = set(re.findall(r"\]\(([^)]+)\): \S", (site / "llms.txt").read_text()))
    assert listed | {"index.html"} == {str(path.relative_to(site)) for path in site.rglob("*.html")}


@pytest.mark.parametrize("name", sorted(SAID))
def test_every_number_of_a_concept_was_measured(name):
    page = " ".join((CONCEPTS / f"{name}.md").read_text().split())
    for what, said in SAID[name].items():
        assert said in page, f"{what}: run python docs/make_concepts.py"
    picture = ROOT / "docs" / "images" / "concepts" / f"{name}.png"
    assert f"../images/concepts/{name}.png" in page
    assert 5_000 < picture.stat().st_size < 100_000


def test_times_of_a_concept_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    said = runpy.run_path(str(ROOT / "docs" / "make_concepts.py"))["said_of_backends"]()
    assert SAID["backends"] == said, "run python docs/make_concepts.py"


def test_every_concept_has_a_page_and_a_picture():
    pages = {path.stem for path in CONCEPTS.glob("*.md")} - {"index"}
    assert pages == set(SAID) == {path.stem for path in (ROOT / "docs" / "images" / "concepts").iterdir()}


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r'\]\(([^)#]+)[^)]*\)|src="([^"]+)"', (ROOT / "README.md").read_text())
    for target in map("".join, targets):
        assert "://" in target or (ROOT / target).is_file(), target


def test_search_works_in_a_page_opened_as_a_file(site, chromium):
    requests = []
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.locator("input.md-search__input").fill("massive activations")
    page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
    found = page.locator(".md-search-result__link").first.get_attribute("href")
    context.close()
    assert Path(unquote(urlsplit(found).path)).is_file()
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
