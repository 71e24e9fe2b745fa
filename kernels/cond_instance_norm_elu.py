"""``cond_instance_norm_elu`` and its backward pass in Triton, for contiguous and channels_last alike.

A program works on tiles of ``[PLANES, POSITIONS]``: some channels of one sample by some positions of
its image. Which of the two is contiguous in memory is ``LAST``; nothing else depends on the layout.

* A plane that fits a tile is read once and normalised in registers: ``norm_kernel``, ``WHOLE``.
* A larger one is read twice by the same program, the second time from the L2 cache.
* With too few planes to fill a GPU, and for InstanceNorm++ (``PLUSPLUS``), it takes two kernels:
  ``statistics_kernel`` writes mean and sum of squares of parts of the planes, and ``apply_kernel``
  combines them. The channel means of a whole sample enter every element of InstanceNorm++, so that
  one pass cannot do.

The backward pass goes the same ways, with the sums of ``grad_u`` and ``grad_u * xhat`` in the place of
the moments. Samples write rows of the weight's gradient, and ``weight_gradient_kernel`` adds them up in
a fixed order: no atomics. All arithmetic is float32; offsets of tiles are 64-bit, those within a tile
32-bit. Batch sizes never compile a kernel anew; of channels and positions it matters only whether
they are multiples of 16, which is what lets loads be vectors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .addressing import in_layout_of, offset_of, on_device_of

TILE = 16384  # elements in the registers of a program: 32 a thread of 16 warps
SMALL_TILE = 4096  # where planes are worked on in parts: more and smaller programs
MAX_SPLITS = 16  # parts of a plane in `statistics_kernel`
ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of a large GPU
CHANNEL_BLOCK = 128  # channels at a time in the sums over all of a sample's channels

# Not left to Triton's default, which changes between versions. A label out of range is asserted; overflow is not.
OPTIONS = {"enable_fp_fusion": True, "sanitize_overflow": False}

UNSPECIALIZED = ["table_rows", "label_stride", "parts", "splits", "length", "eps"]


# --- the activation -------------------------------------------------------------------------------


@triton.jit
def expm1(u):
    """``exp(u) - 1`` for u <= 0, absolute error below 1e-7 also where `tl.exp` errs by two ulp.

    Near zero by p = expm1(u / 2), a minimax polynomial, as p^2 + 2p; `exp(u) - 1` cancels there.
    """
    h = 0.5 * u
    q = h * 1.04308419e-3 + 8.07917397e-3
    q = q * h + 4.15761806e-2
    q = q * h + 1.66651562e-1
    q = q * h + 4.99999076e-1
    p = (q * h) * h + h
    return tl.where(u > -1.25, p * p + (p + p), tl.exp(u) - 1.0)


@triton.jit
def activated(u, ELU: tl.constexpr):
    """``elu(u)``, or ``u``."""
    if ELU:
        return tl.where(u > 0.0, u, expm1(u))
    return u


@triton.jit
def gradient_of_u(grad_y, u, ELU: tl.constexpr):
    """The gradient before the activation."""
    if ELU:
        return tl.where(u > 0.0, grad_y, grad_y * tl.exp(u))
    return grad_y


# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def work_item(parts, channels, PLANES: tl.constexpr):
    """The program's sample, first channel and part; neighbours take neighbouring channels."""
    blocks = tl.cdiv(channels, PLANES)
    rest = tl.program_id(0) // blocks
    sample = rest // parts
    channel = (tl.program_id(0) - rest * blocks) * PLANES
    return sample, channel, rest - sample * parts


