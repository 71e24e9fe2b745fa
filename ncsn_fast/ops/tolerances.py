"""How far a backend's result may lie from a float64 evaluation: the one table, for the tests and for the benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Relative L2 distances."""

    forward: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-10),
    torch.float32: Tolerance(1e-6, 1e-5),
    torch.float16: Tolerance(2e-3, 5e-3),
    torch.bfloat16: Tolerance(1e-2, 2e-2),
}

# A convolution of up to 512 channels by Winograd's F(4x4, 3x3) in float32: its transforms subtract numbers of a similar
# size. A direct one would be half as far off.
WINOGRAD = Tolerance(2.5e-6, 1e-5)

# The default network in float32, 84 of them one after the other.
NETWORK = 2e-5

# Absolute, of a normal of the noise stream against float64; a Langevin step adds one rounding of the state.
NORMAL = 2e-6


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    if got.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(got.shape)} and {tuple(expected.shape)}")
    norm = expected.norm()
    return float((got - expected).norm() / (norm if norm > 0 else 1.0))
