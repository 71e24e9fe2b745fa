"""Convolution and 2x2 mean, the way the authors' networks halve their images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ncsn_fast import ops

from .. import plain_torch
from ..peers import Function
from ..suite import Case, Settings, tolerance_of


def function(n: int, channels: int, outputs: int, size: int) -> Function:
    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, channels, size, size, generator=generator)
        weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        return x, weight, torch.randn(outputs, generator=generator)

    return Function(
        inputs=inputs,
        eager=plain_torch.conv3x3_mean_pool,
        ours=ops.conv3x3_mean_pool,
        operators=("conv3x3",),
        differentiable=(0, 1, 2),
        has_matmul=True,
        backward_operators=("conv3x3", "conv3x3_weight_gradient"),
    )


def cases(settings: Settings) -> Iterator[Case]:
    batches = settings.batch_sizes(full=(1, 16), quick=(1,))
    channels, outputs, size = 128, 256, 32
    for dtype, backward, n in product(settings.dtypes, (False, True), batches):
        work = function(n, channels, outputs, size)
        passes = 2 if backward else 1
        yield Case(
            suite="ops",
            group="conv3x3_mean_pool",
            name="backward" if backward else "forward",
            shape=(n, channels, size, size),
            dtype=dtype,
            setting=f"outputs={outputs}",
            peers=work.peers(settings, dtype, backward=backward),
            expected=work.expected(dtype, backward=backward, device=settings.device),
            # A convolution by Winograd may lie ten times as far off as a direct one.
            tolerance=10 * tolerance_of(dtype, backward=backward),
            flops=passes * 2 * 9 * channels * outputs * n * size * size,
        )
