"""``max_pool5`` and its backward pass in Triton, for contiguous and channels_last alike, without atomics.

A lane is a column of an image: all rows of one (sample, channel, column). In memory neighbouring lanes
are neighbours in both layouts, and a step down is the same for all of them. A program walks down a
stretch of rows and carries along what the windows of the next rows share, so that an output costs five
loads and not twenty-five.

The backward pass first notes, for every window, which of its 25 places holds the maximum; then every
input gathers from the 25 windows that it is in, in row-major order. Equal numbers and NaN go by
PyTorch's rule: the first maximum in row-major order, the last NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .addressing import in_layout_of, on_device_of

ROWS = 8  # rows that a program walks down
WARPS = 4
ROW_BYTES = WARPS * 32 * 16  # of a program's lanes in memory: 16 a thread, the widest load
INT32_ELEMENTS = 2**31 - 2**16  # from here on offsets are 64-bit
NOWHERE = tl.constexpr(255)  # the place of a maximum that is not in the image


@triton.jit
def columns_of(
    samples, height, width, channels,
    LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The program's lanes: image column and mask, steps to the right and down, offsets of the first row.

    The first row is two above the program's first row of outputs, which is given too.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = program * BLOCK + tl.arange(0, BLOCK)
    right = channels if LAST else 1
    down = width * right
    # Written so that Triton sees what 16 neighbouring lanes have in common: loads are then vectors.
    position = lane // channels if LAST else lane
    image = position // width
    column = position - image * width
    images = samples if LAST else samples * channels
    first = tl.program_id(1) * ROWS
    at = lane + image * (down * (height - 1)) + (first - 2).to(lane.dtype) * down
    return column, image < images, right, down, at, first


@triton.jit
def width_of(row, first, last, width):
    """The width of a row of the image, 0 if it is not one of first .. last - 1."""
    return tl.where((row >= first) & (row < last), width, 0)


@triton.jit
def load_right(ptr, at, dx, right, column, width, mask, OTHER: tl.constexpr):
    """The pixels dx to the right, in float32 or float64; and which lie in the image."""
    inside = mask & (column + dx >= 0) & (column + dx < width)
    x = tl.load(ptr + at + dx * right, mask=inside, other=OTHER)
    return x if x.dtype == tl.float64 else x.to(tl.float32), inside


@triton.jit
def follows(b, a):
    """Whether b, later in row-major order, takes the place of a as the maximum."""
    return (b > a) | (b != b)


@triton.jit
def larger(a, b):
    """The maximum; NaN if there is one."""
    return tl.where(follows(b, a), b, a)


@triton.jit(do_not_specialize=["samples", "height"])
def pool_kernel(
    x_ptr, y_ptr, samples, height, width, channels,
    ZERO: tl.constexpr, DTYPE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The maximum of five in every row, and of five of those."""
    column, mask, right, down, at, first = columns_of(
        samples, height, width, channels, LAST, WIDE, ROWS, BLOCK
    )
    BORDER: tl.constexpr = 0.0 if ZERO else float("-inf")
    m0 = tl.full([BLOCK], BORDER, DTYPE)  # the maxima of the four rows above
    m1, m2, m3 = m0, m0, m0
    for row in range(first - 2, first + ROWS + 2):
        row_width = width_of(row, 0, height, width)
        m4, _ = load_right(x_ptr, at, -2, right, column, row_width, mask, BORDER)
        for dx in tl.static_range(-1, 3):
            x, _ = load_right(x_ptr, at, dx, right, column, row_width, mask, BORDER)
            m4 = larger(m4, x)
        y = larger(larger(larger(m0, m1), larger(m2, m3)), m4)
        inside = mask & (column < width_of(row - 2, first, height, width))
        tl.store(y_ptr + at - 2 * down, y.to(y_ptr.dtype.element_ty), mask=inside)
        m0, m1, m2, m3 = m1, m2, m3, m4
        at += down


@triton.jit
def later_row(value, place, row_value, row_place, K: tl.constexpr):
    """The maximum of a window and its place, with its row K taken into account."""
    take = follows(row_value, value) | ((place == NOWHERE) & (row_place != NOWHERE))
    return tl.where(take, row_value, value), tl.where(take, row_place + 5 * K, place)


