"""The noise stream in Triton: words, uniforms and normals for other kernels, and ``philox_``.

The counters and the map from words to numbers are those of ``csrc/common/philox.h``, with the same
polynomials: words are equal bit for bit, and normals are within 1.2e-6 of their float64 values.
Only portable Triton is used (no PTX, no libdevice): the same source serves CUDA and ROCm.

Every integer argument is in ``do_not_specialize``, and seeds and steps are passed as int32, so that
no batch size, seed or step compiles a kernel anew.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .addressing import offset_of, on_device_of

GROUPS_PER_PROGRAM = 128  # groups of four elements: one a thread with the default four warps
INT32_ELEMENTS = 2**31 - 4 * GROUPS_PER_PROGRAM  # from here on indices are 64-bit


@triton.jit
def philox_words(seed_lo, seed_hi, group, sample, step, stream):
    """Four uint32 words of the counter (group, sample, step, stream) under a seed in two halves."""
    lo = seed_lo.to(tl.uint32, bitcast=True).to(tl.uint64)
    hi = seed_hi.to(tl.uint32, bitcast=True).to(tl.uint64)
    counter = group.to(tl.uint32)
    zero = counter ^ counter  # makes blocks of the scalars
    return tl.philox((hi << 32) | lo, counter, zero + sample, zero + step, zero + stream)


@triton.jit
def _odd_numerator(word):
    """2k + 1 for the word's top 23 bits k; u is 2^-24 of it. Below 2^24: exact in float32."""
    return ((word >> 8) | 1).to(tl.int32, bitcast=True)


@triton.jit
def uniform_of(word):
    """The uniform u = ((word >> 9) + 0.5) * 2^-23: exact, never 0, never 1."""
    return _odd_numerator(word).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _ln(x):
    """Natural logarithm of x = 2^e (1 + f) > 0, with 1 + f in [sqrt(1/2), sqrt(2)) and f exact."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    n = e.to(tl.float32)
    p = f * 8.91787798e-2 - 1.43501947e-1
    p = p * f + 1.48769550e-1
    p = p * f - 1.65656353e-1
    p = p * f + 1.99653988e-1
    p = p * f - 2.50017469e-1
    p = p * f + 3.33338580e-1
    square = f * f
    tail = p * (f * square) + n * -2.12194440e-4
    return n * 0.693359375 + (f + (tail - 0.5 * square))


@triton.jit
def _box_muller(radius_word, angle_word):
    """(r cos t, r sin t), r = sqrt(-2 ln u0), t = 2 pi u1, by an exact reduction to a quadrant."""
    r = tl.sqrt_rn(_ln(uniform_of(radius_word)) * -2.0)
    odd = _odd_numerator(angle_word)
    q = (odd + 0x200000) >> 22
    f = (odd - (q << 22)).to(tl.float32) * 2.384185791015625e-07
    t = f * f
    s = t * -4.60217700e-3 + 7.96802281e-2
    s = t * s - 6.45963479e-1
    s = f * (t * s + 1.57079632)
    c = t * 9.04021672e-4 - 2.08602885e-2
    c = t * c + 2.53669244e-1
    c = t * c - 1.23370054
    c = t * c + 1.0
    odd_quadrant = (q & 1) != 0
    cos = tl.where(odd_quadrant, s, c)
    sin = tl.where(odd_quadrant, c, s)
    cos = tl.where(((q + 1) & 2) != 0, -cos, cos)
    sin = tl.where((q & 2) != 0, -sin, sin)
    return r * cos, r * sin


@triton.jit
def normals_of(w0, w1, w2, w3):
    """Four words to four normals."""
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def sampler_normals(seed_lo, seed_hi, step, step_ptr, sample, sample_offset, group):
    """The noise of a sampler's step, stream 1: four normals; ``step_ptr``, if any, is read for the step."""
    if step_ptr is not None:
        step_word = tl.load(step_ptr).to(tl.uint32)
    else:
        step_word = step.to(tl.uint32, bitcast=True)
    place = sample.to(tl.uint32) + sample_offset.to(tl.uint32, bitcast=True)
    a, b, c, d = philox_words(seed_lo, seed_hi, group, place, step_word, 1)
    return normals_of(a, b, c, d)


@triton.jit
def interleave4(a, b, c, d):
    """Four blocks ``(B,)`` to one ``(4 B,)``: a0 b0 c0 d0 a1 b1 ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def group_index(total_groups, groups, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The program's groups: index in the batch, mask, sample, index inside the sample."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    sample = index // groups
    return index, index < total_groups, sample, index - sample * groups


@triton.jit
def vector_lanes(total_groups, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The elements of this program's groups when the batch is one run of them, and their mask."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lanes = program * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    return lanes, lanes < total_groups.to(lanes.dtype) * 4


@triton.jit
def first_place(group, channels, spatial, CHANNEL_MINOR: tl.constexpr):
    """Channel and position of a group's first element, in the order in which lanes take groups."""
    if CHANNEL_MINOR:  # neighbours take neighbouring channels; spatial is a multiple of four
        quad = group // channels
        channel = group - quad * channels
        position = quad * 4
    else:
        channel = group * 4 // spatial
        position = group * 4 - channel * spatial
    return channel, position


