"""The network's repeating unit: norm, ELU, 3x3 convolution."""

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

CLASSES = 10

# Channels, size, dilation: the widths, the sizes and the dilations of the networks.
FULL = [(32, 32, 1), (64, 32, 1), (128, 32, 1), (128, 32, 4), (128, 32, 8), (128, 64, 1)]


def function(n: int, channels: int, size: int, dilation: int) -> Function:
    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, channels, size, size, generator=generator)
        norm_weight = torch.randn(CLASSES, 2 * channels, generator=generator) + 1
        weight = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        bias = torch.randn(channels, generator=generator)
        labels = torch.randint(CLASSES, (n,), generator=generator)
        return x, labels, norm_weight, weight, bias

    return Function(
        inputs=inputs,
        eager=partial(plain_torch.norm_elu_conv3x3, dilation=dilation),
        ours=partial(ops.norm_elu_conv3x3, dilation=dilation),
        operators=("norm_elu_conv3x3",),
        differentiable=(0, 2, 3, 4),
        has_matmul=True,
        backward_operators=(
            "conv3x3",
            "conv3x3_weight_gradient",
            "cond_instance_norm_elu_backward",
        ),
    )


def cases(settings: Settings) -> Iterator[Case]:
    batches = settings.batch_sizes(full=(1, 8, 32), quick=(8,))
    shapes = [(128, 32, 1)] if settings.quick else FULL
    for dtype, backward in product(settings.dtypes, (False, True)):
        for (channels, size, dilation), n in product(shapes, batches):
            work = function(n, channels, size, dilation)
            passes = 2 if backward else 1  # the gradients of the input and of the weight
            yield Case(
                suite="ops",
                group="norm_elu_conv3x3",
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
