"""Options that some models take and others do not."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def known_options(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Those of the options that the forward of a model takes."""
    known = inspect.signature(model.forward).parameters
    return {name: option for name, option in options.items() if name in known}
