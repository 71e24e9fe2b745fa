"""The 5x5 max pool of chained residual pooling."""

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


@lru_cache(maxsize=1)  # shared by the peers of a case
def inputs(n: int, channels: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def function(n: int, channels: int, size: int) -> Function:
    return Function(
        inputs=partial(inputs, n, channels, size),
        eager=plain_torch.max_pool5,
        ours=ops.max_pool5,
        operators=("max_pool5",),
    )


def cases(settings: Settings) -> Iterator[Case]:
    sizes = (32,) if settings.quick else (8, 28, 32, 64)
    widths = (128,) if settings.quick else (32, 128)
    batches = settings.batch_sizes(full=(1, 8, 32, 128), quick=(8,))
    # On a GPU the network's sizes, the largest first: there may be no time for all.
    if settings.device.type == "cuda":
        sizes, widths = (32, 64), (128,)
        batches = settings.batch_sizes(full=(256, 64, 16, 1), quick=(256, 1))
    for dtype, backward in product(settings.dtypes, (False, True)):
        for channels, size, n in product(widths, sizes, batches):
            work = function(n, channels, size)
            # Forward: x is read, y written. Backward: the gradient and what tells the maxima are read, one is written.
            passes = 3 if backward else 2
            yield Case(
                suite="ops",
                group="max_pool5",
                name="backward" if backward else "forward",
                shape=(n, channels, size, size),
                dtype=dtype,
                peers=work.peers(settings, dtype, backward=backward),
                expected=work.expected(dtype, backward=backward, device=settings.device),
                tolerance=tolerance_of(dtype, backward=backward),
                bytes=passes * n * channels * size * size * dtype.itemsize,
            )
