"""The Langevin step in the backends of this machine's CPU, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import philox_oracle as oracle
from support.tolerances import NORMAL
from torch._dynamo.testing import CompileCounterWithBackend

from ncsn_fast import ops, use_backend

BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (
    (2, 3, 8, 8),
    (3, 5, 7, 9),
    (2, 3, 1, 1),
    (1, 2, 33, 31),
    (4, 1030),
    (5,),
    (2, 2, 3, 4, 5),
)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensor(shape, dtype=torch.float32, channels_last=False, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if channels_last and len(shape) in CHANNELS_LAST:
        t = t.contiguous(memory_format=CHANNELS_LAST[len(shape)])
    return t


def expected_step(x, score, z, step_size, clip):
    """The formula in float64, on the numbers that float32 holds."""
    step_size = float(torch.tensor(step_size, dtype=torch.float32))
    x = x.double() + step_size * score.double() + math.sqrt(2 * step_size) * z
    return x if clip is None else x.clamp(-clip, clip)


def assert_step(got, expected):
    # One normal's error, scaled, and the rounding of the state.
    torch.testing.assert_close(got.double(), expected, rtol=3e-7, atol=NORMAL)


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("score_last", [False, True])
def test_seeded(backend, shape, dtype, x_last, score_last, record_backends):
    x, score = tensor(shape, channels_last=x_last), tensor(shape, dtype, score_last, seed=1)
    counter = {"seed": 2**64 - 3, "step": 17, "sample_offset": 5}
    z = torch.from_numpy(oracle.normal(shape, stream=oracle.STREAM_LANGEVIN, **counter))
    expected = expected_step(x, score, z, 0.03, 1.5)
    strides = x.stride()
    with record_backends() as ran:
        result = ops.langevin_step_(x, score, 0.03, clip=1.5, backend=backend, **counter)
    assert result is x and x.stride() == strides
    assert ran == ([("langevin_step_", "native")] if backend == "native" else [])
    assert_step(x, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_explicit_noise_is_the_same_bits_in_every_backend(dtype, channels_last):
    shape = (2, 3, 5, 7)
    x, z = tensor(shape), tensor(shape, dtype, channels_last, seed=2)
    score = tensor(shape, dtype, seed=1)
    results = []
    for backend in ("reference", "native"):
        results.append(ops.langevin_step_(x.clone(), score, 0.1, noise=z, backend=backend))
        assert_step(results[-1], expected_step(x, score, z.double(), 0.1, None))
    assert torch.equal(*results)


@BACKENDS
def test_seeded_is_explicit_with_the_stream(backend):
    x, score = tensor((3, 3, 6, 6)), tensor((3, 3, 6, 6), seed=1)
    z = ops.philox_normal(x.shape, seed=9, step=2, stream=ops.STREAM_LANGEVIN, backend=backend)
    seeded = ops.langevin_step_(x.clone(), score, 0.1, seed=9, step=2, backend=backend)
    explicit = ops.langevin_step_(x.clone(), score, 0.1, noise=z, backend=backend)
    assert torch.equal(seeded, explicit)


@BACKENDS
def test_step_and_step_size_as_tensors(backend):
    x, score = tensor((2, 3, 4, 4)), tensor((2, 3, 4, 4), seed=1)
    numbers = ops.langevin_step_(x.clone(), score, 0.25, seed=9, step=12, backend=backend)
    for shape in ((), (1,)):
        for dtype in (torch.float32, torch.float64):
            step = torch.full(shape, 12)
            step_size = torch.full(shape, 0.25, dtype=dtype)
            got = ops.langevin_step_(
                x.clone(), score, step_size, seed=9, step=step, backend=backend
            )
            assert torch.equal(got, numbers)


@BACKENDS
def test_the_scale_of_the_noise_is_correctly_rounded(backend):
    """With a score of zero and noise of one the step is the scale itself: sqrt(2 eta), as IEEE has it."""
    zero, one = torch.zeros(1), torch.ones(1)
    generator = torch.Generator().manual_seed(0)
    for step_size in (0.1, 2e-5, *torch.rand(200, generator=generator).tolist()):
        step_size = float(np.float32(step_size))
        got = ops.langevin_step_(zero.clone(), zero, step_size, noise=one, backend=backend)
        held = torch.tensor(step_size, dtype=torch.float32)
        of_tensor = ops.langevin_step_(zero.clone(), zero, held, noise=one, backend=backend)
        assert got.item() == of_tensor.item() == np.sqrt(np.float32(2 * step_size))


@BACKENDS
def test_clip_nan_and_zero_step(backend):
    x = torch.tensor([[0.5, -3.0, 3.0, float("nan"), float("inf")]])
    zeros = torch.zeros_like(x)
    got = ops.langevin_step_(x.clone(), zeros, 0.0, noise=zeros, clip=1.0, backend=backend)
    expected = torch.tensor([[0.5, -1.0, 1.0, float("nan"), 1.0]])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    got = ops.langevin_step_(x.clone(), zeros, 0.0, noise=zeros, backend=backend)
    torch.testing.assert_close(got, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nothing_outside_is_written(threads):
    """The state lies between canaries; threads do not change a bit."""
    shape = (7, 3, 31, 9)
    size = math.prod(shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        memory = torch.full((size + 128,), 123.0)
        x = memory[64:-64].view(shape)
        x.copy_(tensor(shape))
        ops.langevin_step_(x, tensor(shape, seed=1), 0.1, seed=4, backend="native")
    finally:
        torch.set_num_threads(before)
    assert (memory[:64] == 123).all() and (memory[-64:] == 123).all()
    expected = ops.langevin_step_(
        tensor(shape), tensor(shape, seed=1), 0.1, seed=4, backend="reference"
    )
    torch.testing.assert_close(x, expected, rtol=0, atol=NORMAL)


def test_other_strides_go_to_the_reference(record_backends):
    wide = tensor((2, 3, 4, 8))
    x, score = wide[..., ::2], tensor((2, 3, 4, 4), seed=1)
    expected = ops.langevin_step_(x.contiguous(), score, 0.1, seed=1, backend="reference")
    odd = wide[..., 1::2].clone()
    with record_backends() as ran:
        ops.langevin_step_(x, score, 0.1, seed=1)
    assert ran == []
    assert torch.equal(x, expected) and torch.equal(wide[..., 1::2], odd)
    with pytest.raises(RuntimeError, match="cannot serve langevin_step_: strides"):
        ops.langevin_step_(x, score, 0.1, seed=1, backend="native")


def test_empty_batch():
    for backend in ("reference", "native"):
        x = torch.zeros(0, 3, 4, 4)
        assert ops.langevin_step_(x, x.clone(), 0.1, seed=1, backend=backend).shape == (0, 3, 4, 4)


def test_langevin_dynamics_reach_a_gaussian():
    """With the score of N(2, 0.25) the chain ends in N(2, 0.25), up to the bias of the step size."""
    x = torch.zeros(20000, 1)
    for step in range(400):
        ops.langevin_step_(x, (2 - x) / 0.25, 0.01, seed=1, step=step)
    assert abs(x.mean() - 2) < 0.02
    # x <- (1 - a) x + ..., a = eta / var: stationary variance is var / (1 - a / 2)
    assert abs(x.var() - 0.25 / (1 - 0.04 / 2)) < 0.01


@pytest.mark.parametrize("name", ["langevin_step_", "philox_"])
def test_opcheck(name):
    x, score = tensor((2, 3, 4, 5)), tensor((2, 3, 4, 5), torch.bfloat16, True, seed=1)
    step, step_size = torch.tensor(3), torch.tensor(0.1)
    calls = {
        "langevin_step_": [
            (x, score, None, 0.1, None, 5, 3, None, 2, 1.0),
            (x, score, x.clone(), 0.1, None, 0, 0, None, 0, None),
            (x, score, None, 0.0, step_size, -5, 0, step, 0, None),
        ],
        "philox_": [
            (torch.zeros(2, 3, 4), 5, 1, 0, 3, 2),
            (torch.zeros(2, 3, 4, dtype=torch.int32), -5, 1, 7, 3, 0),
        ],
    }
    for arguments in calls[name]:
        torch.library.opcheck(getattr(torch.ops.ncsn_fast, name).default, arguments)


@pytest.mark.slow
@BACKENDS
def test_fullgraph_without_recompilation(backend):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def call(x, score, seed, step):
        return ops.langevin_step_(x, score, 0.1, seed=seed, step=step, clip=1.0)

    score = tensor((2, 3, 4, 4), seed=1)
    with use_backend(backend):
        for seed, step in ((3, 4), (5, 6), (2**40, 1000), (9, 7)):
            x = tensor((2, 3, 4, 4))
            eager = ops.langevin_step_(x.clone(), score, 0.1, seed=seed, step=step, clip=1.0)
            torch.testing.assert_close(call(x, score, seed, step), eager)
    assert counter.frame_count <= 2  # with constants, then with symbols


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "x must have dtype float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one axis"),
        ({"x": torch.zeros(1, 3).expand(2, 3)}, RuntimeError, "must not overlap itself"),
        ({"x": torch.zeros(8).as_strided((2, 3), (1, 1))}, RuntimeError, "must not overlap"),
        ({"score": torch.zeros(3, 2)}, ValueError, r"score must have shape \(2, 3\), got \(3, 2\)"),
        ({"score": torch.zeros(2, 3).long()}, TypeError, "score must have dtype.*got int64"),
        ({"score": torch.zeros(2, 3, device="meta")}, RuntimeError, "score must be on cpu"),
        ({"score": torch.zeros(2, 3).requires_grad_()}, RuntimeError, "no gradient"),
        ({"step_size": -0.1}, ValueError, "step_size must be finite and >= 0, got -0.1"),
        ({"step_size": float("nan")}, ValueError, "step_size must be finite"),
        ({"step_size": "0.1"}, TypeError, "step_size must be a number, got str"),
        ({"step_size": torch.ones(2)}, ValueError, r"one element, got shape \(2,\)"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"step": torch.tensor(1, dtype=torch.int32)}, TypeError, "step must have dtype int64"),
        ({"seed": None}, ValueError, "exactly one of seed and noise.*got neither"),
        ({"noise": torch.zeros(2, 3)}, ValueError, "exactly one of seed and noise.*got both"),
        ({"clip": -1.0}, ValueError, "clip must be finite and >= 0"),
        ({"sample_offset": -1}, ValueError, "sample_offset must be in"),
    ],
)
@BACKENDS
def test_refuses(change, error, message, backend):
    arguments = {"x": torch.zeros(2, 3), "score": torch.zeros(2, 3), "step_size": 0.1, "seed": 1}
    with pytest.raises(error, match=message):
        ops.langevin_step_(**arguments | {"backend": backend} | change)


def test_the_operator_guards_its_memory():
    """Direct calls, past the public function's checks."""
    step = torch.ops.ncsn_fast.langevin_step_.default
    x = torch.zeros(2, 3, 4, 4)
    rest = (None, 0.1, None, 1, 0, None, 0, None)
    for bad in (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 8)[..., ::2], torch.zeros(3)):
        with pytest.raises(RuntimeError):
            step(x, bad, *rest)
    with pytest.raises(RuntimeError, match="float32"):
        step(x.double(), x.double(), *rest)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_graph_that_saved_the_state_notices(backend):
    """Autograd must refuse to use values that were overwritten, not differentiate with the new ones."""
    x, weight = tensor((2, 3)), torch.ones(2, 3, requires_grad=True)
    y = (x * weight).sum()
    ops.langevin_step_(x, torch.zeros(2, 3), 0.1, seed=1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        state = tensor((2, 3)) + 0
        ops.langevin_step_(state, torch.zeros(2, 3), 0.1, seed=1, backend=backend)
