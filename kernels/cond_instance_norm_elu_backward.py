"""The gradients of ``cond_instance_norm_elu`` in Triton, from x and the saved mean and 1/std; no atomics.

The same ways as forward (``cond_instance_norm_elu.py``), with the sums of ``grad_u`` and ``grad_u * xhat`` in the place
of the moments. Samples write rows of the weight's gradient, ``weight_gradient_kernel`` adds them up in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .addressing import in_layout_of, on_device_of
from .cond_instance_norm_elu import (
    CHANNEL_BLOCK,
    UNSPECIALIZED,
    channel_statistics,
    label_of,
    load_weight,
    sums_over_parts,
)
from .planes import (
    constants_of,
    in_one_kernel,
    load_tile,
    of_part,
    splits_of,
    store_tile,
    tile_for,
    tile_of,
    work_item,
)


@triton.jit
def gradient_of_u(grad_y, u, ELU: tl.constexpr):
    """The gradient before the activation."""
    if ELU:
        return tl.where(u > 0.0, grad_y, grad_y * tl.exp(u))
    return grad_y


@triton.jit
def saved_statistics(mean_ptr, rstd_ptr, sample, c, channels):
    """Of planes: the saved mean and 1/std."""
    plane = sample * channels + c
    mean = tl.load(mean_ptr + plane, mask=c < channels, other=0.0)
    return mean, tl.load(rstd_ptr + plane, mask=c < channels, other=0.0)


@triton.jit
def sum_of_parts(ptr, sample, c, splits, channels, SPLITS: tl.constexpr):
    """Sums of planes from those of their parts, in a fixed order."""
    at, there = of_part(sample, c, splits, channels, SPLITS)
    return tl.sum(tl.load(ptr + at, mask=there, other=0.0), 1)


@triton.jit
def xhat_and_gradient(x, grad_y, mean, rstd, gamma, shift, ELU: tl.constexpr):
    """Of a tile: xhat, and the gradient before the activation."""
    xhat = (x - mean[:, None]) * rstd[:, None]
    return xhat, gradient_of_u(grad_y, xhat * gamma[:, None] + shift[:, None], ELU)


@triton.jit
def gradient_sums_of_range(
    grad_y_ptr, x_ptr, mean, rstd, gamma, shift,
    sample, channel, first_tile, tiles, channels, spatial,
    ELU: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The sums of grad_u and of grad_u * xhat over consecutive tiles."""
    grad_beta = tl.zeros([PLANES], tl.float32)
    grad_gamma = tl.zeros([PLANES], tl.float32)
    for tile in range(first_tile, first_tile + tiles):
        first, offsets, inside = tile_of(
            sample, channel, tile * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
        )
        x = load_tile(x_ptr, first, offsets, inside, EVEN)
        grad_y = load_tile(grad_y_ptr, first, offsets, inside, EVEN)
        xhat, grad_u = xhat_and_gradient(x, grad_y, mean, rstd, gamma, shift, ELU)
        grad_beta += tl.sum(grad_u, 1)
        grad_gamma += tl.sum(grad_u * xhat, 1)
    return grad_beta, grad_gamma


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    grad_y_ptr, x_ptr, labels_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, grad_rows_ptr,
    table_rows, label_stride, channels, spatial,
    ELU: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The plain norm's gradients, all of some planes in one program; WHOLE: in registers."""
    sample, channel, _ = work_item(1, channels, PLANES)
    label, known = label_of(labels_ptr, label_stride, sample, table_rows)
    if WHOLE:
        first, offsets, inside = tile_of(
            sample, channel, 0, channels, spatial, LAST, PLANES, POSITIONS
        )
        x = load_tile(x_ptr, first, offsets, inside, EVEN)
        grad_y = load_tile(grad_y_ptr, first, offsets, inside, EVEN)
    c = channel + tl.arange(0, PLANES)
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, sample, c, channels)
    gamma = load_weight(weight_ptr, label, known, 0, c, channels, 2)
    beta = load_weight(weight_ptr, label, known, 1, c, channels, 2)
    if WHOLE:
        xhat, grad_u = xhat_and_gradient(x, grad_y, mean, rstd, gamma, beta, ELU)
        grad_beta, grad_gamma = tl.sum(grad_u, 1), tl.sum(grad_u * xhat, 1)
    else:
        grad_beta, grad_gamma = gradient_sums_of_range(
            grad_y_ptr, x_ptr, mean, rstd, gamma, beta,
            sample, channel, 0, tl.cdiv(spatial, POSITIONS), channels, spatial,
            ELU, LAST, EVEN, PLANES, POSITIONS,
        )  # fmt: skip
    grad_row_ptr = grad_rows_ptr + sample * (2 * channels)
    tl.store(grad_row_ptr + c, grad_gamma, mask=c < channels)
    tl.store(grad_row_ptr + channels + c, grad_beta, mask=c < channels)

    scale = (gamma * rstd)[:, None]
    along_one, along_xhat = (grad_beta / spatial)[:, None], (grad_gamma / spatial)[:, None]
    if WHOLE:
        grad_x = (grad_u - along_one - xhat * along_xhat) * scale
        store_tile(grad_x_ptr, first, offsets, inside, grad_x, EVEN)
    else:
        tiles = tl.cdiv(spatial, POSITIONS)
        for tile in range(tiles):  # the last tile first: it is what the caches hold
            position = (tiles - 1 - tile) * POSITIONS
            first, offsets, inside = tile_of(
                sample, channel, position, channels, spatial, LAST, PLANES, POSITIONS
            )
            x = load_tile(x_ptr, first, offsets, inside, EVEN, True)
            grad_y = load_tile(grad_y_ptr, first, offsets, inside, EVEN, True)
            xhat, grad_u = xhat_and_gradient(x, grad_y, mean, rstd, gamma, beta, ELU)
            grad_x = (grad_u - along_one - xhat * along_xhat) * scale
            store_tile(grad_x_ptr, first, offsets, inside, grad_x, EVEN)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_sums_kernel(
    grad_y_ptr, x_ptr, labels_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_beta_ptr, grad_gamma_ptr,
    table_rows, label_stride, splits, length, channels, spatial,
    ELU: tl.constexpr, PLUSPLUS: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of grad_u and grad_u * xhat over parts of planes: two tensors ``(N, splits, C)``."""
    COLUMNS: tl.constexpr = 3 if PLUSPLUS else 2
    sample, channel, part = work_item(splits, channels, PLANES)
    c = channel + tl.arange(0, PLANES)
    label, known = label_of(labels_ptr, label_stride, sample, table_rows)
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, sample, c, channels)
    gamma = load_weight(weight_ptr, label, known, 0, c, channels, COLUMNS)
    shift = load_weight(weight_ptr, label, known, COLUMNS - 1, c, channels, COLUMNS)
    if PLUSPLUS:
        origin, middle, channel_rstd = channel_statistics(
            mean_ptr, sample, 1, spatial, channels, spatial, 1, BLOCK
        )
        alpha = load_weight(weight_ptr, label, known, 1, c, channels, COLUMNS)
        shift += gamma * alpha * ((mean - origin - middle) * channel_rstd)
    tiles = tl.minimum(length, tl.cdiv(spatial, POSITIONS) - part * length)
    grad_beta, grad_gamma = gradient_sums_of_range(
        grad_y_ptr, x_ptr, mean, rstd, gamma, shift,
        sample, channel, part * length, tiles, channels, spatial,
        ELU, LAST, EVEN, PLANES, POSITIONS,
    )  # fmt: skip
    at = (sample * splits + part) * channels + c
    tl.store(grad_beta_ptr + at, grad_beta, mask=c < channels)
    tl.store(grad_gamma_ptr + at, grad_gamma, mask=c < channels)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_apply_kernel(
    grad_y_ptr, x_ptr, labels_ptr, weight_ptr, mean_ptr, rstd_ptr, part_beta_ptr, part_gamma_ptr,
    grad_x_ptr, grad_rows_ptr,
    table_rows, label_stride, parts, splits, channels, spatial,
    ELU: tl.constexpr, PLUSPLUS: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combines the sums of a plane's parts, then writes grad_x of one tile."""
    COLUMNS: tl.constexpr = 3 if PLUSPLUS else 2
    sample, channel, part = work_item(parts, channels, PLANES)
    first, offsets, inside = tile_of(
        sample, channel, part * POSITIONS, channels, spatial, LAST, PLANES, POSITIONS
    )
    x = load_tile(x_ptr, first, offsets, inside, EVEN, True)
    grad_y = load_tile(grad_y_ptr, first, offsets, inside, EVEN, True)

    c = channel + tl.arange(0, PLANES)
    label, known = label_of(labels_ptr, label_stride, sample, table_rows)
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, sample, c, channels)
    gamma = load_weight(weight_ptr, label, known, 0, c, channels, COLUMNS)
    shift = load_weight(weight_ptr, label, known, COLUMNS - 1, c, channels, COLUMNS)
    grad_beta = sum_of_parts(part_beta_ptr, sample, c, splits, channels, SPLITS)
    grad_gamma = sum_of_parts(part_gamma_ptr, sample, c, splits, channels, SPLITS)

    constant = -gamma * rstd * (grad_beta / spatial)  # what every position of a plane gets
    grad_weight_gamma = grad_gamma
    grad_row_ptr = grad_rows_ptr + sample * (COLUMNS * channels)
    if PLUSPLUS:
        origin, middle, channel_rstd = channel_statistics(
            mean_ptr, sample, 1, spatial, channels, spatial, 1, BLOCK
        )
        alpha = load_weight(weight_ptr, label, known, 1, c, channels, COLUMNS)
        m = (mean - origin - middle) * channel_rstd
        shift += gamma * alpha * m
        # Back through m, which has every channel mean of the sample in it.
        sums = tl.zeros([BLOCK], tl.float32)
        along_m = tl.zeros([BLOCK], tl.float32)
        for block in range(0, channels, BLOCK):
            b = block + tl.arange(0, BLOCK)
            mean_b, _ = saved_statistics(mean_ptr, rstd_ptr, sample, b, channels)
            grad_m = sum_of_parts(part_beta_ptr, sample, b, splits, channels, SPLITS)
            grad_m *= load_weight(weight_ptr, label, known, 0, b, channels, COLUMNS)
            grad_m *= load_weight(weight_ptr, label, known, 1, b, channels, COLUMNS)
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
        beta_ptr = grad_row_ptr + (COLUMNS - 1) * channels
        tl.store(beta_ptr + c, grad_beta, mask=c < channels)

    xhat, grad_u = xhat_and_gradient(x, grad_y, mean, rstd, gamma, shift, ELU)
    along_xhat = (grad_gamma / spatial)[:, None]
    grad_x = (grad_u - xhat * along_xhat) * (gamma * rstd)[:, None] + constant[:, None]
    store_tile(grad_x_ptr, first, offsets, inside, grad_x, EVEN)


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
    tile = tile_for("gradient", channels, spatial, last, x.dtype)
    with on_device_of(x):
        if in_one_kernel(samples, channels, spatial, tile, plusplus):
            gradient_kernel[(samples * triton.cdiv(channels, tile.planes),)](
                *inputs, grad_x, grad_rows, *table, channels, spatial,
                ELU=elu, WHOLE=tile.positions >= spatial,
                **constants_of(tile, channels, spatial, last),
            )  # fmt: skip
        else:
            tile = tile_for("part", channels, spatial, last, x.dtype)
            constants = constants_of(tile, channels, spatial, last)
            programs = samples * triton.cdiv(channels, tile.planes)
            splits, length = splits_of(programs, spatial, tile.positions)
            part_beta, part_gamma = mean.new_empty(2, samples, splits, channels).unbind()
            gradient_sums_kernel[(programs * splits,)](
                *inputs, part_beta, part_gamma, *table, splits, length, channels, spatial,
                ELU=elu, PLUSPLUS=plusplus, BLOCK=CHANNEL_BLOCK, **constants,
            )  # fmt: skip
            parts = triton.cdiv(spatial, tile.positions)
            gradient_apply_kernel[(programs * parts,)](
                *inputs, part_beta, part_gamma, grad_x, grad_rows, *table,
                parts, splits, channels, spatial,
                ELU=elu, PLUSPLUS=plusplus, **sums_over_parts(splits), **constants,
            )  # fmt: skip
        grad_weight = torch.empty_like(weight)
        width, columns = weight.shape[1], 64
        weight_gradient_kernel[(weight.shape[0], triton.cdiv(width, columns))](
            grad_rows, labels, grad_weight, samples, table[1], width,
            SAMPLES=32, COLUMNS=columns, num_warps=2,
            enable_fp_fusion=True, sanitize_overflow=False,
        )  # fmt: skip
    return grad_x, grad_weight
