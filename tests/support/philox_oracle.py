"""The noise stream in NumPy: 64-bit integers and float64, written from its definition alone.

The oracle that every backend is compared with. It shares no code and no polynomial with them.

Philox4x32-10 is from Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC'11). The counter of a group of four elements is (element // 4, sample, step, stream), where the
element index counts one sample in logical C, H, W order, and the key is the two halves of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STREAM_INITIAL, STREAM_LANGEVIN, STREAM_TRAINING, STREAM_OTHER = range(4)

MASK = np.uint64(0xFFFFFFFF)
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)

# (counter, key, words), and (seed, first element, sample, step, stream, four normals).
KNOWN_WORDS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
KNOWN_NORMALS = (
    (0, 0, 0, 0, 0, (0.9911375, -0.9246628, -0.6176091, -0.4820683)),
    (1234, 0, 0, 0, 1, (0.3378573, 0.3371295, -0.7836957, -0.6265982)),
    (1234, 4, 7, 3, 1, (-0.1643242, -0.2739533, -1.2092067, 0.6880306)),
    (2**40 + 5, 12, 1, 999, 1, (2.2923598, 1.1402365, -1.1266236, 0.5184382)),
)


def key_of(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a seed; a negative one counts as two's complement."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def words(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters ``(..., 4)`` taken modulo 2^32; the words, uint64 ``(..., 4)``."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter).astype(np.uint64) & MASK, -1, 0)
    for i in range(10):
        k0, k1 = (np.uint64((k + i * w) & 0xFFFFFFFF) for k, w in zip(key, WEYL, strict=True))
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & MASK,
        )
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(w: np.ndarray) -> np.ndarray:
    """Words to ``((w >> 9) + 0.5) * 2^-23`` in float64 (exact in float32 as well)."""
    return ((w >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23


def box_muller(w: np.ndarray) -> np.ndarray:
    """Words ``(..., 4)`` to normals ``(..., 4)`` in float64: r cos t, r sin t by pairs of words."""
    u = uniforms(w)
    r = np.sqrt(-2.0 * np.log(u[..., 0::2]))
    t = 2.0 * np.pi * u[..., 1::2]
    return np.stack([r * np.cos(t), r * np.sin(t)], axis=-1).reshape(u.shape)


def _groups(
    shape: Sequence[int], seed: int, step: int, sample_offset: int, stream: int
) -> np.ndarray:
    """The words ``(N, ceil(E / 4), 4)`` of samples of E elements each."""
    n, groups = shape[0], -(-math.prod(shape[1:]) // 4)
    counter = np.empty((n, groups, 4), np.uint64)
    counter[..., 0] = np.arange(groups, dtype=np.uint64)
    counter[..., 1] = np.array([(sample_offset + i) & 0xFFFFFFFF for i in range(n)], np.uint64)[
        :, None
    ]
    counter[..., 2] = step & 0xFFFFFFFF
    counter[..., 3] = stream & 0xFFFFFFFF
    return words(counter, key_of(seed))


def _elements(groups: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Groups of four ``(N, G, 4)`` as ``shape``; what the last group has too many is dropped."""
    size = math.prod(shape[1:])
    return groups.reshape(shape[0], 4 * groups.shape[1])[:, :size].reshape(tuple(shape))


def bits(
    shape: Sequence[int], seed: int, step: int = 0, sample_offset: int = 0, stream: int = 3
) -> np.ndarray:
    """The words themselves, uint32, in logical order (shape ``(N, ...)``)."""
    return _elements(_groups(shape, seed, step, sample_offset, stream), shape).astype(np.uint32)


def uniform(
    shape: Sequence[int], seed: int, step: int = 0, sample_offset: int = 0, stream: int = 3
) -> np.ndarray:
    """Uniforms in (0, 1), float64, in logical order (shape ``(N, ...)``)."""
    return _elements(uniforms(_groups(shape, seed, step, sample_offset, stream)), shape)


def normal(
    shape: Sequence[int], seed: int, step: int = 0, sample_offset: int = 0, stream: int = 3
) -> np.ndarray:
    """Normals, float64, in logical order (shape ``(N, ...)``)."""
    return _elements(box_muller(_groups(shape, seed, step, sample_offset, stream)), shape)


def langevin_step(
    x: np.ndarray,
    score: np.ndarray,
    step_size: float,
    *,
    noise: np.ndarray,
    clip: float | None = None,
) -> np.ndarray:
    """``x + a * score + sqrt(2 a) * noise`` in float64, then clamped; a is step_size in float32."""
    a = float(np.float32(step_size))
    y = x.astype(np.float64) + a * score.astype(np.float64) + math.sqrt(2.0 * a) * noise
    return y if clip is None else np.clip(y, -clip, clip)
