"""The repeating unit of the authors' networks without norms: ELU, 3x3 convolution, addition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ncsn_fast import ops

from .. import plain_torch
from ..peers import Function
from ..suite import Case, Settings, tolerance_of

# Channels, size, dilation: those of the network for images of 32x32.
FULL = [(128, 32, 1), (256, 16, 1), (256, 16, 2), (256, 16, 4)]


def ours(
    x: Tensor, weight: Tensor, residual: Tensor, *, dilation: int, backend: str | None = None
) -> Tensor:
    """The operator, its arguments in the order of the inputs."""
    return ops.elu_conv3x3(x, weight, residual=residual, dilation=dilation, backend=backend)


def function(n: int, channels: int, size: int, dilation: int) -> Function:
    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, channels, size, size, generator=generator)
        weight = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        return x, weight, torch.randn(n, channels, size, size, generator=generator)

    return Function(
        inputs=inputs,
        eager=partial(plain_torch.elu_conv3x3, dilation=dilation),
        ours=partial(ours, dilation=dilation),
        operators=("conv3x3",),
        differentiable=(0, 1, 2),
        has_matmul=True,
        backward_operators=("conv3x3", "conv3x3_weight_gradient"),
    )


def cases(settings: Settings) -> Iterator[Case]:
    batches = settings.batch_sizes(full=(1, 16), quick=(1,))
    shapes = [(128, 32, 1)] if settings.quick else FULL
    for dtype, backward in product(settings.dtypes, (False, True)):
        for (channels, size, dilation), n in product(shapes, batches):
            work = function(n, channels, size, dilation)
            passes = 2 if backward else 1  # the gradients of the input and of the weight
            yield Case(
                suite="ops",
                group="elu_conv3x3",
                name="backward" if backward else "forward",
                shape=(n, channels, size, size),
                dtype=dtype,
                setting=f"dilation={dilation}",
                peers=work.peers(settings, dtype, backward=backward),
                expected=work.expected(dtype, backward=backward, device=settings.device),
                # A convolution by Winograd may lie ten times as far off as a direct one.
                tolerance=10 * tolerance_of(dtype, backward=backward),
                flops=passes * 2 * 9 * channels * channels * n * size * size,
            )
