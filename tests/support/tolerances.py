"""Assertions by the project's one table of tolerances; no test has bounds of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsn_fast.ops.tolerances import NETWORK, NORMAL, TOLERANCES, WINOGRAD, relative_error

__all__ = [
    "NETWORK",
    "NORMAL",
    "TOLERANCES",
    "WINOGRAD",
    "assert_forward",
    "assert_gradient",
    "relative_error",
]


def assert_forward(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The forward bound of the table."""
    assert relative_error(got, expected) <= TOLERANCES[dtype].forward


def assert_gradient(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The gradient bound of the table."""
    assert relative_error(got, expected) <= TOLERANCES[dtype].gradient
