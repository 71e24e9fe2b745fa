"""The update of the solvers for few passes."""

from __future__ import annotations

from torch import Tensor

from ...streams import STREAM_LANGEVIN
from .philox import philox_normal


def solver_step_(
    x: Tensor,
    score: Tensor,
    table: Tensor,
    level: int | Tensor,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    step: int | Tensor = 0,
    sample_offset: int = 0,
) -> Tensor:
    """``x <- a x + b score + e previous + c z`` and ``previous <- x + d score``, of the x before.

    ``a, b, c, d, e`` is the level's row of the table; z is the noise, or that of the seed, or left out.
    """
    if isinstance(level, Tensor):
        row = table.index_select(0, level.reshape(1).clamp(0, len(table) - 1))[0]
    else:
        row = table[level]
    a, b, c, d, e = row.to(x.dtype).unbind()
    if noise is None and seed is not None:
        noise = philox_normal(
            tuple(x.shape),
            seed=seed,
            step=step,
            sample_offset=sample_offset,
            stream=STREAM_LANGEVIN,
            device=x.device,
        )
    score = score.to(x.dtype)
    y = a * x + b * score
    if previous is not None:
        y = y + e * previous
        previous.copy_(x + d * score)
    if noise is not None:
        y = y + c * noise.to(x.dtype)
    return x.copy_(y)
