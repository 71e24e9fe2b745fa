"""The solvers' step in the backends of this machine's CPU, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from support import philox_oracle as oracle
from support.tolerances import NORMAL
from torch._dynamo.testing import CompileCounterWithBackend

from ncsn_fast import ops, use_backend

BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((2, 3, 8, 8), (3, 5, 7, 9), (2, 3, 1, 1), (4, 1030), (5,), (2, 2, 3, 4, 5), (0, 3, 4, 4))
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
TABLE = torch.tensor(
    [[0.0, 9.0, 9.0, 9.0, 9.0], [0.7, -0.4, 0.3, 1.3, 0.2], [1.0, 0.5, 1.5, 0.0, 0.0]]
)
COUNTER = {"seed": 2**64 - 3, "step": 17, "sample_offset": 5}


def tensor(shape, dtype=torch.float32, channels_last=False, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if channels_last and len(shape) in CHANNELS_LAST:
        t = t.contiguous(memory_format=CHANNELS_LAST[len(shape)])
    return t


def expected_step(x, score, previous, z, row):
    """The formula in float64, on the numbers that float32 holds."""
    a, b, c, d, e = row.double()
    x, score = x.double(), score.double()
    y = a * x + b * score + c * z
    return (y, None) if previous is None else (y + e * previous.double(), x + d * score)


def assert_step(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=3e-7, atol=NORMAL)


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend, shape, dtype, record_backends):
    drawn = torch.from_numpy(oracle.normal(shape, stream=oracle.STREAM_LANGEVIN, **COUNTER))
    for last in range(4):
        for multistep in (False, True):
            for noisy in (False, True):
                x = tensor(shape, channels_last=last % 2 == 1)
                score = tensor(shape, dtype, last // 2 == 1, seed=1)
                previous = torch.empty_like(x).copy_(tensor(shape, seed=2)) if multistep else None
                z = drawn if noisy else torch.zeros(shape, dtype=torch.float64)
                expected, memory = expected_step(x, score, previous, z, TABLE[1])
                strides = x.stride()
                noise = COUNTER if noisy else {}
                with record_backends() as ran:
                    result = ops.solver_step_(
                        x, score, TABLE, 1, previous=previous, backend=backend, **noise
                    )
                assert result is x and x.stride() == strides
                assert ran == ([("solver_step_", "native")] if backend == "native" else [])
                assert_step(x, expected)
                if multistep:
                    assert_step(previous, memory)


@BACKENDS
def test_level_and_step_as_tensors(backend):
    x, score = tensor((2, 3, 4, 4)), tensor((2, 3, 4, 4), seed=1)
    for level in range(3):
        numbers = ops.solver_step_(x.clone(), score, TABLE, level, seed=9, step=12, backend=backend)
        for shape in ((), (1,)):
            place = {"step": torch.full(shape, 12), "backend": backend}
            at = torch.full(shape, level)
            got = ops.solver_step_(x.clone(), score, TABLE.double(), at, seed=9, **place)
            assert torch.equal(got, numbers)
    # A level on the device that is beyond the table reads nothing else.
    for beyond, level in ((-5, 0), (7, 2)):
        got = ops.solver_step_(x.clone(), score, TABLE, torch.tensor(beyond), backend=backend)
        expected = ops.solver_step_(x.clone(), score, TABLE, level, backend=backend)
        assert torch.equal(got, expected)


def test_what_goes_through_the_reference(record_backends):
    """A state in float64, explicit noise, other strides; by name they are refused."""
    shape = (2, 3, 4, 4)
    z = tensor(shape, seed=3)
    wide = tensor((2, 3, 4, 8))
    previous = tensor(shape, channels_last=True, seed=2)
    calls = {
        "float32, got torch.float64": (tensor(shape).double(), {}),
        "explicit noise": (tensor(shape), {"noise": z}),
        "strides": (wide[..., ::2], {}),
        "layout of x": (tensor(shape), {"previous": previous}),
    }
    for reason, (x, given) in calls.items():
        score = tensor(shape, seed=1)
        expected, memory = expected_step(
            x, score, given.get("previous"), given.get("noise", torch.zeros(shape)), TABLE[1]
        )
        with pytest.raises(RuntimeError, match=reason):
            ops.solver_step_(x, score, TABLE, 1, backend="native", **given)
        with record_backends() as ran:
            ops.solver_step_(x, score, TABLE, 1, **given)
        assert ran == []
        assert_step(x, expected)
    assert_step(previous, memory)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nothing_outside_is_written(threads):
    """State and memory lie between canaries; threads do not change a bit."""
    shape, score = (7, 3, 31, 9), tensor((7, 3, 31, 9), seed=1)
    size, before = math.prod(shape), torch.get_num_threads()
    memory = torch.full((2, size + 128), 123.0)
    x, previous = (part[64:-64].view(shape) for part in memory)
    try:
        torch.set_num_threads(threads)
        x.copy_(tensor(shape)), previous.copy_(tensor(shape, seed=2))
        ops.solver_step_(x, score, TABLE, 1, previous=previous, seed=4, backend="native")
        torch.set_num_threads(1)
        one, old = tensor(shape), tensor(shape, seed=2)
        ops.solver_step_(one, score, TABLE, 1, previous=old, seed=4, backend="native")
    finally:
        torch.set_num_threads(before)
    assert (memory[:, :64] == 123).all() and (memory[:, -64:] == 123).all()
    assert torch.equal(x, one) and torch.equal(previous, old)


def test_opcheck():
    x, score = tensor((2, 3, 4, 5)), tensor((2, 3, 4, 5), torch.bfloat16, True, seed=1)
    step, level = torch.tensor(3), torch.tensor(1)
    for arguments in (
        (x, score, None, TABLE, 1, None, True, 5, 3, None, 2),
        (x, score, x.clone(), TABLE, 0, level, False, 0, 0, step, 0),
    ):
        torch.library.opcheck(torch.ops.ncsn_fast.solver_step_.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_fullgraph(backend):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def call(x, score, previous, level, step):
        return ops.solver_step_(x, score, TABLE, level, previous=previous, seed=3, step=step)

    score = tensor((2, 3, 4, 4), seed=1)
    with use_backend(backend):
        for level in (0, 1, 2):
            x, previous = tensor((2, 3, 4, 4)), tensor((2, 3, 4, 4), seed=2)
            at, step = torch.tensor(level), torch.tensor(5 + level)
            eager, memory = x.clone(), previous.clone()
            ops.solver_step_(eager, score, TABLE, at, previous=memory, seed=3, step=step)
            torch.testing.assert_close(call(x, score, previous, at, step), eager)
            torch.testing.assert_close(previous, memory)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).half()}, TypeError, "x must have dtype float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one axis"),
        ({"x": torch.zeros(1, 3).expand(2, 3)}, RuntimeError, "x must not overlap itself"),
        ({"score": torch.zeros(3, 2)}, ValueError, r"score must have shape \(2, 3\), got \(3, 2\)"),
        ({"score": torch.zeros(2, 3).requires_grad_()}, RuntimeError, "no gradient"),
        ({"previous": torch.zeros(2, 3).double()}, TypeError, "previous must have dtype float32"),
        ({"previous": torch.zeros(1, 3).expand(2, 3)}, RuntimeError, "previous must not overlap"),
        ({"table": torch.zeros(3, 4)}, ValueError, r"table must have shape \(K, 5\), got \(3, 4\)"),
        ({"table": torch.zeros(0, 5)}, ValueError, r"table must have shape \(K, 5\)"),
        ({"table": torch.zeros(3, 5).long()}, TypeError, "table must have dtype"),
        ({"level": 3}, ValueError, r"level must be in 0 .. 2, got 3"),
        ({"level": -1}, ValueError, "level must be in"),
        ({"level": torch.tensor([1, 2])}, ValueError, r"one element, got shape \(2,\)"),
        ({"step": torch.tensor(1, dtype=torch.int32)}, TypeError, "step must have dtype int64"),
        ({"noise": torch.zeros(2, 3)}, ValueError, "at most one of seed and noise.*got both"),
        ({"sample_offset": -1}, ValueError, "sample_offset must be in"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"x": torch.zeros(2, 3), "score": torch.zeros(2, 3), "table": TABLE, "level": 1}
    with pytest.raises(error, match=message):
        ops.solver_step_(**arguments | {"seed": 1} | change)


def test_the_operator_guards_its_memory():
    """Direct calls, past the public function's checks."""
    step = torch.ops.ncsn_fast.solver_step_.default
    x = torch.zeros(2, 3, 4, 4)
    rest = (1, None, False, 0, 0, None, 0)
    bad = {
        "score": (x, torch.zeros(2, 3, 4, 5), None, TABLE),
        "shape of x": (x, x.clone(), torch.zeros(2, 3, 4), TABLE),
        "strides of x": (x, x.clone(), x.contiguous(memory_format=torch.channels_last), TABLE),
        "float32": (x.double(), x.double(), None, TABLE),
        "previous must be float32": (x, x.clone(), x.double(), TABLE),
        "table must be": (x, x.clone(), None, TABLE.double()),
        "contiguous": (x, x.clone(), None, torch.zeros(5, 3).T),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            step(*arguments, *rest)


@BACKENDS
def test_a_graph_that_saved_the_state_notices(backend):
    x, previous, weight = tensor((2, 3)), tensor((2, 3)), torch.ones(2, 3, requires_grad=True)
    for saved in (x, previous):
        y = (saved * weight).sum()
        ops.solver_step_(x, torch.zeros(2, 3), TABLE, 1, previous=previous, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
