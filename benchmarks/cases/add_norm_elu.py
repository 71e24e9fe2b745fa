"""A bias, a residual, and the norm and ELU that follow, at the sizes of the network's layers; on GPUs."""

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
from .cond_instance_norm_elu import inputs as norm_inputs


@lru_cache(maxsize=1)
def inputs(n: int, channels: int, size: int) -> tuple[Tensor, ...]:
    x, labels, weight = norm_inputs(n, channels, size)
    return x, labels, weight, torch.linspace(-1, 1, channels), x.flip(0)


def eager(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    z = x + bias[:, None, None] + residual
    return z + plain_torch.cond_instance_norm_elu(z, labels, weight)


def ours(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    backend: str | None = None,
) -> Tensor:
    z, y = ops.add_norm_elu(x, labels, weight, bias=bias, residual=residual, backend=backend)
    return z + y


def cases(settings: Settings) -> Iterator[Case]:
    if (
        settings.device.type != "cuda"
    ):  # the CPU's kernels begin with the norm, and have none for this
        return
    sizes = (32,) if settings.quick else (32, 64)
    batches = settings.batch_sizes(full=(256, 64, 16, 1), quick=(256, 1))
    for dtype, backward in product(settings.dtypes, (False, True)):
        for size, n in product(sizes, batches):
            shape = (n, 128, size, size)
            work = Function(
                inputs=partial(inputs, n, 128, size),
                eager=eager,
                ours=ours,
                operators=("add_norm_elu",),
                backward_operators=("cond_instance_norm_elu_backward",),
                differentiable=(0, 2),
            )
            # x and the residual are read, z and y written, as by the addition of the two that makes one result of them.
            yield Case(
                suite="ops",
                group="add_norm_elu",
                name="backward" if backward else "forward",
                shape=shape,
                dtype=dtype,
                peers=work.peers(settings, dtype, backward=backward),
                expected=work.expected(dtype, backward=backward, device=settings.device),
                tolerance=tolerance_of(dtype, backward=backward),
                bytes=(5 if backward else 7) * torch.Size(shape).numel() * dtype.itemsize,
            )
