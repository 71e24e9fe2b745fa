"""Conditional instance norm + ELU, at the sizes of the network's layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor

from ncsn_fast import ops

from .. import plain_torch
from ..peers import Function
from ..suite import Case, Settings, tolerance_of

CLASSES = 10


# The peers of a case share them: half a gigabyte of random numbers takes longer than all else.
@lru_cache(maxsize=1)
def inputs(n: int, channels: int, size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, size, size, generator=generator)
    weight = torch.randn(CLASSES, 2 * channels, generator=generator) + 1
    return x, torch.randint(CLASSES, (n,), generator=generator), weight


def function(n: int, channels: int, size: int) -> Function:
    return Function(
        inputs=partial(inputs, n, channels, size),
        eager=plain_torch.cond_instance_norm_elu,
        ours=ops.cond_instance_norm_elu,
        operators=("cond_instance_norm_elu",),
        differentiable=(0, 2),
    )


def cases(settings: Settings) -> Iterator[Case]:
    sizes = (32,) if settings.quick else (8, 28, 32, 64)
    widths = (128,) if settings.quick else (32, 128)
    batches = settings.batch_sizes(full=(1, 8, 32, 128), quick=(8, 32))
    # On a GPU the network's sizes, the largest first: there may be no time for all.
    if settings.device.type == "cuda":
        sizes, widths = (32, 64), (128,)
        batches = settings.batch_sizes(full=(256, 64, 16, 1), quick=(256, 1))
    for dtype, backward in product(settings.dtypes, (False, True)):
        for channels, size, n in product(widths, sizes, batches):
            work = function(n, channels, size)
            # Forward: x is read, y written. Backward: x and the gradient are read, one gradient is written.
            passes = 3 if backward else 2
            yield Case(
                suite="ops",
                group="cond_instance_norm_elu",
                name="backward" if backward else "forward",
                shape=(n, channels, size, size),
                dtype=dtype,
                peers=work.peers(settings, dtype, backward=backward),
                expected=work.expected(dtype, backward=backward, device=settings.device),
                tolerance=tolerance_of(dtype, backward=backward),
                bytes=passes * n * channels * size * size * dtype.itemsize,
            )
