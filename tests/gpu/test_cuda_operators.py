"""The noise stream and the Langevin step on a real GPU: every fast backend against the oracle.

What can be checked without a GPU is in test_cuda_sources.py and test_triton.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import philox_oracle as oracle
from support import tolerances
from support.matrix import matrix
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops import dispatch

pytestmark = pytest.mark.cuda

BACKENDS = ("native", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
# Full groups; groups that straddle channels; a short last group; single pixels; small and large.
IMAGES = [(3, 2, 4, 6), (2, 3, 5, 7), (1, 1, 33, 31), (2, 5, 1, 1), (2, 130, 2, 2), (7, 3, 32, 32)]
OTHERS = [(5,), (300, 4), (2, 5), (2, 3, 4, 5, 6), (0, 3, 8, 8)]
# Full groups in many images; groups that straddle channels; no images; empty.
TELLING = [(7, 3, 32, 32), (2, 3, 5, 7), (300, 4), (0, 3, 8, 8)]
SEED, STEP, OFFSET = 2**64 - 5, 2**32 - 1, 2**32 - 1000
MARGIN = 64


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """A fast backend; skips the test if it is not there."""
    if (reason := dispatch.why_not(request.param, "langevin_step_", "cuda")) is not None:
        pytest.skip(reason)
    return request.param


def formats(shape: tuple[int, ...]) -> tuple[torch.memory_format, ...]:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    return (torch.contiguous_format, last) if last else (torch.contiguous_format,)


def poisoned(
    values: Tensor, fmt: torch.memory_format, start: int = MARGIN
) -> tuple[Tensor, Tensor]:
    """The values inside a NaN-filled memory on the GPU, and that memory. An odd start misaligns."""
    like = values.contiguous(memory_format=fmt)
    memory = torch.full((values.numel() + 2 * MARGIN,), float("nan"), device="cuda")
    inside = memory.as_strided(values.shape, like.stride(), start)
    inside.copy_(values)
    return inside, memory


def assert_untouched(memory: Tensor, size: int, start: int = MARGIN) -> None:
    assert memory[:start].isnan().all() and memory[start + size :].isnan().all()


def assert_close(got: Tensor, expected: np.ndarray) -> None:
    """Within the promise for a normal, NaN nowhere."""
    error = np.abs(got.cpu().double().numpy() - expected)
    assert (error <= tolerances.NORMAL).all(), f"largest error {error.max():.2e}"


def random(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@matrix("shape", IMAGES + OTHERS, telling=[(shape,) for shape in TELLING])
def test_stream(backend, shape, record_backends):
    for fmt in formats(shape):
        arguments = dict(seed=SEED, step=STEP, sample_offset=OFFSET, stream=2)
        place = dict(device="cuda", memory_format=fmt, backend=backend)
        expected = oracle.bits(shape, SEED, STEP, OFFSET, 2)
        with record_backends() as ran:
            bits = ops.philox_bits(shape, **arguments, **place)
            u = ops.philox_uniform(shape, **arguments, **place)
            z = ops.philox_normal(shape, **arguments, **place)
        assert ran == [("philox_", backend)] * 3
        for out in (bits, u, z):
            assert out.is_cuda and out.is_contiguous(memory_format=fmt)
        assert (bits.cpu().contiguous().numpy().view(np.uint32) == expected).all()
        assert (u.cpu().numpy() == oracle.uniform(shape, SEED, STEP, OFFSET, 2)).all()
        assert_close(z, oracle.normal(shape, SEED, STEP, OFFSET, 2))


def test_known_normals(backend):
    for seed, element, sample, step, stream, expected in oracle.KNOWN_NORMALS:
        z = ops.philox_normal(
            (1, element + 4),
            seed=seed,
            step=step,
            sample_offset=sample,
            stream=stream,
            device="cuda",
            backend=backend,
        )
        assert_close(z[0, element:], np.array(expected))


def test_a_million_normals(backend):
    """Enough of them to meet the rare ones: |z| near 5, u near 0 and near 1."""
    shape = (4, 2**20)
    z = ops.philox_normal(shape, seed=3, device="cuda", backend=backend)
    assert_close(z, oracle.normal(shape, 3))


@matrix(
    "shape, dtype",
    IMAGES + OTHERS,
    DTYPES,
    telling=list(zip(TELLING, DTYPES, strict=True)),
)
def test_langevin_step(backend, shape, dtype, record_backends):
    x, score, noise = (
        random(shape),
        random(shape, seed=1).to(dtype),
        random(shape, seed=2).to(dtype),
    )
    size = 0.05
    drawn = oracle.normal(shape, SEED, STEP, OFFSET, oracle.STREAM_LANGEVIN)
    expected = oracle.langevin_step(x.numpy(), score.double().numpy(), size, noise=drawn)
    explicit = oracle.langevin_step(
        x.numpy(), score.double().numpy(), size, noise=noise.double().numpy()
    )
    with record_backends() as ran:
        for x_format in formats(shape):
            for score_format in formats(shape):
                for start in (MARGIN, MARGIN + 1):
                    s = score.cuda().contiguous(memory_format=score_format)
                    state, memory = poisoned(x, x_format, start)
                    got = ops.langevin_step_(
                        state, s, size, seed=SEED, step=STEP, sample_offset=OFFSET, backend=backend
                    )
                    assert got is state
                    assert_close(state, expected)
                    assert_untouched(memory, x.numel(), start)
                    for noise_format in formats(shape):
                        state, memory = poisoned(x, x_format, start)
                        z = noise.cuda().contiguous(memory_format=noise_format)
                        ops.langevin_step_(state, s, size, noise=z, backend=backend)
                        assert_close(state, explicit)
                        assert_untouched(memory, x.numel(), start)
    assert set(ran) == {("langevin_step_", backend)}


def test_seeded_is_explicit(backend):
    """The step with a seed is the step with that seed's normals, to the last rounding."""
    shape = (3, 3, 33, 31)
    for fmt in FORMATS:
        x = random(shape).cuda().contiguous(memory_format=fmt)
        seeded, explicit = x.clone(), x.clone()
        z = ops.philox_normal(shape, seed=7, step=8, stream=1, device="cuda", backend=backend)
        ops.langevin_step_(seeded, -x, 0.3, seed=7, step=8, backend=backend)
        ops.langevin_step_(explicit, -x, 0.3, noise=z, backend=backend)
        torch.testing.assert_close(seeded, explicit, rtol=2.0**-22, atol=2.0**-22)