@triton.jit
def next_place(channel, position, spatial):
    """The element after this one, without a division."""
    wraps = position + 1 == spatial
    return tl.where(wraps, channel + 1, channel), tl.where(wraps, 0, position + 1)


@triton.jit(
    do_not_specialize=[
        "total_groups", "groups", "channels", "spatial",
        "seed_lo", "seed_hi", "step", "sample_offset", "stream",
    ]
)  # fmt: skip
def philox_kernel(
    out_ptr,
    total_groups,
    groups,
    channels,
    spatial,
    seed_lo,
    seed_hi,
    step,
    sample_offset,
    stream,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_MINOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of four elements a lane; KIND 0 words, 1 uniforms, 2 normals."""
    _, mask, sample, group = group_index(total_groups, groups, BLOCK, WIDE)
    channel, position = first_place(group, channels, spatial, CHANNEL_MINOR)
    a, b, c, d = philox_words(
        seed_lo,
        seed_hi,
        (channel * spatial + position) // 4,
        sample.to(tl.uint32) + sample_offset.to(tl.uint32, bitcast=True),
        step.to(tl.uint32, bitcast=True),
        stream.to(tl.uint32, bitcast=True),
    )
    if KIND == 0:
        a = a.to(tl.int32, bitcast=True)
        b = b.to(tl.int32, bitcast=True)
        c = c.to(tl.int32, bitcast=True)
        d = d.to(tl.int32, bitcast=True)
    if KIND == 1:
        a, b, c, d = uniform_of(a), uniform_of(b), uniform_of(c), uniform_of(d)
    if KIND == 2:
        a, b, c, d = normals_of(a, b, c, d)
    if VECTOR:
        lanes, lane_mask = vector_lanes(total_groups, BLOCK, WIDE)
        tl.store(out_ptr + lanes, interleave4(a, b, c, d), mask=lane_mask)
    else:
        at = offset_of(sample, channel, position, channels, spatial, CHANNELS_LAST)
        tl.store(out_ptr + at, a, mask=mask)
        channel, position = next_place(channel, position, spatial)
        at = offset_of(sample, channel, position, channels, spatial, CHANNELS_LAST)
        tl.store(out_ptr + at, b, mask=mask & (channel < channels))
        channel, position = next_place(channel, position, spatial)
        at = offset_of(sample, channel, position, channels, spatial, CHANNELS_LAST)
        tl.store(out_ptr + at, c, mask=mask & (channel < channels))
        channel, position = next_place(channel, position, spatial)
        at = offset_of(sample, channel, position, channels, spatial, CHANNELS_LAST)
        tl.store(out_ptr + at, d, mask=mask & (channel < channels))


def int32(value: int) -> int:
    """The low 32 bits as a signed number, so that Triton always sees an int32 argument."""
    return (value + 2**31) % 2**32 - 2**31


def canonical_sizes(x: torch.Tensor, flat: bool) -> tuple[int, int, int]:
    """(N, C, S) of a batch; C = 1 if every tensor of the launch is contiguous."""
    if flat:
        return x.shape[0], 1, math.prod(x.shape[1:])
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def launch_shape(samples: int, channels: int, spatial: int) -> tuple[tuple[int], int, int, bool]:
    """The grid, all groups, the groups of a sample, and whether indices need 64 bits."""
    groups = -(-channels * spatial // 4)
    total = samples * groups
    grid = (triton.cdiv(total, GROUPS_PER_PROGRAM),)
    return grid, total, groups, samples * channels * spatial >= INT32_ELEMENTS


def philox_(
    out: torch.Tensor, seed: int, step: int, sample_offset: int, stream: int, kind: int
) -> None:
    """Fills ``out``: kind 0 words (int32), 1 uniforms, 2 normals (float32).

    ``out`` is contiguous or channels_last, its first axis the samples; ``seed`` is the signed form
    of the 64-bit seed.
    """
    if kind not in (0, 1, 2):
        raise ValueError(f"kind must be 0, 1 or 2, got {kind}")
    if out.numel() == 0:
        return
    flat = out.is_contiguous()
    samples, channels, spatial = canonical_sizes(out, flat)
    grid, total, groups, wide = launch_shape(samples, channels, spatial)
    with on_device_of(out):
        philox_kernel[grid](
            out,
            total,
            groups,
            channels,
            spatial,
            int32(seed),
            int32(seed >> 32),
            int32(step),
            int32(sample_offset),
            int32(stream),
            KIND=kind,
            VECTOR=flat and spatial % 4 == 0,
            CHANNELS_LAST=not flat,
            CHANNEL_MINOR=not flat and spatial % 4 == 0,
            WIDE=wide,
            BLOCK=GROUPS_PER_PROGRAM,
            enable_fp_fusion=True,
        )
