"""How far two tensors are apart, and where."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |a − b| / (1 + |b|), the measure of the error budget.

    Raises:
        AssertionError: The shapes differ, or one is NaN or infinite where the other is not.
    """
    return largest_error(actual, expected)[0]


def largest_error(actual: Tensor, expected: Tensor, axes: Sequence[str] = ()) -> tuple[float, str]:
    """The `relative_error`, and in words where it is largest, by the names of the axes if they are given.

    Raises:
        AssertionError: As `relative_error`; the message says where.
    """
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    finite = actual.isfinite() & expected.isfinite()
    if bool((differs := ~finite & (actual != expected) & ~(actual.isnan() & expected.isnan())).any()):
        where = _place(differs.nonzero()[0], actual, expected, axes)
        raise AssertionError(f"not finite on one side only, first at {where}")
    errors = ((actual - expected).abs() / (1 + expected.abs())).nan_to_num(0.0)
    if not errors.numel():
        return 0.0, "no place"
    largest = errors.max()
    return float(largest), _place((errors == largest).nonzero()[0], actual, expected, axes)


def _place(index: Tensor, actual: Tensor, expected: Tensor, axes: Sequence[str]) -> str:
    """A place by the names of its axes, and what stands there."""
    at = index.tolist()
    named = ", ".join(f"{axis} {number}" for axis, number in zip(axes, at, strict=True)) if axes else at
    return f"{named}: expected {float(expected[*at]):.10g}, got {float(actual[*at]):.10g}"