@triton.jit
def tile_of(
    sample, channel, position, channels, spatial,
    LAST: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile: of its first element (64-bit) and from there; and which lie inside."""
    c = tl.arange(0, PLANES)[:, None]
    s = tl.arange(0, POSITIONS)[None, :]
    first = offset_of(sample.to(tl.int64), channel, position, channels, spatial, LAST)
    inside = (channel + c < channels) & (position + s < spatial)
    return first, offset_of(0, c, s, channels, spatial, LAST), inside


@triton.jit
def load(ptr, first, offsets, inside):
    """A tile in float32, zero outside."""
    return tl.load(ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, first, offsets, inside, value):
    """Writes a tile in the tensor's dtype."""
    tl.store(ptr + first + offsets, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_row(
    labels_ptr, label_stride, sample, weight_ptr, table_rows, channels, PLUSPLUS: tl.constexpr
):  # fmt: skip
    """The sample's row of the weight, and how many of its channels there are: none for a wrong label."""
    label = tl.load(labels_ptr + sample.to(tl.int64) * label_stride)
    known = (label >= 0) & (label < table_rows)
    tl.device_assert(known, "cond_instance_norm_elu: label out of range")
    return weight_ptr + label * ((3 if PLUSPLUS else 2) * channels), tl.where(known, channels, 0)


@triton.jit
def load_weight(row_ptr, known, column, c, channels):
    """Entries of a row of the weight; NaN where there is no row, which is never read."""
    weight = tl.load(row_ptr + column * channels + c, mask=c < known, other=float("nan"))
    return tl.where(c < channels, weight.to(tl.float32), 0.0)


# --- statistics -----------------------------------------------------------------------------------


@triton.jit
def moments(x, inside, count):
    """Of each plane of a tile: its mean, as a sum of two, its squares about it, and x less the first.

    The first is off by the rounding of a sum, the second mends that: a large mean costs no digits.
    """
    mean = tl.sum(x, 1) / count
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rest = tl.sum(centred, 1) / count
    return mean, rest, tl.sum(centred * centred, 1) - rest * rest * count, centred


@triton.jit
def moments_of_range(
    x_ptr, sample, channel, first_tile, tiles, channels, spatial,
    LAST: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Mean and squares about it over consecutive tiles, one after the other (Chan et al. 1979).

    The mean is kept as its distance from the first tile's.
    """
    origin = tl.zeros([PLANES], tl.float32)
    drift = tl.zeros([PLANES], tl.float32)
    squares = tl.zeros([PLANES], tl.float32)
    for tile in range(tiles):
        position = (first_tile + tile) * POSITIONS
        first, offsets, inside = tile_of(
            sample, channel, position, channels, spatial, LAST, PLANES, POSITIONS
        )
        before, count = tile * POSITIONS, tl.minimum(spatial - position, POSITIONS)
        mean, rest, tile_squares, _ = moments(load(x_ptr, first, offsets, inside), inside, count)
        origin = tl.where(tile == 0, mean, origin)
        share = count / (before + count)
        delta = mean - origin + rest - drift
        drift += delta * share
        squares += tile_squares + delta * (before * share) * delta
    return origin + drift, squares


@triton.jit
def mean_of_parts(
    mean_ptr, sample, c, splits, length, channels, spatial, SPLITS: tl.constexpr
):  # fmt: skip
    """Means of planes from those of their parts; and each part's distance from it, and its share."""
    k = tl.arange(0, SPLITS)[None, :]
    inside = (c[:, None] < channels) & (k < splits)
    offsets = (sample.to(tl.int64) * splits + k) * channels + c[:, None]
    means = tl.load(mean_ptr + offsets, mask=inside, other=0.0)
    share = tl.where(inside, tl.minimum(spatial - k * length, length) / spatial, 0.0)
    first = tl.sum(tl.where(k == 0, means, 0.0), 1)  # less this one, the sum is of small numbers
    distance = tl.where(inside, means - first[:, None], 0.0)
    shift = tl.sum(share * distance, 1)
    return first + shift, distance - shift[:, None], share, offsets, inside


@triton.jit
def sum_of_parts(ptr, sample, c, splits, channels, SPLITS: tl.constexpr):
    """Sums of planes from those of their parts, in a fixed order."""
    k = tl.arange(0, SPLITS)[None, :]
    inside = (c[:, None] < channels) & (k < splits)
    offsets = (sample.to(tl.int64) * splits + k) * channels + c[:, None]
    return tl.sum(tl.load(ptr + offsets, mask=inside, other=0.0), 1)


@triton.jit
def channel_statistics(
    mean_ptr, sample, splits, length, channels, spatial,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """InstanceNorm++: a sample's channel means lie about origin + middle, with this 1/std (unbiased).

    The origin is one of them. Less it, the sum is of small numbers: m keeps its digits where the
    means hardly differ.
    """
    origin = tl.load(mean_ptr + sample.to(tl.int64) * splits * channels)
    sums = tl.zeros([BLOCK], tl.float32)
    for channel in range(0, channels, BLOCK):
        c = channel + tl.arange(0, BLOCK)
        mean, _, _, _, _ = mean_of_parts(
            mean_ptr, sample, c, splits, length, channels, spatial, SPLITS
        )
        sums += tl.where(c < channels, mean - origin, 0.0)
    middle = tl.sum(sums, 0) / channels
    squares = tl.zeros([BLOCK], tl.float32)
    for channel in range(0, channels, BLOCK):
        c = channel + tl.arange(0, BLOCK)
        mean, _, _, _, _ = mean_of_parts(
            mean_ptr, sample, c, splits, length, channels, spatial, SPLITS
        )
        distance = tl.where(c < channels, mean - origin - middle, 0.0)
        squares += distance * distance
    return origin, middle, tl.rsqrt(tl.sum(squares, 0) / (channels - 1) + 1e-5)


# --- forward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED, debug=True)
def norm_kernel(
    x_ptr, labels_ptr, weight_ptr, y_ptr, mean_ptr, rstd_ptr,
    table_rows, label_stride, channels, spatial, eps,
    ELU: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The plain norm, all of some planes in one program; WHOLE: in registers."""
    sample, channel, _ = work_item(1, channels, PLANES)
    c = channel + tl.arange(0, PLANES)
    row_ptr, known = weight_row(
        labels_ptr, label_stride, sample, weight_ptr, table_rows, channels, False
    )
    gamma = load_weight(row_ptr, known, 0, c, channels)
    beta = load_weight(row_ptr, known, 1, c, channels)
    if WHOLE:
        first, offsets, inside = tile_of(
            sample, channel, 0, channels, spatial, LAST, PLANES, POSITIONS
        )
        x = load(x_ptr, first, offsets, inside)
        middle, rest, squares, centred = moments(x, inside, spatial)
        mean = middle + rest
    else:
        mean, squares = moments_of_range(
            x_ptr, sample, channel, 0, tl.cdiv(spatial, POSITIONS), channels, spatial,
            LAST, PLANES, POSITIONS,
        )  # fmt: skip
    rstd = tl.rsqrt(squares / spatial + eps)
    plane = sample.to(tl.int64) * channels + c
    tl.store(mean_ptr + plane, mean, mask=c < channels)
    tl.store(rstd_ptr + plane, rstd, mask=c < channels)
    scale = (gamma * rstd)[:, None]
    if WHOLE:
        u = (centred - rest[:, None]) * scale + beta[:, None]
        store(y_ptr, first, offsets, inside, activated(u, ELU))
    else:
        for tile in range(tl.cdiv(spatial, POSITIONS)):
            first, offsets, inside = tile_of(
                sample, channel, tile * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
            )
            u = (load(x_ptr, first, offsets, inside) - mean[:, None]) * scale + beta[:, None]
            store(y_ptr, first, offsets, inside, activated(u, ELU))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistics_kernel(
    x_ptr, mean_ptr, squares_ptr, splits, length, channels, spatial,
    LAST: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Moments of parts of planes, ``length`` tiles each: two tensors ``(N, splits, C)``."""
    sample, channel, part = work_item(splits, channels, PLANES)
    tiles = tl.minimum(length, tl.cdiv(spatial, POSITIONS) - part * length)
    mean, squares = moments_of_range(
        x_ptr, sample, channel, part * length, tiles, channels, spatial, LAST, PLANES, POSITIONS
    )
    c = channel + tl.arange(0, PLANES)
    at = (sample.to(tl.int64) * splits + part) * channels + c
    tl.store(mean_ptr + at, mean, mask=c < channels)
    tl.store(squares_ptr + at, squares, mask=c < channels)


@triton.jit(do_not_specialize=UNSPECIALIZED, debug=True)
def apply_kernel(
    x_ptr, labels_ptr, weight_ptr, part_mean_ptr, part_squares_ptr, y_ptr, mean_ptr, rstd_ptr,
    table_rows, label_stride, parts, splits, length, channels, spatial, eps,
    ELU: tl.constexpr, PLUSPLUS: tl.constexpr, LAST: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combines the moments of a plane's parts, then normalises one tile."""
    sample, channel, part = work_item(parts, channels, PLANES)
    c = channel + tl.arange(0, PLANES)
    row_ptr, known = weight_row(
        labels_ptr, label_stride, sample, weight_ptr, table_rows, channels, PLUSPLUS
    )
    gamma = load_weight(row_ptr, known, 0, c, channels)
    beta = load_weight(row_ptr, known, 2 if PLUSPLUS else 1, c, channels)

    mean, distance, share, offsets, inside = mean_of_parts(
        part_mean_ptr, sample, c, splits, length, channels, spatial, SPLITS
    )
    squares = tl.load(part_squares_ptr + offsets, mask=inside, other=0.0)
    rstd = tl.rsqrt(tl.sum(squares / spatial + share * distance * distance, 1) + eps)
    if part == 0:
        plane = sample.to(tl.int64) * channels + c
        tl.store(mean_ptr + plane, mean, mask=c < channels)
        tl.store(rstd_ptr + plane, rstd, mask=c < channels)
    if PLUSPLUS:
        origin, middle, channel_rstd = channel_statistics(
            part_mean_ptr, sample, splits, length, channels, spatial, SPLITS, BLOCK
        )
        alpha = load_weight(row_ptr, known, 1, c, channels)
        beta += gamma * alpha * ((mean - origin - middle) * channel_rstd)

    first, offsets, inside = tile_of(
        sample, channel, part * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
    )
    x = load(x_ptr, first, offsets, inside)
    u = (x - mean[:, None]) * (gamma * rstd)[:, None] + beta[:, None]
    store(y_ptr, first, offsets, inside, activated(u, ELU))


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def saved_statistics(mean_ptr, rstd_ptr, sample, c, channels):
    """Of planes: the saved mean and 1/std."""
    plane = sample.to(tl.int64) * channels + c
    mean = tl.load(mean_ptr + plane, mask=c < channels, other=0.0)
    return mean, tl.load(rstd_ptr + plane, mask=c < channels, other=0.0)


@triton.jit
def tile_gradients(
    grad_y_ptr, x_ptr, first, offsets, inside, mean, rstd, gamma, shift, ELU: tl.constexpr
):  # fmt: skip
    """Of a tile: the gradient before the activation, and xhat."""
    x = load(x_ptr, first, offsets, inside)
    grad_y = load(grad_y_ptr, first, offsets, inside)
    xhat = (x - mean[:, None]) * rstd[:, None]
    return gradient_of_u(grad_y, xhat * gamma[:, None] + shift[:, None], ELU), xhat


@triton.jit
def gradient_sums_of_range(
    grad_y_ptr, x_ptr, mean, rstd, gamma, shift,
    sample, channel, first_tile, tiles, channels, spatial,
    ELU: tl.constexpr, LAST: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The sums of grad_u and of grad_u * xhat over consecutive tiles."""
    grad_beta = tl.zeros([PLANES], tl.float32)
    grad_gamma = tl.zeros([PLANES], tl.float32)
    for tile in range(first_tile, first_tile + tiles):
        first, offsets, inside = tile_of(
            sample, channel, tile * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
        )
        grad_u, xhat = tile_gradients(
            grad_y_ptr, x_ptr, first, offsets, inside, mean, rstd, gamma, shift, ELU
        )
        grad_beta += tl.sum(grad_u, 1)
        grad_gamma += tl.sum(grad_u * xhat, 1)
    return grad_beta, grad_gamma


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    grad_y_ptr, x_ptr, labels_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, grad_rows_ptr,
    table_rows, label_stride, channels, spatial,
    ELU: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The plain norm's gradients, all of some planes in one program; WHOLE: in registers."""
    sample, channel, _ = work_item(1, channels, PLANES)
    c = channel + tl.arange(0, PLANES)
    row_ptr, known = weight_row(
        labels_ptr, label_stride, sample, weight_ptr, table_rows, channels, False
    )
    gamma = load_weight(row_ptr, known, 0, c, channels)
    beta = load_weight(row_ptr, known, 1, c, channels)
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, sample, c, channels)
    if WHOLE:
        first, offsets, inside = tile_of(
            sample, channel, 0, channels, spatial, LAST, PLANES, POSITIONS
        )
        grad_u, xhat = tile_gradients(
            grad_y_ptr, x_ptr, first, offsets, inside, mean, rstd, gamma, beta, ELU
        )
        grad_beta, grad_gamma = tl.sum(grad_u, 1), tl.sum(grad_u * xhat, 1)
    else:
        grad_beta, grad_gamma = gradient_sums_of_range(
            grad_y_ptr, x_ptr, mean, rstd, gamma, beta,
            sample, channel, 0, tl.cdiv(spatial, POSITIONS), channels, spatial,
            ELU, LAST, PLANES, POSITIONS,
        )  # fmt: skip
    grad_row_ptr = grad_rows_ptr + sample.to(tl.int64) * (2 * channels)
    tl.store(grad_row_ptr + c, grad_gamma, mask=c < channels)
    tl.store(grad_row_ptr + channels + c, grad_beta, mask=c < channels)

    scale = (gamma * rstd)[:, None]
    along_one, along_xhat = (grad_beta / spatial)[:, None], (grad_gamma / spatial)[:, None]
    if WHOLE:
        grad_x = (grad_u - along_one - xhat * along_xhat) * scale
        store(grad_x_ptr, first, offsets, inside, grad_x)
    else:
        for tile in range(tl.cdiv(spatial, POSITIONS)):
            first, offsets, inside = tile_of(
                sample, channel, tile * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
            )
            grad_u, xhat = tile_gradients(
                grad_y_ptr, x_ptr, first, offsets, inside, mean, rstd, gamma, beta, ELU
            )
            grad_x = (grad_u - along_one - xhat * along_xhat) * scale
            store(grad_x_ptr, first, offsets, inside, grad_x)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_sums_kernel(
    grad_y_ptr, x_ptr, labels_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_beta_ptr, grad_gamma_ptr,
    table_rows, label_stride, splits, length, channels, spatial,
    ELU: tl.constexpr, PLUSPLUS: tl.constexpr, LAST: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of grad_u and grad_u * xhat over parts of planes: two tensors ``(N, splits, C)``."""
    sample, channel, part = work_item(splits, channels, PLANES)
    c = channel + tl.arange(0, PLANES)
    row_ptr, known = weight_row(
        labels_ptr, label_stride, sample, weight_ptr, table_rows, channels, PLUSPLUS
    )
    gamma = load_weight(row_ptr, known, 0, c, channels)
    shift = load_weight(row_ptr, known, 2 if PLUSPLUS else 1, c, channels)
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, sample, c, channels)
    if PLUSPLUS:
        origin, middle, channel_rstd = channel_statistics(
            mean_ptr, sample, 1, spatial, channels, spatial, 1, BLOCK
        )
        alpha = load_weight(row_ptr, known, 1, c, channels)
        shift += gamma * alpha * ((mean - origin - middle) * channel_rstd)
    tiles = tl.minimum(length, tl.cdiv(spatial, POSITIONS) - part * length)
    grad_beta, grad_gamma = gradient_sums_of_range(
        grad_y_ptr, x_ptr, mean, rstd, gamma, shift,
        sample, channel, part * length, tiles, channels, spatial,
        ELU, LAST, PLANES, POSITIONS,
    )  # fmt: skip
    at = (sample.to(tl.int64) * splits + part) * channels + c
    tl.store(grad_beta_ptr + at, grad_beta, mask=c < channels)
    tl.store(grad_gamma_ptr + at, grad_gamma, mask=c < channels)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_apply_kernel(
    grad_y_ptr, x_ptr, labels_ptr, weight_ptr, mean_ptr, rstd_ptr, part_beta_ptr, part_gamma_ptr,
    grad_x_ptr, grad_rows_ptr,
    table_rows, label_stride, parts, splits, channels, spatial,
    ELU: tl.constexpr, PLUSPLUS: tl.constexpr, LAST: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combines the sums of a plane's parts, then writes grad_x of one tile."""
    sample, channel, part = work_item(parts, channels, PLANES)
    c = channel + tl.arange(0, PLANES)
    row_ptr, known = weight_row(
        labels_ptr, label_stride, sample, weight_ptr, table_rows, channels, PLUSPLUS
    )
    gamma = load_weight(row_ptr, known, 0, c, channels)
    shift = load_weight(row_ptr, known, 2 if PLUSPLUS else 1, c, channels)
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, sample, c, channels)
    grad_beta = sum_of_parts(part_beta_ptr, sample, c, splits, channels, SPLITS)
    grad_gamma = sum_of_parts(part_gamma_ptr, sample, c, splits, channels, SPLITS)

    constant = -gamma * rstd * (grad_beta / spatial)  # what every position of a plane gets
    grad_weight_gamma = grad_gamma
    grad_row_ptr = grad_rows_ptr + sample.to(tl.int64) * ((3 if PLUSPLUS else 2) * channels)
    if PLUSPLUS:
        origin, middle, channel_rstd = channel_statistics(
            mean_ptr, sample, 1, spatial, channels, spatial, 1, BLOCK
        )
        alpha = load_weight(row_ptr, known, 1, c, channels)
        m = (mean - origin - middle) * channel_rstd
        shift += gamma * alpha * m
        # Back through m, which has every channel mean of the sample in it.
        sums = tl.zeros([BLOCK], tl.float32)
        along_m = tl.zeros([BLOCK], tl.float32)
        for block in range(0, channels, BLOCK):
            b = block + tl.arange(0, BLOCK)
            mean_b, _ = saved_statistics(mean_ptr, rstd_ptr, sample, b, channels)
            grad_m = sum_of_parts(part_beta_ptr, sample, b, splits, channels, SPLITS)
            grad_m *= load_weight(row_ptr, known, 0, b, channels)
            grad_m *= load_weight(row_ptr, known, 1, b, channels)
            sums += grad_m  # 0 beyond the channels
            along_m += grad_m * ((mean_b - origin - middle) * channel_rstd)
        average, spread = tl.sum(sums, 0) / channels, tl.sum(along_m, 0) / (channels - 1)
        grad_mean = channel_rstd * (gamma * alpha * grad_beta - average - m * spread)
        constant += grad_mean / spatial
        grad_weight_gamma += alpha * m * grad_beta
        if part == 0:
            tl.store(grad_row_ptr + channels + c, gamma * m * grad_beta, mask=c < channels)
    if part == 0:
        tl.store(grad_row_ptr + c, grad_weight_gamma, mask=c < channels)
        beta_ptr = grad_row_ptr + (2 if PLUSPLUS else 1) * channels
        tl.store(beta_ptr + c, grad_beta, mask=c < channels)

    first, offsets, inside = tile_of(
        sample, channel, part * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
    )
    grad_u, xhat = tile_gradients(
        grad_y_ptr, x_ptr, first, offsets, inside, mean, rstd, gamma, shift, ELU
    )
    along_xhat = (grad_gamma / spatial)[:, None]
    grad_x = (grad_u - xhat * along_xhat) * (gamma * rstd)[:, None] + constant[:, None]
    store(grad_x_ptr, first, offsets, inside, grad_x)


@triton.jit(do_not_specialize=["samples", "label_stride", "width"])
def weight_gradient_kernel(
    grad_rows_ptr, labels_ptr, grad_weight_ptr, samples, label_stride, width,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of columns of a row of the weight's gradient: its samples' rows, in their order."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for sample in range(0, samples, SAMPLES):
        n = (sample + tl.arange(0, SAMPLES)).to(tl.int64)
        label = tl.load(labels_ptr + n * label_stride, mask=n < samples, other=-1)
        inside = (label == row)[:, None] & (column < width)[None, :]
        ptrs = grad_rows_ptr + n[:, None] * width + column[None, :]
        total += tl.sum(tl.load(ptrs, mask=inside, other=0.0), 0)
    at = row.to(tl.int64) * width + column
    tl.store(grad_weight_ptr + at, total.to(grad_weight_ptr.dtype.element_ty), mask=column < width)


# --- launches -------------------------------------------------------------------------------------


def warps(tile: int) -> int:
    """Warps of a program: 32 elements of a tile a thread."""
    return min(16, max(1, tile // 1024))


def whole_tile(channels: int, spatial: int, last: bool) -> tuple[int, int]:
    """(PLANES, POSITIONS) of a program that sees whole planes; longer planes take several tiles.

    In channels_last, 16 to 64 channels: from 16 on no sector of memory is read in part.
    """
    most = triton.next_power_of_2(channels)
    positions = triton.next_power_of_2(spatial)
    if last:
        planes = min(most, 64, max(16, SMALL_TILE // positions))
    else:
        planes = min(most, 64, max(1, SMALL_TILE // positions))
    return planes, min(positions, TILE // planes)


def part_tile(channels: int, spatial: int, last: bool) -> tuple[int, int]:
    """(PLANES, POSITIONS) of a program that sees a part of its planes."""
    most = triton.next_power_of_2(channels)
    positions = triton.next_power_of_2(spatial)
    planes = min(most, 32 if last else 64)
    if not last:
        planes = min(planes, max(1, SMALL_TILE // positions))
    return planes, min(positions, SMALL_TILE // planes)


def splits_of(programs: int, spatial: int, positions: int) -> tuple[int, int]:
    """How many parts to reduce planes in, to keep a GPU busy, and their length in tiles."""
    tiles = triton.cdiv(spatial, positions)
    wanted = min(MAX_SPLITS, tiles, triton.cdiv(2 * ENOUGH_PROGRAMS, programs))
    length = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, length), length


def in_one_kernel(
    samples: int, channels: int, spatial: int, last: bool, plusplus: bool
) -> tuple[bool, bool]:
    """Whether one kernel does it all, and whether it keeps whole planes in registers."""
    planes, positions = whole_tile(channels, spatial, last)
    whole = positions >= spatial
    enough = samples * triton.cdiv(channels, planes) >= ENOUGH_PROGRAMS
    return not plusplus and (whole or enough), whole


def cond_instance_norm_elu(
    x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, eps: float, elu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and the mean and ``1/sqrt(var + eps)`` of every plane, ``(N, C)`` in float32.

    ``x (N, C, *spatial)`` is float32, bfloat16 or float16, contiguous or channels_last; ``labels`` int64
    of length N or 1; ``weight (K, 2C)`` or ``(K, 3C)`` of any floating dtype.
    """
    samples, channels = x.shape[:2]
    spatial = math.prod(x.shape[2:])
    y = torch.empty_like(x)
    mean = x.new_empty(samples, channels, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean, rstd
    last, plusplus = not x.is_contiguous(), weight.shape[1] == 3 * channels
    table = (weight.shape[0], labels.stride(0) if len(labels) > 1 else 0)
    weight = weight.contiguous()
    one_kernel, whole = in_one_kernel(samples, channels, spatial, last, plusplus)
    with on_device_of(x):
        if one_kernel:
            planes, positions = whole_tile(channels, spatial, last)
            norm_kernel[(samples * triton.cdiv(channels, planes),)](
                x, labels, weight, y, mean, rstd, *table, channels, spatial, eps,
                ELU=elu, LAST=last, WHOLE=whole, PLANES=planes, POSITIONS=positions,
                num_warps=warps(planes * positions), **OPTIONS,
            )  # fmt: skip
            return y, mean, rstd
        planes, positions = part_tile(channels, spatial, last)
        programs = samples * triton.cdiv(channels, planes)
        splits, length = splits_of(programs, spatial, positions)
        part_mean, part_squares = mean.new_empty(2, samples, splits, channels).unbind()
        statistics_kernel[(programs * splits,)](
            x, part_mean, part_squares, splits, length, channels, spatial,
            LAST=last, PLANES=planes, POSITIONS=positions, num_warps=warps(planes * positions), **OPTIONS,
        )  # fmt: skip
        parts = triton.cdiv(spatial, positions)
        apply_kernel[(programs * parts,)](
            x, labels, weight, part_mean, part_squares, y, mean, rstd, *table,
            parts, splits, length * positions, channels, spatial, eps,
            ELU=elu, PLUSPLUS=plusplus, LAST=last, PLANES=planes, POSITIONS=positions,
            SPLITS=MAX_SPLITS, BLOCK=CHANNEL_BLOCK,
            num_warps=warps(planes * positions), **OPTIONS,
        )  # fmt: skip
    return y, mean, rstd


def cond_instance_norm_elu_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    elu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients for x and weight, from what the forward pass has saved."""
    samples, channels = x.shape[:2]
    spatial = math.prod(x.shape[2:])
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight)
    grad_x = torch.empty_like(x)
    last, plusplus = not x.is_contiguous(), weight.shape[1] == 3 * channels
    table = (weight.shape[0], labels.stride(0) if len(labels) > 1 else 0)
    weight = weight.contiguous()
    inputs = (in_layout_of(grad_y, x), x, labels, weight, mean, rstd)
    grad_rows = mean.new_empty(samples, weight.shape[1])
    one_kernel, whole = in_one_kernel(samples, channels, spatial, last, plusplus)
    with on_device_of(x):
        if one_kernel:
            planes, positions = whole_tile(channels, spatial, last)
            gradient_kernel[(samples * triton.cdiv(channels, planes),)](
                *inputs, grad_x, grad_rows, *table, channels, spatial,
                ELU=elu, LAST=last, WHOLE=whole, PLANES=planes, POSITIONS=positions,
                num_warps=warps(planes * positions), **OPTIONS,
            )  # fmt: skip
        else:
            planes, positions = part_tile(channels, spatial, last)
            programs = samples * triton.cdiv(channels, planes)
            splits, length = splits_of(programs, spatial, positions)
            part_beta, part_gamma = mean.new_empty(2, samples, splits, channels).unbind()
            gradient_sums_kernel[(programs * splits,)](
                *inputs, part_beta, part_gamma, *table, splits, length, channels, spatial,
                ELU=elu, PLUSPLUS=plusplus, LAST=last, PLANES=planes, POSITIONS=positions,
                BLOCK=CHANNEL_BLOCK, num_warps=warps(planes * positions), **OPTIONS,
            )  # fmt: skip
            parts = triton.cdiv(spatial, positions)
            gradient_apply_kernel[(programs * parts,)](
                *inputs, part_beta, part_gamma, grad_x, grad_rows, *table,
                parts, splits, channels, spatial,
                ELU=elu, PLUSPLUS=plusplus, LAST=last, PLANES=planes, POSITIONS=positions,
                SPLITS=MAX_SPLITS, BLOCK=CHANNEL_BLOCK, num_warps=warps(planes * positions), **OPTIONS,
            )  # fmt: skip
        grad_weight = torch.empty_like(weight)
        width, columns = weight.shape[1], 64
        weight_gradient_kernel[(weight.shape[0], triton.cdiv(width, columns))](
            grad_rows, labels, grad_weight, samples, table[1], width,
            SAMPLES=32, COLUMNS=columns, num_warps=2, **OPTIONS,
        )  # fmt: skip
    return grad_x, grad_weight
