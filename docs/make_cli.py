"""Write the reference of the command line from its functions: ``python docs/make_cli.py``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo

from llama_attn.cli import app, main

INTRODUCTION = """# `llama-attn`

Every command and every option; `llama-attn COMMAND --help` says the same. What the commands are for, with examples:
[overview](../../README.md#on-the-command-line). A command that cannot do what it is asked ends with one line and exit status 2.
This page is written by `docs/make_cli.py` from the functions in `llama_attn/cli/`.
"""
# What stands for a value; bool has none.
VALUES = {str: "TEXT", Path: "PATH", int: "N", float: "X", bool: ""}


def cli_page() -> str:
    """The page that lists every command."""
    everywhere = "\n".join(line for _, line in _parameters(main))
    return f"{INTRODUCTION}\n{everywhere}\n" + "".join(
        _section(command.callback) for command in app.registered_commands
    )


def _section(command: Callable[..., Any]) -> str:
    parameters = list(_parameters(command))
    usage = " ".join(
        ["llama-attn", command.__name__, *(name for name, _ in parameters if name), *["[OPTIONS]"] * bool(parameters)]
    )
    parts = [f"## {command.__name__}", f"```bash\n{usage}\n```", str(inspect.getdoc(command))]
    parts += ["\n".join(line for _, line in parameters)] * bool(parameters)
    return "".join(f"\n{part}\n" for part in parts)


def _parameters(command: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """What stands for an argument in the usage, none for an option, and the line about it."""
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, info = get_args(hints[name])
        kinds = [one for one in get_args(kind) or [kind] if one is not type(None)]
        several = any(list in (one, get_origin(one)) for one in [kind, *kinds])
        plain = next(part for one in kinds for part in get_args(one) or [one])
        value = info.metavar or VALUES[plain]
        if isinstance(info, ArgumentInfo):
            shown = f"{name.upper()}{' …' if several else ''}"
            yield shown, f"- `{shown}`: {info.help}"
            continue
        # Where an annotation names the option, typer holds the name as if it were the default.
        declared = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
        names = "/".join(declared).split("/") if declared else [f"--{name.replace('_', '-')}"]
        option = " or ".join(f"`{one} {value}`" if value else f"`{one}`" for one in names)
        notes = []
        if parameter.default is parameter.empty:
            notes.append("required")
        elif isinstance(info.show_default, str):
            notes.append(f"default: {info.show_default}")
        elif info.show_default and parameter.default is not None and parameter.default is not False:
            notes.append(f"default `{parameter.default}`")
        if info.min is not None or info.max is not None:
            notes.append(
                " ".join(f"{word} {end}" for word, end in (("from", info.min), ("to", info.max)) if end is not None)
            )
        if several:
            notes.append("may be given several times")
        said = f" ({', '.join(notes)})" if notes else ""
        # Lines that --help keeps as they are begin with a backspace.
        about = " ".join(info.help.replace("\b", "").split())
        yield "", f"- {option}{said}: {about}"


if __name__ == "__main__":
    (Path(__file__).parent / "reference" / "cli.md").write_text(cli_page())
