"""The noise stream: Philox4x32-10, uniforms and normals of its words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32. Words are int64 tensors holding 0 .. 2**32 - 1, and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The 64-bit product wraps to a negative int64 at most; its bits, and so both halves, are right.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW32) ^ c1 ^ k0,
            p1 & _LOW32,
            ((p0 >> 32) & _LOW32) ^ c3 ^ k1,
            p0 & _LOW32,
        )
        k0, k1 = (k0 + PHILOX_KEY_INCREMENTS[0]) & _LOW32, (k1 + PHILOX_KEY_INCREMENTS[1]) & _LOW32
    return [c0, c1, c2, c3]


def philox_words(
    n: int,
    elements: int,
    *,
    seed: int,
    step: int | Tensor,
    sample_offset: int,
    stream: int,
    device: torch.device,
) -> list[Tensor]:
    """The four words of every counter of ``n`` samples of ``elements`` elements, each ``(n, ceil(elements / 4))``."""

    def word(value: int | Tensor, shift: int = 0) -> Tensor:
        # Through a tensor, so that a traced (symbolic) seed or step is no constant of the graph.
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=torch.int64, device=device)
        return (value.reshape(()) >> shift) & _LOW32

    groups = torch.arange((elements + 3) // 4, device=device) & _LOW32
    samples = (torch.arange(n, device=device) + sample_offset) & _LOW32
    counter = [groups[None, :], samples[:, None], word(step), word(stream)]
    return philox4x32(counter, [word(seed), word(seed, 32)])


def uniform_from_words(word: Tensor, dtype: torch.dtype) -> Tensor:
    """``((w >> 9) + 0.5) * 2**-23``: exact in float32, never 0, never 1."""
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """``r cos t`` and ``r sin t`` with ``r = sqrt(-2 ln u0)`` and ``t = 2 pi u1`` (Box & Muller 1958).

    The angle is split into a quadrant and a rest within pi/4: both are exact, so that float32 loses nothing to a
    large argument.
    """
    r = torch.sqrt(-2.0 * torch.log(u0))
    quadrant = torch.round(4.0 * u1)
    angle = (4.0 * u1 - quadrant) * (math.pi / 2)
    c, s = torch.cos(angle), torch.sin(angle)
    q = quadrant.to(torch.int64) & 3
    cos = torch.where(q % 2 == 0, c, s)
    sin = torch.where(q % 2 == 0, s, c)
    return (
        r * torch.where((q == 1) | (q == 2), -cos, cos),
        r * torch.where(q >= 2, -sin, sin),
    )


def _interleave(four: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    elements = math.prod(shape[1:])
    return torch.stack(four, dim=-1).flatten(1)[:, :elements].reshape(shape)


def philox_bits(shape: tuple[int, ...], **counter) -> Tensor:
    """The words as int32 bit patterns, in the order of the elements."""
    words = philox_words(shape[0], math.prod(shape[1:]), **counter)
    return _interleave(words, shape).to(torch.int32)


def philox_uniform(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **counter) -> Tensor:
    """Uniform numbers in (0, 1)."""
    words = philox_words(shape[0], math.prod(shape[1:]), **counter)
    return _interleave([uniform_from_words(w, dtype) for w in words], shape)


def philox_normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **counter) -> Tensor:
    """Standard normal numbers, float32 or float64."""
    words = philox_words(shape[0], math.prod(shape[1:]), **counter)
    u0, u1, u2, u3 = (uniform_from_words(w, dtype) for w in words)
    return _interleave([*box_muller(u0, u1), *box_muller(u2, u3)], shape)
