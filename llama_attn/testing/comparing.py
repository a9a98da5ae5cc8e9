"""How far two tensors are apart."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |a − b| / (1 + |b|), the measure of the error budget.

    Raises:
        AssertionError: The shapes differ, or one is NaN or infinite where the other is not.
    """
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    finite = actual.isfinite() & expected.isfinite()
    if bool((differs := ~finite & (actual != expected) & ~(actual.isnan() & expected.isnan())).any()):
        at = differs.nonzero()[0].tolist()
        raise AssertionError(f"not finite on one side only, first at {at}: expected {expected[*at]}, got {actual[*at]}")
    errors = ((actual - expected).abs() / (1 + expected.abs())).nan_to_num(0.0)
    return float(errors.max()) if errors.numel() else 0.0
