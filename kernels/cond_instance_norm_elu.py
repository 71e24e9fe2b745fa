"""``cond_instance_norm_elu`` in Triton, for contiguous and channels_last alike; its gradients have a file of their own.

* Planes that fit a tile are read once and normalised in registers: ``norm_kernel``, ``WHOLE``.
* Larger ones are read twice by the same program, the second time from the L2 cache.
* With too few planes to fill a GPU, and for InstanceNorm++ (``PLUSPLUS``), it takes two kernels:
  ``statistics_kernel`` writes mean and sum of squares of parts of the planes, and ``apply_kernel`` combines them. The
  channel means of a whole sample enter every element of InstanceNorm++, so that one pass cannot do.

``add_norm_elu`` is the same kernels with ``z_ptr``: what reads x first adds bias and residual, and writes the sum.

All arithmetic is float32. Batch sizes never compile a kernel anew; of channels and positions it matters only whether
tiles cover them exactly and whether they are multiples of 16, which is what lets loads be vectors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .addressing import in_layout_of, on_device_of
from .planes import (
    MAX_SPLITS,
    constants_of,
    in_one_kernel,
    inside_only,
    load_sum,
    load_tile,
    of_part,
    splits_of,
    store_tile,
    tile_for,
    tile_of,
    work_item,
)

CHANNEL_BLOCK = 128  # channels at a time in the sums over all of a sample's channels

UNSPECIALIZED = ["table_rows", "label_stride", "parts", "splits", "length", "eps"]


# --- the activation -------------------------------------------------------------------------------


@triton.jit
def expm1(u, HALF: tl.constexpr):
    """``exp(u) - 1`` for u <= 0; absolute error below 1e-7 near zero, where that difference cancels.

    From -1 on by u + u^2 p(u), p a minimax polynomial. HALF: what the rounding to half precision hides is not
    computed; then Taylor's series to u^3, from -1/32 on.
    """
    if HALF:
        return tl.where(u > -0.03125, u * (u * (u * (1 / 6) + 0.5) + 1.0), tl.exp(u) - 1.0)
    p = u * 1.24759477e-4 + 1.28706871e-3
    p = p * u + 8.2589956e-3
    p = p * u + 4.16375659e-2
    p = p * u + 1.66661024e-1
    p = p * u + 4.99999583e-1
    return tl.where(u > -1.0, (u * u) * p + u, tl.exp(u) - 1.0)


@triton.jit
def activated(u, ELU: tl.constexpr, HALF: tl.constexpr):
    """``elu(u)``, or ``u``."""
    if ELU:
        return tl.where(u > 0.0, u, expm1(u, HALF))
    return u


# --- the weight's rows ----------------------------------------------------------------------------


@triton.jit
def label_of(labels_ptr, label_stride, sample, table_rows):
    """The sample's label, and whether there is such a row."""
    label = tl.load(labels_ptr + sample * label_stride)
    return label, (label >= 0) & (label < table_rows)


@triton.jit
def assert_known(known):
    """Comes last in a kernel: no load waits for it, and a wrong label reads nothing."""
    tl.device_assert(known, "cond_instance_norm_elu: label out of range")


@triton.jit
def load_weight(weight_ptr, label, known, column, c, channels, COLUMNS: tl.constexpr):
    """Entries of a row of the weight; NaN where there is no row, which is never read."""
    at = label * (COLUMNS * channels) + column * channels + c
    there = c < tl.where(known, channels, 0)
    weight = tl.load(weight_ptr + at, mask=there, other=float("nan"))
    return tl.where(c < channels, weight.to(tl.float32), 0.0)


# --- statistics -----------------------------------------------------------------------------------


@triton.jit
def moments(x, inside, count, EVEN: tl.constexpr):
    """Of each plane of a tile: its mean, as a sum of two, its squares about it, and x less the first.

    The first is off by the rounding of a sum, the second mends that: a large mean costs no digits.
    """
    mean = tl.sum(x, 1) / count
    centred = inside_only(x - mean[:, None], inside, EVEN)
    rest = tl.sum(centred, 1) / count
    return mean, rest, tl.sum(centred * centred, 1) - rest * rest * count, centred


