"""A figure that notebooks show; the only file that imports matplotlib as soon as it is imported itself."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A ``matplotlib.figure.Figure`` that Jupyter shows in any state of the kernel.

    Jupyter learns to show matplotlib's own class only from ``%matplotlib inline`` or from pyplot's first figure.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
