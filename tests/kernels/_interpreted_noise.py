"""The Triton kernels in Triton's interpreter, on CPU tensors, against the oracle.

Not collected by name: TRITON_INTERPRET=1 must be set before Triton is imported, so test_triton.py
runs this file in a process of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support import philox_oracle as oracle
from support import tolerances

from ncsn_fast import ops
from ncsn_fast.kernels import langevin_step, philox, solver_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Full groups; groups that straddle channels; a short last group; several programs; no image at all.
SHAPES = [(3, 2, 4, 6), (2, 3, 5, 7), (1, 1, 33, 31), (2, 5, 1, 1), (2, 130, 2, 2)]
SHAPES += [(5,), (2, 5), (0, 3, 4, 4)]
LAST = torch.channels_last


def layouts(shape: tuple[int, ...]) -> list[torch.memory_format]:
    return [torch.contiguous_format, LAST] if len(shape) == 4 else [torch.contiguous_format]


def poisoned(values: torch.Tensor, fmt: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in the middle of a NaN-filled memory, and that memory."""
    like = values.contiguous(memory_format=fmt)
    memory = torch.full((values.numel() + 64,), float("nan")).to(values.dtype)
    inside = memory.as_strided(values.shape, like.stride(), 32)
    inside.copy_(values)
    return inside, memory


def assert_untouched(memory: torch.Tensor) -> None:
    assert memory[:32].isnan().all() and memory[-32:].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_philox(shape, kind):
    seed, step, offset, stream = 2**64 - 5, 2**32 - 1, 2**32 - 2, 2
    for fmt in layouts(shape):
        out, memory = poisoned(torch.full(shape, float("nan")), fmt)
        target = out.view(torch.int32) if kind == 0 else out
        philox.philox_(target, seed - 2**64, step, offset, stream, kind)
        assert_untouched(memory)
        if kind == 0:
            expected = oracle.bits(shape, seed, step, offset, stream)
            assert (target.contiguous().numpy().view(np.uint32) == expected).all()
        else:
            draw = oracle.uniform if kind == 1 else oracle.normal
            error = np.abs(out.numpy() - draw(shape, seed, step, offset, stream))
            assert (error <= (0.0 if kind == 1 else tolerances.NORMAL)).all()


def test_philox_of_an_unknown_kind():
    for kind in (3, -1):
        with pytest.raises(ValueError, match=f"kind must be 0, 1 or 2, got {kind}"):
            philox.philox_(torch.empty(1, 4), 0, 0, 0, 0, kind)


def test_known_normals():
    for seed, element, sample, step, stream, expected in oracle.KNOWN_NORMALS:
        out = torch.empty(1, element + 4)
        philox.philox_(out, seed, step, sample, stream, 2)
        assert np.abs(out[0, element:].numpy() - expected).max() < tolerances.NORMAL


@triton.jit
def map_words(words_ptr, out_ptr, N: tl.constexpr):
    """Four words to four normals, by row."""
    row = tl.arange(0, N) * 4
    a = tl.load(words_ptr + row).to(tl.uint32, bitcast=True)
    b = tl.load(words_ptr + row + 1).to(tl.uint32, bitcast=True)
    c = tl.load(words_ptr + row + 2).to(tl.uint32, bitcast=True)
    d = tl.load(words_ptr + row + 3).to(tl.uint32, bitcast=True)
    a, b, c, d = philox.normals_of(a, b, c, d)
    tl.store(out_ptr + row, a)
    tl.store(out_ptr + row + 1, b)
    tl.store(out_ptr + row + 2, c)
    tl.store(out_ptr + row + 3, d)


def test_normals_of_extreme_words():
    """The map itself, on words that no short run of the generator meets."""
    edges = torch.tensor([0, 511, 512, 2**30, 2**31 - 1, -(2**31), -512, -1], dtype=torch.int32)
    words = torch.cartesian_prod(edges, edges, edges, edges)
    out = torch.empty(words.shape)
    map_words[(1,)](words, out, N=len(words))
    exact = oracle.box_muller(words.numpy().view(np.uint32).astype(np.uint64))
    assert np.abs(out.numpy() - exact).max() < tolerances.NORMAL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_langevin_step(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, score, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    score, noise = score.to(dtype), noise.to(dtype)
    seed, step, offset, size = 2**40 + 7, 9, 2**32 - 1, 0.05
    drawn = oracle.normal(shape, seed, step, offset, oracle.STREAM_LANGEVIN)
    for x_format in layouts(shape):
        for score_format in layouts(shape):
            for z in (None, noise):
                on_device = score_format != LAST
                state, memory = poisoned(x, x_format)
                langevin_step.langevin_step_(
                    state,
                    score.contiguous(memory_format=score_format),
                    z,
                    0.0 if on_device else size,
                    torch.tensor([size]) if on_device else None,
                    seed,
                    0 if on_device else step,
                    torch.tensor(step) if on_device else None,
                    offset,
                    None,
                )
                assert_untouched(memory)
                expected = oracle.langevin_step(
                    x.numpy(),
                    score.double().numpy(),
                    size,
                    noise=drawn if z is None else z.double().numpy(),
                )
                assert (np.abs(state.numpy() - expected) <= tolerances.NORMAL).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:4:2], SHAPES[4], SHAPES[-1]], ids=str)