def test_device_tensors_are_numbers(backend):
    shape = (2, 3, 6, 6)
    x, score = random(shape).cuda(), random(shape, seed=1).cuda()
    by_number = ops.langevin_step_(x.clone(), score, 0.07, seed=1, step=2**31, backend=backend)
    for size_shape in ((), (1,)):
        size = torch.full(size_shape, 0.07, device="cuda")
        step = torch.full(size_shape, 2**31, dtype=torch.int64, device="cuda")
        by_tensor = ops.langevin_step_(x.clone(), score, size, seed=1, step=step, backend=backend)
        assert torch.equal(by_number, by_tensor)


def test_clip_keeps_nan(backend):
    values = [3.0, -3.0, 0.5, float("nan"), float("inf"), -float("inf"), 1.0, 0.0]
    x = torch.tensor([values], device="cuda")
    zero = torch.zeros_like(x)
    for clip in (1.0, 0.0, None):
        state = ops.langevin_step_(x.clone(), zero, 0.5, noise=zero, clip=clip, backend=backend)
        expected = x if clip is None else x.clamp(-clip, clip)
        assert torch.equal(state.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_a_sample_does_not_know_its_batch(backend):
    shape = (9, 3, 7, 7)
    x = random(shape).cuda()
    whole = ops.langevin_step_(x.clone(), -x, 0.1, seed=11, step=3, backend=backend)
    for first, last in ((0, 1), (1, 4), (4, 9)):
        part = x[first:last].clone()
        ops.langevin_step_(part, -part, 0.1, seed=11, step=3, sample_offset=first, backend=backend)
        assert torch.equal(part, whole[first:last])


def test_backends_agree():
    shape = (4, 3, 16, 16)
    arguments = dict(seed=SEED, step=3, sample_offset=5, device="cuda")
    native, triton = (ops.philox_bits(shape, **arguments, backend=b) for b in BACKENDS)
    assert torch.equal(native, triton)
    native, triton = (ops.philox_normal(shape, **arguments, backend=b) for b in BACKENDS)
    assert (native - triton).abs().max() <= 2 * tolerances.NORMAL


def test_side_stream(backend):
    """The step is queued behind the work of the current stream, not of the default one."""
    shape = (4, 3, 32, 32)
    score = torch.zeros(shape, device="cuda")
    x = torch.zeros(shape, device="cuda")
    ops.langevin_step_(x, score, 0.1, seed=5, backend=backend)  # compiled and loaded
    x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
        x.fill_(2.0)
        ops.langevin_step_(x, score, 0.1, seed=5, backend=backend)
    side.synchronize()
    z = oracle.normal(shape, 5, stream=oracle.STREAM_LANGEVIN)
    assert_close(x, 2.0 + math.sqrt(2 * float(np.float32(0.1))) * z)


def test_graph_serves_every_step(backend):
    """One captured step, replayed with a counter and a step size on the device."""
    shape, sizes = (3, 3, 8, 8), (0.1, 0.1, 0.02, 0.02, 0.003)
    x = random(shape).cuda()
    expected = x.clone()
    for step, size in enumerate(sizes):
        ops.langevin_step_(expected, -expected, size, seed=9, step=step, clip=3.0, backend=backend)

    state, size = x.clone(), torch.zeros(1, device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def one_step() -> None:
        ops.langevin_step_(state, -state, size, seed=9, step=step, clip=3.0, backend=backend)
        step.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads: neither is allowed in a capture
        one_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step()
    state.copy_(x)
    step.zero_()
    for value in sizes:
        size.fill_(value)
        graph.replay()
    assert step.item() == len(sizes)
    assert torch.equal(state, expected)


@pytest.fixture
def sync_mode() -> Iterator[None]:
    """Undoes what the test sets: that a synchronising call of PyTorch raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_synchronisation_and_no_allocation(backend, sync_mode):
    shape = (4, 3, 16, 16)
    x, score = random(shape).cuda(), random(shape).cuda().bfloat16()
    size = torch.full((), 0.1, device="cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def steps() -> None:
        ops.langevin_step_(x, score, size, seed=1, step=step, backend=backend)
        ops.langevin_step_(x, score, 0.1, seed=1, step=4, clip=1.0, backend=backend)

    steps()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    steps()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_triton_compiles_once():
    """No batch size, seed, step, offset, step size or clip compiles the kernel anew."""
    triton = pytest.importorskip("triton")
    compiled = []

    def steps(n: int, seed: int, step: int, offset: int, size: float, clip: float) -> None:
        x = torch.zeros(n, 3, 8, 8, device="cuda")
        numbers = dict(seed=seed, step=step, sample_offset=offset)
        ops.langevin_step_(x, x.clone(), size, clip=clip, **numbers, backend="triton")
        ops.philox_normal(x.shape, **numbers, device="cuda", backend="triton")

    steps(3, 5, 2, 7, 0.5, 2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call)
        )
        for n, number in ((1, 0), (16, 1), (17, 16), (2, 2**31)):
            steps(n, number, number, number, 1.0, 1.0)
        steps(3, 2**64 - 1, 2**32 - 1, 2**32 - 3, 0.0, 0.0)
    assert not compiled


@pytest.mark.slow
@pytest.mark.matrix  # takes 32 GiB, which tests beside it may hold
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_more_than_2_31_elements(backend, fmt):
    shape = (1, 3, 26760, 26760)
    elements = math.prod(shape)
    assert elements > 2**31
    if torch.cuda.mem_get_info()[0] < 16 * elements:
        pytest.skip("needs 32 GiB of free GPU memory")
    x = torch.zeros(shape, device="cuda").contiguous(memory_format=fmt)
    score = torch.ones(shape, device="cuda", dtype=torch.float16).contiguous(memory_format=fmt)
    ops.langevin_step_(x, score, 0.5, seed=SEED, step=1, backend=backend)
    for element in (0, 2**31 - 4, 2**31, elements - 4):
        counter = np.array([element // 4, 0, 1, oracle.STREAM_LANGEVIN], np.uint64)
        expected = 0.5 + oracle.box_muller(oracle.words(counter, oracle.key_of(SEED)))
        places = zip(*np.unravel_index(np.arange(element, element + 4), shape), strict=True)
        assert_close(torch.stack([x[tuple(map(int, place))] for place in places]), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(backend):
    """The launch follows the tensors, not the current device."""
    shape = (3, 3, 8, 8)
    assert torch.cuda.current_device() == 0
    x = random(shape).to("cuda:1")
    z = oracle.normal(shape, 5, 6, 0, oracle.STREAM_LANGEVIN)
    expected = oracle.langevin_step(x.cpu().numpy(), -x.cpu().double().numpy(), 0.1, noise=z)
    ops.langevin_step_(x, -x, 0.1, seed=5, step=6, backend=backend)
    assert_close(x, expected)
    u = ops.philox_uniform(shape, seed=5, device="cuda:1", backend=backend)
    assert (u.cpu().numpy() == oracle.uniform(shape, 5)).all()
    assert torch.cuda.current_device() == 0
