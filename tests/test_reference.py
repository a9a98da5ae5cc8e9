"""Docstrings as the reference reads them: what is returned, which values there are, and what defaults are."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import get_args

import griffe
import pytest

import llama_attn
from llama_attn import AttentionStatsConfig, Statistic, analysis, corpus, viz
from llama_attn.engines import ENGINES
from llama_attn.stats import table
from llama_attn.testing import (
    FEATURES,
    MEASURED,
    SITUATIONS,
    Feature,
    assert_matches_reference,
    assert_statistic_matches,
)

ROOT = Path(__file__).parent.parent
# As mkdocs.yml has it.
OPTIONS = {"returns_multiple_items": False, "returns_named_value": False}
PACKAGE = griffe.load("llama_attn", search_paths=[ROOT], docstring_parser="google", docstring_options=OPTIONS)
PAGES = [page for page in sorted((ROOT / "docs" / "reference").glob("*.md")) if page.stem != "cli"]


def functions(parent):
    """What may be called from outside, methods among them."""
    for name, member in parent.members.items():
        if name.startswith("_") or member.is_alias or parent.path == "llama_attn.cli":
            continue
        if member.is_function:
            yield member
        elif member.is_class or member.is_module:
            yield from functions(member)


# The commands are in no reference.
FUNCTIONS = {
    function.path: function for function in functions(PACKAGE) if not function.path.startswith("llama_attn.cli.")
}


def sections(function, kind):
    return [part for part in function.docstring.parsed if part.kind.value == kind] if function.docstring else []


def split(function):
    """Words before a colon that a reader of docstrings takes for the type of what is returned."""
    returned = [found for kind in ("returns", "yields") for part in sections(function, kind) for found in part.value]
    return [found.annotation for found in returned if isinstance(found.annotation, str)]


def test_what_is_returned_begins_with_no_type_that_is_none():
    assert {path: found for path, function in FUNCTIONS.items() if (found := split(function))} == {}
    docstring = griffe.Docstring(
        "What.\n\nReturns:\n    The rows of it: some.", parser="google", parser_options=OPTIONS
    )
    wrong = griffe.Function("wrong", docstring=docstring)
    assert split(wrong) == ["The rows of it"], "the check can fail"


def described(function, name):
    """What is said of an argument."""
    [arguments] = sections(function, "parameters")
    return next(argument.description for argument in arguments.value if argument.name == name)


def written(value):
    """The numbers, or names, of a default."""
    values = (value[0], value[-1]) if isinstance(value, range) else value if isinstance(value, tuple) else (value,)
    return [each if isinstance(each, str) else f"{each:,g}" for each in values]


# Arguments of a class are described in its own docstring.
CALLBACK = "llama_attn.observe.training.AttentionStatsCallback"
NAMED = [
    f"{value.__module__}.{value.__name__}"
    for value in (getattr(owner, name) for owner in (llama_attn, analysis, viz, corpus) for name in owner.__all__)
]
SIGNATURES = {path: FUNCTIONS[path] for path in NAMED if path in FUNCTIONS} | {
    CALLBACK: PACKAGE[CALLBACK.removeprefix("llama_attn.") + ".__init__"]
}
# Where the reference shows the name of a constant.
CONSTANTS = [
    (path, argument.name)
    for path, function in SIGNATURES.items()
    for argument in function.parameters
    if re.fullmatch(r"[A-Z][A-Z_]+", str(argument.default))
]


@pytest.mark.parametrize(("path", "name"), CONSTANTS)
def test_a_default_is_said_in_numbers(path, name):
    module, _, named = path.rpartition(".")
    default = inspect.signature(getattr(importlib.import_module(module), named)).parameters[name].default
    description = described(PACKAGE[path.removeprefix("llama_attn.")], name)
    assert [value for value in written(default) if not re.search(rf"(?<![\w.]){value}(?!\w|[,.]\d)", description)] == []


def test_some_defaults_are_constants():
    assert ("llama_attn.analysis.coverage.coverage", "mass") in CONSTANTS
    assert (CALLBACK, "statistics") in CONSTANTS


def test_values_are_written_out():
    doc = inspect.getdoc(Statistic)
    values = {f'"{value}"' for value in (*get_args(table.Observed), *get_args(table.Needed))}
    assert {value for value in (*values, *table.DIMENSIONS) if f"``{value}``" not in doc} == set()
    assert {name for name in ENGINES if f'``"{name}"``' not in inspect.getdoc(AttentionStatsConfig)} == set()


def test_situations_are_written_out():
    doc, more = inspect.getdoc(assert_matches_reference), inspect.getdoc(assert_statistic_matches)
    assert {"window", "softcap", "sinks", "bidirectional", "stride", "dropped"} == {
        key for situation in MEASURED for key in situation
    } - {key for situation in SITUATIONS for key in situation}
    every = [*SITUATIONS, *(situation for situations in FEATURES.values() for situation in situations)]
    names = ("queries", "cached", "head_dim", "scaling", "window", "softcap")
    sizes = {situation[name] for situation in every for name in names if name in situation}
    assert list(FEATURES) == list(get_args(Feature)) == re.findall(r'- ``"(\w+)"``:', doc)
    assert {size for size in sizes if not re.search(rf"\b{size}\b", doc)} == set()
    assert all(
        word in more
        for word in (
            "soft-cap",
            "learned sinks",
            "both directions",
            "a window of 7 keys",
            "the 9 keys before",
            "every third query",
        )
    )


def test_tables_and_examples_are_no_paragraphs():
    """Tables of RST, and examples without their heading, are prose to Markdown."""
    docstrings = {path: function.docstring.value for path, function in FUNCTIONS.items() if function.docstring}
    assert [path for path, text in docstrings.items() if re.search(r"^\s*===", text, re.MULTILINE)] == []
    assert [path for path, text in docstrings.items() if re.search(r"^>>>", text, re.MULTILINE)] == []
    modules = [
        importlib.import_module(name)
        for page in PAGES
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)[:1]
    ]
    assert [module.__name__ for module in modules if re.search(r"^>>>", inspect.getdoc(module), re.MULTILINE)] == []


SHOWN = {*NAMED, *(name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M))}


def own_types(annotations):
    """Types of this library that annotations name."""
    names = [part for each in annotations if isinstance(each, griffe.Expr) for part in each.iterate(flat=True)]
    paths = {name.canonical_path for name in names if isinstance(name, griffe.ExprName)}
    return {path for path in paths if path.startswith("llama_attn.")}


def test_types_in_signatures_are_in_the_reference():
    """A reader who meets `Source` in a signature can follow it."""
    signatures = SIGNATURES.values()
    types = own_types(
        each for function in signatures for each in (*(a.annotation for a in function.parameters), function.returns)
    )
    assert types - SHOWN == set()
    assert "llama_attn.analysis.dataset.Source" in types, "the check can fail"


def test_types_of_what_a_statistic_is_given_are_in_the_reference():
    given = ["block.Block", "block.Wanted", "reference.Reference", "counts.Counts"]
    assert {f"llama_attn.stats.{name}" for name in given} - SHOWN == set()
    members = [member for name in given for member in PACKAGE[f"stats.{name}"].members.values() if member.is_attribute]
    types = own_types(member.annotation for member in members)
    assert types - SHOWN == set()
    assert "llama_attn.stats.visibility.Visibility" in types, "the check can fail"