@triton.jit(do_not_specialize=["samples", "height"])
def place_kernel(
    x_ptr, place_ptr, samples, height, width, channels,
    ZERO: tl.constexpr, DTYPE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which of the 25 places of every window holds its maximum, counted in row-major order."""
    column, mask, right, down, at, first = columns_of(
        samples, height, width, channels, LAST, WIDE, ROWS, BLOCK
    )
    BORDER: tl.constexpr = 0.0 if ZERO else float("-inf")
    m0 = tl.full([BLOCK], BORDER, DTYPE)  # maxima of the four rows above, and their places there
    m1, m2, m3 = m0, m0, m0
    p0 = tl.full([BLOCK], NOWHERE, tl.int32)
    p1, p2, p3 = p0, p0, p0
    for row in range(first - 2, first + ROWS + 2):
        row_width = width_of(row, 0, height, width)
        m4 = tl.full([BLOCK], BORDER, DTYPE)
        p4 = tl.full([BLOCK], NOWHERE, tl.int32)
        for dx in tl.static_range(-2, 3):
            x, inside = load_right(x_ptr, at, dx, right, column, row_width, mask, BORDER)
            # A border of zeros can hold the maximum; one of minus infinity cannot.
            counts = mask if ZERO else inside
            take = follows(x, m4) | ((p4 == NOWHERE) & counts)
            m4 = tl.where(take, x, m4)
            p4 = tl.where(take, dx + 2, p4)
        value, place = later_row(m0, p0, m1, p1, 1)
        value, place = later_row(value, place, m2, p2, 2)
        value, place = later_row(value, place, m3, p3, 3)
        value, place = later_row(value, place, m4, p4, 4)
        inside = mask & (column < width_of(row - 2, first, height, width))
        tl.store(place_ptr + at - 2 * down, place.to(tl.uint8), mask=inside)
        m0, m1, m2, m3 = m1, m2, m3, m4
        p0, p1, p2, p3 = p1, p2, p3, p4
        at += down


@triton.jit(do_not_specialize=["samples", "height"])
def gather_kernel(
    grad_y_ptr, place_ptr, grad_x_ptr, samples, height, width, channels,
    DTYPE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every input adds up the gradients of the windows whose maximum it is."""
    column, mask, right, down, at, first = columns_of(
        samples, height, width, channels, LAST, WIDE, ROWS, BLOCK
    )
    a0 = tl.zeros([BLOCK], DTYPE)  # of the inputs two rows above the windows' row, to two below
    a1, a2, a3 = a0, a0, a0
    for row in range(first - 2, first + ROWS + 2):
        row_width = width_of(row, 0, height, width)
        a4 = tl.zeros([BLOCK], DTYPE)
        for dx in tl.static_range(-2, 3):
            grad, inside = load_right(grad_y_ptr, at, dx, right, column, row_width, mask, 0.0)
            place = tl.load(place_ptr + at + dx * right, mask=inside, other=NOWHERE).to(tl.int32)
            a0 += tl.where(place == 2 - dx, grad, 0.0)
            a1 += tl.where(place == 7 - dx, grad, 0.0)
            a2 += tl.where(place == 12 - dx, grad, 0.0)
            a3 += tl.where(place == 17 - dx, grad, 0.0)
            a4 += tl.where(place == 22 - dx, grad, 0.0)
        inside = mask & (column < width_of(row - 2, first, height, width))
        tl.store(grad_x_ptr + at - 2 * down, a0.to(grad_x_ptr.dtype.element_ty), mask=inside)
        a0, a1, a2, a3 = a1, a2, a3, a4
        at += down


def zero_border(padding: int) -> bool:
    """Whether the border counts as zero, and not as minus infinity."""
    if padding not in (0, 1):
        raise ValueError(f"padding must be 0 (neg_inf) or 1 (zero), got {padding}")
    return padding == 1


def launch_arguments(x: torch.Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, object]]:
    """Grid, sizes and constants that all of these kernels take."""
    samples, channels, height, width = x.shape
    block = ROW_BYTES // x.element_size()
    grid = (triton.cdiv(samples * channels * width, block), triton.cdiv(height, ROWS))
    constants = {
        "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "LAST": not x.is_contiguous(),
        "WIDE": x.numel() >= INT32_ELEMENTS,
        "ROWS": ROWS,
        "BLOCK": block,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
    return grid, (samples, height, width, channels), constants


def max_pool5(x: torch.Tensor, padding: int) -> torch.Tensor:
    """The 5x5 max pool with stride 1 of ``x (N, C, H, W)``, contiguous or channels_last, any floating dtype.

    ``padding`` is 0, minus infinity, or 1, zero.
    """
    zero = zero_border(padding)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    grid, sizes, constants = launch_arguments(x)
    with on_device_of(x):
        pool_kernel[grid](x, y, *sizes, ZERO=zero, **constants)
    return y


def max_pool5_backward(grad_y: torch.Tensor, x: torch.Tensor, padding: int) -> torch.Tensor:
    """Each output's gradient, to the first maximum of its window in row-major order."""
    zero = zero_border(padding)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x
    places = torch.empty_like(x, dtype=torch.uint8)
    grid, sizes, constants = launch_arguments(x)
    with on_device_of(x):
        place_kernel[grid](x, places, *sizes, ZERO=zero, **constants)
        gather_kernel[grid](in_layout_of(grad_y, x), places, grad_x, *sizes, **constants)
    return grad_x
