"""``langevin_step_`` in Triton: one pass that reads x and the score, draws the noise, writes x.

The arithmetic is that of ``csrc/common/langevin_step.h``, the noise that of ``philox.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .addressing import offset_of, on_device_of
from .philox import (
    GROUPS_PER_PROGRAM,
    canonical_sizes,
    first_place,
    group_index,
    int32,
    interleave4,
    launch_shape,
    next_place,
    sampler_normals,
    vector_lanes,
)


@triton.jit
def updated(x, score, z, step_size, noise_scale, clip):
    """The new x, clamped; NaN stays NaN, and an infinite clip is none."""
    y = x + step_size * score.to(tl.float32) + noise_scale * z.to(tl.float32)
    y = tl.where(y < -clip, -clip, y)
    return tl.where(y > clip, clip, y)


@triton.jit
def update_element(
    x_ptr,
    score_ptr,
    noise_ptr,
    z,
    sample,
    channel,
    position,
    channels,
    spatial,
    step_size,
    noise_scale,
    clip,
    mask,
    X_LAST: tl.constexpr,
    SCORE_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
):
    """One element a lane, wherever it lies in each of the tensors."""
    inside = mask & (channel < channels)
    x_ptrs = x_ptr + offset_of(sample, channel, position, channels, spatial, X_LAST)
    score_at = offset_of(sample, channel, position, channels, spatial, SCORE_LAST)
    x = tl.load(x_ptrs, mask=inside)
    score = tl.load(score_ptr + score_at, mask=inside)
    if noise_ptr is not None:
        noise_at = offset_of(sample, channel, position, channels, spatial, NOISE_LAST)
        z = tl.load(noise_ptr + noise_at, mask=inside)
    tl.store(x_ptrs, updated(x, score, z, step_size, noise_scale, clip), mask=inside)


@triton.jit(
    do_not_specialize=[
        "total_groups", "groups", "channels", "spatial",
        "step_size", "seed_lo", "seed_hi", "step", "sample_offset", "clip",
    ],
    # One number each, often a slice of a table: a second variant for those at multiples of 16 bytes would gain nothing.
    do_not_specialize_on_alignment=["step_size_ptr", "step_ptr"],
)  # fmt: skip
def langevin_step_kernel(
    x_ptr,
    score_ptr,
    noise_ptr,
    total_groups,
    groups,
    channels,
    spatial,
    step_size,
    step_size_ptr,
    seed_lo,
    seed_hi,
    step,
    step_ptr,
    sample_offset,
    clip,
    VECTOR: tl.constexpr,
    X_LAST: tl.constexpr,
    SCORE_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
    CHANNEL_MINOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of four elements a lane."""
    _, mask, sample, group = group_index(total_groups, groups, BLOCK, WIDE)
    channel, position = first_place(group, channels, spatial, CHANNEL_MINOR)
    if step_size_ptr is not None:
        step_size = tl.load(step_size_ptr)
    noise_scale = tl.sqrt_rn(step_size * 2.0)
    if noise_ptr is None:
        z0, z1, z2, z3 = sampler_normals(
            seed_lo, seed_hi, step, step_ptr, sample, sample_offset,
            (channel * spatial + position) // 4,
        )  # fmt: skip
    else:
        z0, z1, z2, z3 = 0.0, 0.0, 0.0, 0.0
    if VECTOR:
        lanes, lane_mask = vector_lanes(total_groups, BLOCK, WIDE)
        x = tl.load(x_ptr + lanes, mask=lane_mask)
        score = tl.load(score_ptr + lanes, mask=lane_mask)
        if noise_ptr is not None:
            z = tl.load(noise_ptr + lanes, mask=lane_mask)
        else:
            z = interleave4(z0, z1, z2, z3)
        y = updated(x, score, z, step_size, noise_scale, clip)
        tl.store(x_ptr + lanes, y, mask=lane_mask)
    else:
        update_element(
            x_ptr, score_ptr, noise_ptr, z0, sample, channel, position, channels, spatial,
            step_size, noise_scale, clip, mask, X_LAST, SCORE_LAST, NOISE_LAST,
        )  # fmt: skip
        channel, position = next_place(channel, position, spatial)
        update_element(
            x_ptr, score_ptr, noise_ptr, z1, sample, channel, position, channels, spatial,
            step_size, noise_scale, clip, mask, X_LAST, SCORE_LAST, NOISE_LAST,
        )  # fmt: skip
        channel, position = next_place(channel, position, spatial)
        update_element(
            x_ptr, score_ptr, noise_ptr, z2, sample, channel, position, channels, spatial,
            step_size, noise_scale, clip, mask, X_LAST, SCORE_LAST, NOISE_LAST,
        )  # fmt: skip
        channel, position = next_place(channel, position, spatial)
        update_element(
            x_ptr, score_ptr, noise_ptr, z3, sample, channel, position, channels, spatial,
            step_size, noise_scale, clip, mask, X_LAST, SCORE_LAST, NOISE_LAST,
        )  # fmt: skip


def langevin_step_(
    x: torch.Tensor,
    score: torch.Tensor,
    noise: torch.Tensor | None,
    step_size: float,
    step_size_tensor: torch.Tensor | None,
    seed: int,
    step: int,
    step_tensor: torch.Tensor | None,
    sample_offset: int,
    clip: float | None,
) -> None:
    """``x += step_size * score + sqrt(2 step_size) * z``, then clamped to [-clip, clip] if given.

    ``x`` is float32; ``score`` and ``noise`` are of x's shape and of any floating type. Each is
    contiguous or channels_last, its first axis the samples. ``seed`` is the signed form of the
    64-bit seed. ``step_size_tensor`` (float32) and ``step_tensor`` (int64), of one element on the
    device of x, replace the numbers and are read by the kernel, so that one captured CUDA graph
    serves every step.
    """
    if x.numel() == 0:
        return
    last = [t is not None and not t.is_contiguous() for t in (x, score, noise)]
    flat = not any(last)
    samples, channels, spatial = canonical_sizes(x, flat)
    grid, total, groups, wide = launch_shape(samples, channels, spatial)
    with on_device_of(x):
        langevin_step_kernel[grid](
            x,
            score,
            noise,
            total,
            groups,
            channels,
            spatial,
            float(step_size),
            step_size_tensor,
            int32(seed),
            int32(seed >> 32),
            int32(step),
            step_tensor,
            int32(sample_offset),
            float("inf") if clip is None else float(clip),
            VECTOR=flat and spatial % 4 == 0,
            X_LAST=last[0],
            SCORE_LAST=last[1],
            NOISE_LAST=last[2],
            CHANNEL_MINOR=last[0] and spatial % 4 == 0,
            WIDE=wide,
            BLOCK=GROUPS_PER_PROGRAM,
            enable_fp_fusion=True,
        )
