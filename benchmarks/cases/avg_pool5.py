"""The 5x5 average pool of the authors' first network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ncsn_fast import ops

from .. import plain_torch
from ..peers import Function
from ..suite import Case, Settings, tolerance_of
from .max_pool5 import inputs


def function(n: int, channels: int, size: int) -> Function:
    return Function(
        inputs=lambda: inputs(n, channels, size),
        eager=plain_torch.avg_pool5,
        ours=ops.avg_pool5,
        operators=("avg_pool5",),
        backward_operators=("avg_pool5",),
    )


def cases(settings: Settings) -> Iterator[Case]:
    batches = settings.batch_sizes(full=(1, 16), quick=(1,))
    shapes = [(128, 32)] if settings.quick else [(128, 32), (256, 16)]
    for dtype, backward in product(settings.dtypes, (False, True)):
        for (channels, size), n in product(shapes, batches):
            work = function(n, channels, size)
            yield Case(
                suite="ops",
                group="avg_pool5",
                name="backward" if backward else "forward",
                shape=(n, channels, size, size),
                dtype=dtype,
                peers=work.peers(settings, dtype, backward=backward),
                expected=work.expected(dtype, backward=backward, device=settings.device),
                tolerance=tolerance_of(dtype, backward=backward),
                bytes=2 * n * channels * size * size * dtype.itemsize,
            )
