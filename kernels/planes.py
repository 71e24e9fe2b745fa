"""Tiles of planes: where their elements lie, how large they are, and in how many parts planes are reduced.

What the forward and the backward pass of ``cond_instance_norm_elu`` share. A tile is ``[PLANES, POSITIONS]``: some
channels of one sample by some positions of its image. Which of the two is contiguous in memory is ``LAST``, nothing
else depends on the layout; ``EVEN`` says that tiles cover the planes exactly, so that nothing is masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tuned
from .addressing import offset_of

# --- on the device --------------------------------------------------------------------------------


@triton.jit
def work_item(parts, channels, PLANES: tl.constexpr):
    """The program's sample (64-bit), first channel and part; neighbours take neighbouring channels."""
    blocks = tl.cdiv(channels, PLANES)
    rest = tl.program_id(0) // blocks
    sample = rest // parts
    channel = (tl.program_id(0) - rest * blocks) * PLANES
    return sample.to(tl.int64), channel, rest - sample * parts


@triton.jit
def tile_of(
    sample, channel, position, channels, spatial,
    LAST: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile: of its first element (64-bit) and from there; and which lie inside."""
    c = tl.arange(0, PLANES)[:, None]
    s = tl.arange(0, POSITIONS)[None, :]
    first = offset_of(sample, channel, position, channels, spatial, LAST)
    inside = (channel + c < channels) & (position + s < spatial)
    return first, offset_of(0, c, s, channels, spatial, LAST), inside


@triton.jit
def load_tile(ptr, first, offsets, inside, EVEN: tl.constexpr, AGAIN: tl.constexpr = False):
    """A tile in float32, zero outside. AGAIN: it was read before, and is not needed after this."""
    EVICT: tl.constexpr = "evict_first" if AGAIN else ""
    if EVEN:
        value = tl.load(ptr + first + offsets, eviction_policy=EVICT)
    else:
        value = tl.load(ptr + first + offsets, mask=inside, other=0.0, eviction_policy=EVICT)
    return value.to(tl.float32)


@triton.jit
def store_tile(ptr, first, offsets, inside, value, EVEN: tl.constexpr):
    """Writes a tile in the tensor's dtype."""
    value = value.to(ptr.dtype.element_ty)
    if EVEN:
        tl.store(ptr + first + offsets, value)
    else:
        tl.store(ptr + first + offsets, value, mask=inside)


@triton.jit
def inside_only(value, inside, EVEN: tl.constexpr):
    """The value, zero outside."""
    if EVEN:
        return value
    return tl.where(inside, value, 0.0)


@triton.jit
def load_sum(
    x_ptr, bias_ptr, residual_ptr, z_ptr, first, offsets, inside, channel, channels,
    EVEN: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """A tile of x; with ``z_ptr``, of the sum, rounded as it is written there."""
    x = load_tile(x_ptr, first, offsets, inside, EVEN)
    if z_ptr is not None:
        if bias_ptr is not None:
            c = channel + tl.arange(0, PLANES)
            bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
            x += bias[:, None]
        if residual_ptr is not None:
            x += load_tile(residual_ptr, first, offsets, inside, EVEN)
        x = inside_only(x.to(z_ptr.dtype.element_ty).to(tl.float32), inside, EVEN)
        store_tile(z_ptr, first, offsets, inside, x, EVEN)
    return x


@triton.jit
def of_part(sample, c, splits, channels, SPLITS: tl.constexpr):
    """Offsets of all parts of planes in a tensor ``(N, splits, C)``, and which there are."""
    k = tl.arange(0, SPLITS)[None, :]
    return (sample * splits + k) * channels + c[:, None], (c[:, None] < channels) & (k < splits)


# --- sizes ----------------------------------------------------------------------------------------

ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of a large GPU
MAX_SPLITS = 64  # parts of a plane in a reduction
MAX_WARPS = 16


class Tile(NamedTuple):
    """Sizes of a tile, both powers of two, and the warps that work on it."""

    planes: int
    positions: int
    warps: int


class Aim(NamedTuple):
    """How a kernel's tiles are chosen: elements to have if planes are small, at most, and of each thread."""

    usual: int
    most: int
    of_thread: int
    fewest_planes: int
    most_planes: int


ALIGNED = 16  # Triton looks no further: a size that 16 divides, or one that nothing is known of

# The kernel, and whether in channels_last -> aim. In channels_last a thread's 16 bytes are of several channels, and
# each costs shuffles in a sum over positions: the more elements a thread has, the less they weigh. 16 channels are
# 32 bytes, a sector of memory, in half precision. "long": planes that no tile holds, worked on tile by tile.
AIMS = {
    ("norm", False): Aim(4096, 16384, 32, 1, 64),
    ("norm", True): Aim(4096, 16384, 64, 16, 64),
    ("gradient", False): Aim(4096, 16384, 32, 1, 64),
    ("gradient", True): Aim(4096, 16384, 32, 16, 64),
    ("long norm", False): Aim(4096, 16384, 32, 1, 64),
    ("long norm", True): Aim(4096, 16384, 64, 16, 64),
    ("long gradient", False): Aim(4096, 16384, 32, 1, 64),
    ("long gradient", True): Aim(4096, 8192, 16, 16, 64),
    ("part", False): Aim(4096, 4096, 32, 1, 64),
    ("part", True): Aim(4096, 4096, 32, 32, 32),
}


def tile_for(kernel: str, channels: int, spatial: int, last: bool, dtype: torch.dtype) -> Tile:
    """The tile of a kernel of ``AIMS``; depends on sizes by powers of two alone, and not on the batch."""
    measured = tuned.tile(tuned.key(kernel, channels, spatial, last, dtype))
    return tile_by_aim(kernel, channels, spatial, last) if measured is None else Tile(*measured)


def tile_by_aim(kernel: str, channels: int, spatial: int, last: bool) -> Tile:
    """The heuristic's tile."""
    tile = tile_of_aim(AIMS[kernel, last], channels, spatial, last)
    if kernel != "part" and tile.positions < spatial:
        tile = tile_of_aim(AIMS[f"long {kernel}", last], channels, spatial, last)
    return tile


def tile_of_aim(aim: Aim, channels: int, spatial: int, last: bool) -> Tile:
    """The tile that an aim leads to."""
    if (
        last and channels % ALIGNED
    ):  # loads are of single elements, each with a pointer in registers
        aim = aim._replace(most=aim.usual, of_thread=16)
    most, length = triton.next_power_of_2(channels), triton.next_power_of_2(spatial)
    planes = min(most, aim.most_planes, max(aim.fewest_planes, aim.usual // length))
    positions = min(length, aim.most // planes)
    warps = min(MAX_WARPS, max(1, planes * positions // (32 * aim.of_thread)))
    return Tile(planes, positions, warps)


def splits_of(programs: int, spatial: int, positions: int) -> tuple[int, int]:
    """How many parts to reduce planes in, to keep a GPU busy, and their length in tiles."""
    tiles = triton.cdiv(spatial, positions)
    wanted = min(MAX_SPLITS, tiles, triton.cdiv(2 * ENOUGH_PROGRAMS, programs))
    length = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, length), length


def in_one_kernel(samples: int, channels: int, spatial: int, tile: Tile, plusplus: bool) -> bool:
    """Whether one kernel does it all: its planes are whole in registers, or there are enough programs."""
    enough = samples * triton.cdiv(channels, tile.planes) >= ENOUGH_PROGRAMS
    return not plusplus and (tile.positions >= spatial or enough)


def constants_of(tile: Tile, channels: int, spatial: int, last: bool) -> dict[str, object]:
    """What all kernels on tiles take."""
    return {
        "LAST": last,
        "EVEN": channels % tile.planes == 0 and spatial % tile.positions == 0,
        "PLANES": tile.planes,
        "POSITIONS": tile.positions,
        "num_warps": tile.warps,
        # Not left to Triton's defaults, which change between versions. A wrong label is asserted; overflow is not.
        "enable_fp_fusion": True,
        "sanitize_overflow": False,
    }
