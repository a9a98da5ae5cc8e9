"""The oldest release of each small dependency that ``pyproject.toml`` allows, for ``make lowest``: prints them for pip."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# transformers has tests of its own versions, and chooses hub and safetensors; no torch as old is built without CUDA.
OTHERS = ("huggingface_hub", "safetensors", "torch", "transformers")
# What they need that newer releases do not.
NEEDED = ("pytz",)


def lowest() -> list[str]:
    """``name==version`` of what is required, and of what figures and tables require."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = (
        re.match(r"(\w+)>=([\d.]+)", each) for each in [*project["dependencies"], *extras["analysis"], *extras["viz"]]
    )
    return [f"{one[1]}=={one[2]}" for one in found if one and one[1] not in OTHERS]


if __name__ == "__main__":
    sys.stdout.write(" ".join([*lowest(), *NEEDED]) + "\n")
