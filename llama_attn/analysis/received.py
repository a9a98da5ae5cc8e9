"""What keys receive, by how much of it comes through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_attn.analysis.dataset import as_dataset, require
from llama_attn.analysis.part import measured_part

if TYPE_CHECKING:
    import xarray

    from llama_attn.analysis.dataset import Source


def received_norm(ds: Source) -> xarray.DataArray:
    """Norm-weighted attention that each key receives: Σ_i ‖A_ik f(x_k)‖, which is (Σ_i A_ik) ‖f(x_k)‖.

    f(x) is the value of a token behind its head's output projection, as it is added to the residual stream. A sink
    receives much attention and has a small value, so that little of it comes through.

    Args:
        ds: Statistics with ``received_total`` and ``value_output_norm``.

    Returns:
        (layer, batch, head, key) [activation]; NaN for padding and keys that no measured query sees.
        ``attrs["part"]``: what was measured of the model, if not all of it.

    Raises:
        ValueError: A statistic was not measured.

    Source: Kobayashi et al., arXiv 2004.10102, section 3.
    """
    dataset = as_dataset(ds)
    require(dataset, "received_total", "value_output_norm")
    received = (dataset.received_total * dataset.value_output_norm).rename("received_norm")
    received.attrs = {
        "units": "activation",
        "long_name": "norm-weighted attention that a key receives from all queries",
        "source": "Kobayashi et al., arXiv 2004.10102",
        "part": measured_part(dataset),
    }
    return received.transpose("layer", "batch", "head", "key")
