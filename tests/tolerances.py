"""The one table of tolerances, against a float64 evaluation of the reference; no test has its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    forward: float  # relative L2
    gradient: float  # relative L2


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-10),
    torch.float32: Tolerance(1e-6, 1e-5),
    torch.float16: Tolerance(2e-3, 5e-3),
    torch.bfloat16: Tolerance(1e-2, 2e-2),
}

# Absolute, of a normal of the noise stream against float64; a Langevin step adds one rounding of the state.
NORMAL = 2e-6


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape
    norm = expected.norm()
    return float((got - expected).norm() / (norm if norm > 0 else 1.0))


def assert_forward(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The forward bound of the table."""
    assert relative_error(got, expected) <= TOLERANCES[dtype].forward


def assert_gradient(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The gradient bound of the table."""
    assert relative_error(got, expected) <= TOLERANCES[dtype].gradient
