"""How this package came here, for hints that work when they are copied."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

CHECKOUT = Path(__file__).parent.parent.parent
# As modules write it that must not know more.
WRITTEN = re.compile(r"pip install 'llama_attn\[([\w,]+)\]'")


def pip_line(extra: str) -> str:
    """What installs an extra of this package: from the checkout where it runs from one.

    To whatever else is installed, pip adds what the extra names, without fetching the package itself again.

    Source: https://packaging.python.org/en/latest/specifications/direct-url/
    """
    folder = _checkout()
    return f"pip install 'llama_attn[{extra}]'" if folder is None else f"pip install -e '{folder}[{extra}]'"


def fitted(message: str) -> str:
    """A message whose pip lines for extras of this package fit how it was installed."""
    return WRITTEN.sub(lambda line: pip_line(line[1]), message)


def _checkout() -> Path | None:
    """The folder of the sources that run, if changes to them count; None for an installed copy."""
    try:
        origin = json.loads(distribution("llama_attn").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else None
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(origin["url"]).path))
