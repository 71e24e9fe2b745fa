"""The Langevin step: each backend beside eager PyTorch and torch.compile with PyTorch's own noise.

The peers draw from ``torch.randn``: what a sampling loop written by hand does.
"""

from __future__ import annotations

import math

import pytest
import torch

from ncsn_fast import ops
from ncsn_fast.ops import dispatch

STEP_SIZE = 1e-3
SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (256, 3, 64, 64))


def eager(x: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    z = torch.randn_like(x)
    return x.add_(STEP_SIZE * score + math.sqrt(2 * STEP_SIZE) * z).clamp_(-1.0, 1.0)


def peer(name: str, x: torch.Tensor, score: torch.Tensor):
    """The call to time; its result was compared with the reference before."""
    if name == "eager":
        return lambda: eager(x, score)
    if name == "torch.compile":
        compiled = torch.compile(eager, fullgraph=True)
        return lambda: compiled(x, score)

    def call(state: torch.Tensor, backend: str) -> torch.Tensor:
        return ops.langevin_step_(state, score, STEP_SIZE, seed=1, clip=1.0, backend=backend)

    torch.testing.assert_close(
        call(x.clone(), name), call(x.clone(), "reference"), rtol=1e-6, atol=2e-6
    )
    return lambda: call(x, name)


@pytest.mark.parametrize("name", ["eager", "torch.compile", *dispatch.BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_langevin_step(timed, benchmark, device, shape, name):
    if name in dispatch.BACKENDS:
        reason = dispatch.why_not(name, "langevin_step_", device)
        if reason is not None:
            pytest.skip(reason)
    benchmark.group = f"langevin_step_ {device} {shape}"
    generator = torch.Generator().manual_seed(0)
    x, score = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    bytes_moved = 3 * x.numel() * x.element_size()  # reads x and the score, writes x
    timed(
        peer(name, x, score),
        device,
        op="langevin_step_",
        backend=name,
        shape=list(shape),
        dtype="float32",
        bytes=bytes_moved,
    )
