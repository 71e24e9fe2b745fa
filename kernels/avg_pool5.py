"""``avg_pool5`` in Triton, for contiguous and channels_last alike; its gradient is the pool itself.

As in ``max_pool5.py``, a lane is a column of an image and a program walks down a stretch of rows: an output costs five
loads and not twenty-five.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .addressing import on_device_of
from .max_pool5 import columns_of, launch_arguments, load_right, width_of


@triton.jit(do_not_specialize=["samples", "height"])
def mean_kernel(
    x_ptr, y_ptr, samples, height, width, channels,
    DTYPE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of five in every row, and of five of those, by 25."""
    column, mask, right, down, at, first = columns_of(
        samples, height, width, channels, LAST, WIDE, ROWS, BLOCK
    )
    s0 = tl.zeros([BLOCK], DTYPE)  # the sums of the four rows above
    s1, s2, s3 = s0, s0, s0
    for row in range(first - 2, first + ROWS + 2):
        row_width = width_of(row, 0, height, width)
        s4 = tl.zeros([BLOCK], DTYPE)
        for dx in tl.static_range(-2, 3):
            x, _ = load_right(x_ptr, at, dx, right, column, row_width, mask, 0.0)
            s4 += x
        y = (s0 + s1 + s2 + s3 + s4) / 25
        inside = mask & (column < width_of(row - 2, first, height, width))
        tl.store(y_ptr + at - 2 * down, y.to(y_ptr.dtype.element_ty), mask=inside)
        s0, s1, s2, s3 = s1, s2, s3, s4
        at += down


def avg_pool5(x: torch.Tensor) -> torch.Tensor:
    """The 5x5 average pool with stride 1 of ``x (N, C, H, W)``, contiguous or channels_last, any floating dtype."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    grid, sizes, constants = launch_arguments(x)
    with on_device_of(x):
        mean_kernel[grid](x, y, *sizes, **constants)
    return y