def test_solver_step(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, score, old = (torch.randn(shape, generator=generator) for _ in range(3))
    score = score.to(dtype)
    seed, step, offset = 2**40 + 7, 9, 2**32 - 1
    drawn = torch.from_numpy(oracle.normal(shape, seed, step, offset, oracle.STREAM_LANGEVIN))
    table = torch.tensor([[9.0] * 5, [0.7, -0.4, 0.3, 1.3, 0.2]])
    a, b, c, d, e = table[1].double()
    for x_format in layouts(shape):
        for score_format in layouts(shape):
            for multistep, noisy in ((False, True), (True, True), (True, False)):
                on_device = score_format != LAST
                state, memory = poisoned(x, x_format)
                previous, around = poisoned(old, x_format) if multistep else (None, memory)
                solver_step.solver_step_(
                    state,
                    score.contiguous(memory_format=score_format),
                    previous,
                    table,
                    0 if on_device else 1,
                    torch.tensor(1) if on_device else None,
                    noisy,
                    seed,
                    0 if on_device else step,
                    torch.tensor(step) if on_device else None,
                    offset,
                )
                assert_untouched(memory)
                assert_untouched(around)
                expected = a * x.double() + b * score.double() + c * noisy * drawn
                if multistep:
                    expected += e * old.double()
                    torch.testing.assert_close(
                        previous.double(), x.double() + d * score.double(), rtol=3e-7, atol=1e-6
                    )
                torch.testing.assert_close(state.double(), expected, rtol=3e-7, atol=1e-6)


def test_clip_keeps_nan():
    x = torch.tensor([[3.0, -3.0, 0.5, float("nan"), float("inf"), -float("inf"), 1.0, 0.0]])
    zero = torch.zeros_like(x)
    for clip in (1.0, None):
        state = x.clone()
        langevin_step.langevin_step_(state, zero, zero, 0.5, None, 0, 0, None, 0, clip)
        expected = x if clip is None else x.clamp(-clip, clip)
        assert torch.equal(state.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_64_bit_indices(monkeypatch):
    """The same numbers with every index in 64 bits, as in a batch of more than 2^31 elements."""
    expected = {}
    for limit in (philox.INT32_ELEMENTS, 0):
        monkeypatch.setattr(philox, "INT32_ELEMENTS", limit)
        for shape in SHAPES:
            for fmt in layouts(shape):
                x = torch.linspace(-1, 1, max(1, int(np.prod(shape))))[: int(np.prod(shape))]
                state = x.reshape(shape).contiguous(memory_format=fmt)
                langevin_step.langevin_step_(
                    state, state.clone(), None, 0.1, None, 5, 6, None, 7, 0.9
                )
                assert torch.equal(state, expected.setdefault((shape, fmt), state))


def test_public_functions(record_backends):
    shape = (3, 2, 5, 5)
    with record_backends() as ran:
        z = ops.philox_normal(shape, seed=2**64 - 1, step=4, stream=1, backend="triton")
        u = ops.philox_uniform(shape, seed=2**64 - 1, backend="triton")
        bits = ops.philox_bits(shape, seed=2**64 - 1, backend="triton")
        x = torch.randn(shape)
        seeded, explicit = x.clone(), x.clone()
        ops.langevin_step_(seeded, -x, 0.02, seed=2**64 - 1, step=4, clip=1.5, backend="triton")
        ops.langevin_step_(explicit, -x, 0.02, noise=z, clip=1.5, backend="triton")
        table = torch.tensor([[1.0, 0.02, 0.2, 0.0, 0.0]])
        ops.solver_step_(x.clone(), -x, table, 0, seed=2**64 - 1, step=4, backend="triton")
    assert {backend for _, backend in ran} == {"triton"} and len(ran) == 6
    assert (bits.numpy().view(np.uint32) == oracle.bits(shape, 2**64 - 1)).all()
    assert (u.numpy() == oracle.uniform(shape, 2**64 - 1)).all()
    assert np.abs(z.numpy() - oracle.normal(shape, 2**64 - 1, 4, 0, 1)).max() < tolerances.NORMAL
    torch.testing.assert_close(seeded, explicit, rtol=0, atol=2.4e-7)
