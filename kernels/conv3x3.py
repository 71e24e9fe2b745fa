"""A 3x3 convolution as an implicit matrix product in Triton: channels_last, dilated, 16 bits with sums in float32.

A program computes ``[M, N]`` positions of one sample by outputs; channels are summed outside, the nine taps inside, so
that a tap's rows come from the caches. Bias and residual are added before the one rounding, and the planes' moments
leave with the result, so that the norm that follows need not read it for them. With ``parts`` the input is normalised
and activated on its way into the product: right where few programs run, as at batch 1; in large batches nine taps would
compute nine exponentials of every element.

One tile for a shape whatever the batch: sample i keeps its bits. Nothing here has been timed on a GPU, so nothing takes
it by default (``ops/algorithms.py``); ``conv_algo="gemm"`` asks for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tuned
from .addressing import in_layout_of, on_device_of
from .cond_instance_norm_elu import activated, assert_known, label_of, load_weight, mean_of_parts
from .planes import of_part

UNSPECIALIZED = ["table_rows", "label_stride", "splits", "length", "eps", "dilation"]


@triton.jit
def affine_of(
    mean_ptr, squares_ptr, table_ptr, label, known, sample, c, splits, length, channels, spatial,
    eps, SPLITS: tl.constexpr,
):  # fmt: skip
    """The norm of some channels of a sample, from the moments of parts: mean, scale and shift."""
    mean, distance, share = mean_of_parts(
        mean_ptr, sample, c, splits, length, channels, spatial, SPLITS
    )
    at, there = of_part(sample, c, splits, channels, SPLITS)
    squares = tl.load(squares_ptr + at, mask=there, other=0.0)
    rstd = tl.rsqrt(tl.sum(squares / spatial + share * distance * distance, 1) + eps)
    scale = load_weight(table_ptr, label, known, 0, c, channels, 2) * rstd
    return mean, scale, load_weight(table_ptr, label, known, 1, c, channels, 2)


@triton.jit
def store_moments(mean_ptr, squares_ptr, value, inside, count, at, there):
    """Mean and squares about it of every column of a tile; the mean's error is taken out as in ``moments``."""
    mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
    centred = tl.where(inside, value - mean[None, :], 0.0)
    rest = tl.sum(centred, 0) / count
    tl.store(mean_ptr + at, mean + rest, mask=there)
    squares = tl.sum(centred * centred, 0) - rest * rest * count
    tl.store(squares_ptr + at, squares, mask=there)


