"""The Langevin update."""

from __future__ import annotations

import torch
from torch import Tensor

from ...streams import STREAM_LANGEVIN
from .philox import philox_normal


def noise_scale(step_size: Tensor) -> Tensor:
    """``sqrt(2 step_size)`` of a float32 number, correctly rounded, so that every backend has the same bits.

    A library's float32 root may be off by a unit in the last place on one processor and not on another. One in float64
    may be too, but its rounding to float32 is right: no root of a float32 number is so near to the middle of two.
    """
    if step_size.device.type == "mps":  # has no float64
        return torch.sqrt(2.0 * step_size)
    return torch.sqrt(2.0 * step_size.double()).float()


def langevin_step_(
    x: Tensor,
    score: Tensor,
    noise: Tensor | None,
    step_size: float | Tensor,
    *,
    seed: int = 0,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    clip: float | None = None,
) -> Tensor:
    """``x += step_size * score + sqrt(2 step_size) z``, then a clamp (Song & Ermon 2019, algorithm 1).

    The paper writes the same update with ``step_size = alpha / 2``.
    """
    if noise is None:
        noise = philox_normal(
            tuple(x.shape),
            seed=seed,
            step=step,
            sample_offset=sample_offset,
            stream=STREAM_LANGEVIN,
            device=x.device,
        )
    if not isinstance(step_size, Tensor):
        step_size = torch.full((), step_size, dtype=torch.float32, device=x.device)
    step_size = step_size.reshape(())
    x.add_(step_size * score.float()).add_(noise_scale(step_size) * noise.float())
    return x if clip is None else x.clamp_(-clip, clip)
