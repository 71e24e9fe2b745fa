"""``solver_step_`` in Triton: one pass that reads x, the score and the memory, draws the noise, writes both back.

The arithmetic is that of ``csrc/common/solver_step.h``, the noise that of ``philox.py``.
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
def step_at(x_ptrs, score_ptrs, previous_ptrs, z, mask, a, b, c, d, e):
    """The update of the elements at these places."""
    x = tl.load(x_ptrs, mask=mask)
    score = tl.load(score_ptrs, mask=mask).to(tl.float32)
    y = a * x + b * score
    if previous_ptrs is not None:
        y += e * tl.load(previous_ptrs, mask=mask)
        tl.store(previous_ptrs, x + d * score, mask=mask)
    tl.store(x_ptrs, y + c * z, mask=mask)


@triton.jit
def step_element(
    x_ptr, score_ptr, previous_ptr, z, sample, channel, position, channels, spatial, mask,
    a, b, c, d, e, X_LAST: tl.constexpr, SCORE_LAST: tl.constexpr,
):  # fmt: skip
    """One element a lane, wherever it lies."""
    x_at = offset_of(sample, channel, position, channels, spatial, X_LAST)
    score_at = offset_of(sample, channel, position, channels, spatial, SCORE_LAST)
    inside = mask & (channel < channels)
    if previous_ptr is not None:
        step_at(x_ptr + x_at, score_ptr + score_at, previous_ptr + x_at, z, inside, a, b, c, d, e)
    else:
        step_at(x_ptr + x_at, score_ptr + score_at, None, z, inside, a, b, c, d, e)


@triton.jit(
    do_not_specialize=[
        "total_groups", "groups", "channels", "spatial",
        "rows", "level", "seed_lo", "seed_hi", "step", "sample_offset",
    ],
    do_not_specialize_on_alignment=["table_ptr", "level_ptr", "step_ptr"],
)  # fmt: skip
def solver_step_kernel(
    x_ptr,
    score_ptr,
    previous_ptr,
    table_ptr,
    total_groups,
    groups,
    channels,
    spatial,
    rows,
    level,
    level_ptr,
    seed_lo,
    seed_hi,
    step,
    step_ptr,
    sample_offset,
    NOISY: tl.constexpr,
    VECTOR: tl.constexpr,
    X_LAST: tl.constexpr,
    SCORE_LAST: tl.constexpr,
    CHANNEL_MINOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of four elements a lane."""
    _, mask, sample, group = group_index(total_groups, groups, BLOCK, WIDE)
    channel, position = first_place(group, channels, spatial, CHANNEL_MINOR)
    if level_ptr is not None:
        level = tl.load(level_ptr).to(tl.int32)
    row = table_ptr + 5 * tl.minimum(tl.maximum(level, 0), rows - 1)
    a = tl.load(row)
    b = tl.load(row + 1)
    c = tl.load(row + 2)
    d = tl.load(row + 3)
    e = tl.load(row + 4)
    if NOISY:
        z0, z1, z2, z3 = sampler_normals(
            seed_lo, seed_hi, step, step_ptr, sample, sample_offset,
            (channel * spatial + position) // 4,
        )  # fmt: skip
    else:
        z0 = tl.zeros([BLOCK], tl.float32)
        z1 = z0
        z2 = z0
        z3 = z0
    if VECTOR:
        lanes, lane_mask = vector_lanes(total_groups, BLOCK, WIDE)
        z = interleave4(z0, z1, z2, z3)
        if previous_ptr is not None:
            step_at(
                x_ptr + lanes, score_ptr + lanes, previous_ptr + lanes, z, lane_mask, a, b, c, d, e
            )
        else:
            step_at(x_ptr + lanes, score_ptr + lanes, None, z, lane_mask, a, b, c, d, e)
    else:
        step_element(
            x_ptr, score_ptr, previous_ptr, z0, sample, channel, position, channels, spatial, mask,
            a, b, c, d, e, X_LAST, SCORE_LAST,
        )  # fmt: skip
        channel, position = next_place(channel, position, spatial)
        step_element(
            x_ptr, score_ptr, previous_ptr, z1, sample, channel, position, channels, spatial, mask,
            a, b, c, d, e, X_LAST, SCORE_LAST,
        )  # fmt: skip
        channel, position = next_place(channel, position, spatial)
        step_element(
            x_ptr, score_ptr, previous_ptr, z2, sample, channel, position, channels, spatial, mask,
            a, b, c, d, e, X_LAST, SCORE_LAST,
        )  # fmt: skip
        channel, position = next_place(channel, position, spatial)
        step_element(
            x_ptr, score_ptr, previous_ptr, z3, sample, channel, position, channels, spatial, mask,
            a, b, c, d, e, X_LAST, SCORE_LAST,
        )  # fmt: skip


def solver_step_(
    x: torch.Tensor,
    score: torch.Tensor,
    previous: torch.Tensor | None,
    table: torch.Tensor,
    level: int,
    level_tensor: torch.Tensor | None,
    noisy: bool,
    seed: int,
    step: int,
    step_tensor: torch.Tensor | None,
    sample_offset: int,
) -> None:
    """``x <- a x + b score + e previous + c z``, ``previous <- x + d score``: see ``ops.solver_step_``.

    ``x`` and ``previous`` are float32, of one layout, contiguous or channels_last; ``score`` is either, of any floating
    type. ``table`` is float32 ``(K, 5)``, contiguous. ``level_tensor`` and ``step_tensor``, int64 of one element on the
    device of x, replace the numbers and are read by the kernel.
    """
    if x.numel() == 0:
        return
    last = [not t.is_contiguous() for t in (x, score)]
    flat = not any(last)
    samples, channels, spatial = canonical_sizes(x, flat)
    grid, total, groups, wide = launch_shape(samples, channels, spatial)
    with on_device_of(x):
        solver_step_kernel[grid](
            x,
            score,
            previous,
            table,
            total,
            groups,
            channels,
            spatial,
            len(table),
            int(level),
            level_tensor,
            int32(seed),
            int32(seed >> 32),
            int32(step),
            step_tensor,
            int32(sample_offset),
            NOISY=noisy,
            VECTOR=flat and spatial % 4 == 0,
            X_LAST=last[0],
            SCORE_LAST=last[1],
            CHANNEL_MINOR=last[0] and spatial % 4 == 0,
            WIDE=wide,
            BLOCK=GROUPS_PER_PROGRAM,
            enable_fp_fusion=True,
        )