@triton.jit(do_not_specialize=UNSPECIALIZED, debug=True)
def conv3x3_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, out_mean_ptr, out_squares_ptr,
    labels_ptr, table_ptr, mean_ptr, squares_ptr, table_rows, label_stride, splits, length, eps,
    height, width, channels, outputs, dilation,
    ELU: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of the result; ``weight (O, 3, 3, C)``."""
    spatial = height * width
    blocks, tiles = tl.cdiv(outputs, N), tl.cdiv(spatial, M)
    rest = tl.program_id(0) // blocks
    sample = (rest // tiles).to(tl.int64)
    tile = rest - (rest // tiles) * tiles
    position = tile * M + tl.arange(0, M)
    row = position // width
    column = position - row * width
    o = (tl.program_id(0) - rest * blocks) * N + tl.arange(0, N)
    known = True
    if mean_ptr is not None:
        label, known = label_of(labels_ptr, label_stride, sample, table_rows)

    total = tl.zeros([M, N], tl.float32)
    for step in range(9 * tl.cdiv(channels, K)):
        c = step // 9 * K + tl.arange(0, K)
        tap = step % 9
        down, right = (tap // 3 - 1) * dilation, (tap % 3 - 1) * dilation
        inside = (row + down >= 0) & (row + down < height) & (position < spatial)
        inside = inside & (column + right >= 0) & (column + right < width)
        inside = inside[:, None] & (c < channels)[None, :]
        at = (position + down * width + right)[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + sample * spatial * channels + at, mask=inside, other=0.0)
        if mean_ptr is not None:
            mean, scale, shift = affine_of(
                mean_ptr, squares_ptr, table_ptr, label, known, sample, c, splits, length,
                channels, spatial, eps, SPLITS,
            )  # fmt: skip
            u = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
            x = tl.where(inside, activated(u, ELU, True), 0.0).to(x.dtype)
        elif ELU:
            x = activated(x.to(tl.float32), True, True).to(x.dtype)
        from_weight = (o * 9)[None, :] * channels + tap * channels + c[:, None]
        there = (c < channels)[:, None] & (o < outputs)[None, :]
        total = tl.dot(x, tl.load(weight_ptr + from_weight, mask=there, other=0.0), total)

    inside = (position < spatial)[:, None] & (o < outputs)[None, :]
    at = sample * spatial * outputs + position[:, None] * outputs + o[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o, mask=o < outputs, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=inside)
    if out_mean_ptr is not None:
        count = tl.minimum(spatial - tile * M, M)
        store_moments(
            out_mean_ptr, out_squares_ptr, y.to(tl.float32), inside, count,
            (sample * tiles + tile) * outputs + o, o < outputs,
        )  # fmt: skip
    if mean_ptr is not None:
        assert_known(known)


# --- sizes and launches -----------------------------------------------------------------------------


class ConvTile(NamedTuple):
    """Positions, outputs and channels of a product; warps and stages of the pipeline that loads them."""

    positions: int
    outputs: int
    channels: int
    warps: int
    stages: int


LARGE, SMALL = ConvTile(128, 128, 64, 8, 4), ConvTile(64, 64, 64, 4, 4)
AFTER_NORM = ConvTile(
    64, 64, 32, 8, 4
)  # with 64 channels at a time the norm's numbers spill on some chips
LEAST = 16  # of each side of a product
MOST_POSITIONS = 2**31  # elements of a sample: offsets within one are of 32 bits


class Parts(NamedTuple):
    """Moments of the parts of planes, ``(N, splits, C)`` each, ``length`` positions in each but the last."""

    mean: torch.Tensor
    squares: torch.Tensor
    length: int


class Norm(NamedTuple):
    """The plain norm before the activation: moments of the input, labels, the table ``(K, 2C)`` and epsilon."""

    parts: Parts
    labels: torch.Tensor
    table: torch.Tensor
    eps: float


def tile_for(channels: int, outputs: int, spatial: int, dtype: torch.dtype, norm: bool) -> ConvTile:
    """The tile of a shape: measured, or by its size; never by the batch."""
    name = "norm conv" if norm else "conv"
    measured = tuned.tile(tuned.key(f"{name} to {outputs}", channels, spatial, True, dtype))
    if measured is not None:
        return ConvTile(*measured)
    tile = SMALL if spatial <= 1024 or outputs <= 64 else LARGE
    tile = AFTER_NORM if norm else tile
    fit = [max(LEAST, triton.next_power_of_2(n)) for n in (spatial, outputs, channels)]
    return ConvTile(*map(min, tile[:3], fit), *tile[3:])


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dilation: int,
    elu: bool,
    norm: Norm | None = None,
    statistics: bool = False,
) -> tuple[torch.Tensor, Parts | None]:
    """``conv3x3(elu(norm(x))) + bias + residual``, and the moments of its planes by parts if asked for.

    ``x (N, C, H, W)`` is float16 or bfloat16 and channels_last; ``weight (O, C, 3, 3)`` and ``residual`` of its dtype.
    """
    samples, channels, height, width = x.shape
    outputs, spatial = weight.shape[0], height * width
    y = x.new_empty(samples, outputs, height, width).contiguous(memory_format=torch.channels_last)
    tile = tile_for(channels, outputs, spatial, x.dtype, norm is not None)
    tiles = triton.cdiv(spatial, tile.positions)
    moments = (None, None)
    if statistics:
        moments = x.new_empty(2, samples, tiles, outputs, dtype=torch.float32).unbind()
    parts = Parts(*moments, tile.positions) if statistics else None
    if y.numel() == 0:
        return y, parts
    if residual is not None:
        residual = in_layout_of(residual, y)
    # (O, 3, 3, C) in memory, which is what channels_last means.
    weight = weight.contiguous(memory_format=torch.channels_last)
    before, sizes, splits = (None,) * 4, (0, 0, 0, 0, 0.0), 1
    if norm is not None:
        table = norm.table.contiguous()
        before = (norm.labels, table, norm.parts.mean, norm.parts.squares)
        stride = norm.labels.stride(0) if len(norm.labels) > 1 else 0
        splits = norm.parts.mean.shape[1]
        sizes = (table.shape[0], stride, splits, norm.parts.length, norm.eps)
    with on_device_of(x):
        conv3x3_kernel[(samples * tiles * triton.cdiv(outputs, tile.outputs),)](
            x, weight, None if bias is None else bias.contiguous(), residual, y, *moments,
            *before, *sizes, height, width, channels, outputs, dilation,
            ELU=elu, SPLITS=triton.next_power_of_2(splits),
            M=tile.positions, N=tile.outputs, K=tile.channels,
            # AMD's chips have 64 KiB to hold tiles in.
            num_warps=tile.warps, num_stages=2 if torch.version.hip else tile.stages,
            enable_fp_fusion=True, sanitize_overflow=False,
        )  # fmt: skip
    return y, parts


def conv_direct(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dilation: int,
    elu: bool,
) -> torch.Tensor:
    """The operator: :func:`convolve` without a norm; 3x3 weights alone."""
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"the weights must be of 3x3 pixels, got {tuple(weight.shape)}")
    return convolve(x, weight, bias, residual, dilation, elu)[0]