@triton.jit
def moments_of_range(
    x_ptr, bias_ptr, residual_ptr, z_ptr, sample, channel, first_tile, tiles, channels, spatial,
    LAST: tl.constexpr, EVEN: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr,
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
        x = load_sum(
            x_ptr, bias_ptr, residual_ptr, z_ptr, first, offsets, inside, channel, channels,
            EVEN, PLANES,
        )  # fmt: skip
        mean, rest, tile_squares, _ = moments(x, inside, count, EVEN)
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
    offsets, inside = of_part(sample, c, splits, channels, SPLITS)
    means = tl.load(mean_ptr + offsets, mask=inside, other=0.0)
    share = tl.where(inside, tl.minimum(spatial - k * length, length) / spatial, 0.0)
    first = tl.sum(tl.where(k == 0, means, 0.0), 1)  # less this one, the sum is of small numbers
    distance = tl.where(inside, means - first[:, None], 0.0)
    shift = tl.sum(share * distance, 1)
    return first + shift, distance - shift[:, None], share


@triton.jit
def channel_statistics(
    mean_ptr, sample, splits, length, channels, spatial,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """InstanceNorm++: a sample's channel means lie about origin + middle, with this 1/std (unbiased).

    The origin is one of them. Less it, the sum is of small numbers: m keeps its digits where the
    means hardly differ.
    """
    origin = tl.load(mean_ptr + sample * splits * channels)
    sums = tl.zeros([BLOCK], tl.float32)
    for channel in range(0, channels, BLOCK):
        c = channel + tl.arange(0, BLOCK)
        mean, _, _ = mean_of_parts(mean_ptr, sample, c, splits, length, channels, spatial, SPLITS)
        sums += tl.where(c < channels, mean - origin, 0.0)
    middle = tl.sum(sums, 0) / channels
    squares = tl.zeros([BLOCK], tl.float32)
    for channel in range(0, channels, BLOCK):
        c = channel + tl.arange(0, BLOCK)
        mean, _, _ = mean_of_parts(mean_ptr, sample, c, splits, length, channels, spatial, SPLITS)
        distance = tl.where(c < channels, mean - origin - middle, 0.0)
        squares += distance * distance
    return origin, middle, tl.rsqrt(tl.sum(squares, 0) / (channels - 1) + 1e-5)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED, debug=True)
def norm_kernel(
    x_ptr, bias_ptr, residual_ptr, z_ptr, labels_ptr, weight_ptr, y_ptr, mean_ptr, rstd_ptr,
    table_rows, label_stride, channels, spatial, eps,
    ELU: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The plain norm, all of some planes in one program; WHOLE: in registers."""
    HALF: tl.constexpr = y_ptr.dtype.element_ty != tl.float32
    sample, channel, _ = work_item(1, channels, PLANES)
    label, known = label_of(labels_ptr, label_stride, sample, table_rows)
    if WHOLE:
        first, offsets, inside = tile_of(
            sample, channel, 0, channels, spatial, LAST, PLANES, POSITIONS
        )
        x = load_sum(
            x_ptr, bias_ptr, residual_ptr, z_ptr, first, offsets, inside, channel, channels,
            EVEN, PLANES,
        )  # fmt: skip
        middle, rest, squares, centred = moments(x, inside, spatial, EVEN)
        mean = middle + rest
    else:
        mean, squares = moments_of_range(
            x_ptr, bias_ptr, residual_ptr, z_ptr, sample, channel, 0, tl.cdiv(spatial, POSITIONS),
            channels, spatial, LAST, EVEN, PLANES, POSITIONS,
        )  # fmt: skip
        if z_ptr is not None:
            tl.debug_barrier()  # what one thread has written of z, another may read
            x_ptr = z_ptr
    rstd = tl.rsqrt(squares / spatial + eps)
    c = channel + tl.arange(0, PLANES)
    plane = sample * channels + c
    tl.store(mean_ptr + plane, mean, mask=c < channels)
    tl.store(rstd_ptr + plane, rstd, mask=c < channels)
    # Loaded no earlier: what they would take of the registers is what lets two programs share a multiprocessor.
    scale = load_weight(weight_ptr, label, known, 0, c, channels, 2) * rstd
    shift = load_weight(weight_ptr, label, known, 1, c, channels, 2)
    if WHOLE:
        u = centred * scale[:, None] + (shift - rest * scale)[:, None]
        store_tile(y_ptr, first, offsets, inside, activated(u, ELU, HALF), EVEN)
    else:
        tiles = tl.cdiv(spatial, POSITIONS)
        for tile in range(tiles):  # the last tile first: it is what the caches hold
            position = (tiles - 1 - tile) * POSITIONS
            first, offsets, inside = tile_of(
                sample, channel, position, channels, spatial, LAST, PLANES, POSITIONS
            )
            x = load_tile(x_ptr, first, offsets, inside, EVEN, True)
            u = (x - mean[:, None]) * scale[:, None] + shift[:, None]
            store_tile(y_ptr, first, offsets, inside, activated(u, ELU, HALF), EVEN)
    assert_known(known)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistics_kernel(
    x_ptr, bias_ptr, residual_ptr, z_ptr, mean_ptr, squares_ptr,
    splits, length, channels, spatial,
    LAST: tl.constexpr, EVEN: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Moments of parts of planes, ``length`` tiles each: two tensors ``(N, splits, C)``."""
    sample, channel, part = work_item(splits, channels, PLANES)
    tiles = tl.minimum(length, tl.cdiv(spatial, POSITIONS) - part * length)
    mean, squares = moments_of_range(
        x_ptr, bias_ptr, residual_ptr, z_ptr, sample, channel, part * length, tiles,
        channels, spatial, LAST, EVEN, PLANES, POSITIONS,
    )  # fmt: skip
    c = channel + tl.arange(0, PLANES)
    at = (sample * splits + part) * channels + c
    tl.store(mean_ptr + at, mean, mask=c < channels)
    tl.store(squares_ptr + at, squares, mask=c < channels)


@triton.jit(do_not_specialize=UNSPECIALIZED, debug=True)
def apply_kernel(
    x_ptr, labels_ptr, weight_ptr, part_mean_ptr, part_squares_ptr, y_ptr, mean_ptr, rstd_ptr,
    table_rows, label_stride, parts, splits, length, channels, spatial, eps,
    ELU: tl.constexpr, PLUSPLUS: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combines the moments of a plane's parts, then normalises one tile."""
    HALF: tl.constexpr = y_ptr.dtype.element_ty != tl.float32
    COLUMNS: tl.constexpr = 3 if PLUSPLUS else 2
    sample, channel, part = work_item(parts, channels, PLANES)
    first, offsets, inside = tile_of(
        sample, channel, part * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
    )
    x = load_tile(x_ptr, first, offsets, inside, EVEN, True)

    c = channel + tl.arange(0, PLANES)
    label, known = label_of(labels_ptr, label_stride, sample, table_rows)
    gamma = load_weight(weight_ptr, label, known, 0, c, channels, COLUMNS)
    beta = load_weight(weight_ptr, label, known, COLUMNS - 1, c, channels, COLUMNS)
    mean, distance, share = mean_of_parts(
        part_mean_ptr, sample, c, splits, length, channels, spatial, SPLITS
    )
    at, there = of_part(sample, c, splits, channels, SPLITS)
    squares = tl.load(part_squares_ptr + at, mask=there, other=0.0)
    rstd = tl.rsqrt(tl.sum(squares / spatial + share * distance * distance, 1) + eps)
    if part == 0:
        plane = sample * channels + c
        tl.store(mean_ptr + plane, mean, mask=c < channels)
        tl.store(rstd_ptr + plane, rstd, mask=c < channels)
    if PLUSPLUS:
        origin, middle, channel_rstd = channel_statistics(
            part_mean_ptr, sample, splits, length, channels, spatial, SPLITS, BLOCK
        )
        alpha = load_weight(weight_ptr, label, known, 1, c, channels, COLUMNS)
        beta += gamma * alpha * ((mean - origin - middle) * channel_rstd)

    u = (x - mean[:, None]) * (gamma * rstd)[:, None] + beta[:, None]
    store_tile(y_ptr, first, offsets, inside, activated(u, ELU, HALF), EVEN)
    assert_known(known)


# --- launches -------------------------------------------------------------------------------------


def sums_over_parts(splits: int) -> dict[str, int]:
    """Widths of sums over parts and channels: that a batch needs one part or several is all a kernel knows of it."""
    if splits == 1:
        return {"SPLITS": 1, "BLOCK": CHANNEL_BLOCK}
    return {"SPLITS": MAX_SPLITS, "BLOCK": CHANNEL_BLOCK // 4}


def cond_instance_norm_elu(
    x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, eps: float, elu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and the mean and ``1/sqrt(var + eps)`` of every plane, ``(N, C)`` in float32.

    ``x (N, C, *spatial)`` is float32, bfloat16 or float16, contiguous or channels_last; ``labels`` int64
    of length N or 1; ``weight (K, 2C)`` or ``(K, 3C)`` of any floating dtype.
    """
    return normalise(x, (None, None, None), labels, weight, eps, elu)


def add_norm_elu(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    labels: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    elu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``z = x + bias + residual``, and y, mean and rstd of that.

    ``residual`` has the shape and dtype of x; ``bias (C,)`` any floating dtype.
    """
    z = torch.empty_like(x)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else in_layout_of(residual, x)
    return z, *normalise(x, (bias, residual, z), labels, weight, eps, elu)


def normalise(
    x: torch.Tensor,
    into: tuple[torch.Tensor | None, ...],
    labels: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    elu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean and rstd of x; or, with ``into = (bias, residual, z)``, of the sum, which goes to z."""
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
    tile = tile_for("norm", channels, spatial, last, x.dtype)
    with on_device_of(x):
        if in_one_kernel(samples, channels, spatial, tile, plusplus):
            norm_kernel[(samples * triton.cdiv(channels, tile.planes),)](
                x, *into, labels, weight, y, mean, rstd, *table, channels, spatial, eps,
                ELU=elu, WHOLE=tile.positions >= spatial,
                **constants_of(tile, channels, spatial, last),
            )  # fmt: skip
            return y, mean, rstd
        tile = tile_for("part", channels, spatial, last, x.dtype)
        constants = constants_of(tile, channels, spatial, last)
        programs = samples * triton.cdiv(channels, tile.planes)
        splits, length = splits_of(programs, spatial, tile.positions)
        part_mean, part_squares = mean.new_empty(2, samples, splits, channels).unbind()
        statistics_kernel[(programs * splits,)](
            x, *into, part_mean, part_squares, splits, length, channels, spatial, **constants
        )
        parts = triton.cdiv(spatial, tile.positions)
        apply_kernel[(programs * parts,)](
            x if into[2] is None else into[2], labels, weight, part_mean, part_squares,
            y, mean, rstd, *table, parts, splits, length * tile.positions, channels, spatial, eps,
            ELU=elu, PLUSPLUS=plusplus, **sums_over_parts(splits), **constants,
        )  # fmt: skip
    return y, mean, rstd
