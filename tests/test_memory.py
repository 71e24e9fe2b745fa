"""Memory does not grow from call to call: of no operator, of no sampling run and of no training step."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys

import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, memory, ops
from ncsn_fast.ops.record import record_backends
from ncsn_fast.schedules import make_sigmas


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


try:
    _mallinfo2 = ctypes.CDLL(None).mallinfo2
    _mallinfo2.restype = MallocInfo
except (AttributeError, OSError, TypeError):
    _mallinfo2 = None

needs_glibc = pytest.mark.skipif(
    _mallinfo2 is None or not sys.platform.startswith("linux"),
    reason="the live heap is asked of glibc 2.33 or later (mallinfo2)",
)
pytestmark = [needs_glibc, pytest.mark.usefixtures("one_thread")]


def live_heap() -> int:
    """Bytes that malloc has given out and not got back."""
    gc.collect()
    info = _mallinfo2()
    return info.uordblks + info.hblkhd


def growth(call, calls: int) -> float:
    """Bytes of heap that stay behind after each call, the least of three measurements."""
    for _ in range(10):
        call()
    least = float("inf")
    for _ in range(3):
        before = live_heap()
        for _ in range(calls):
            call()
        least = min(least, (live_heap() - before) / calls)
    return least


@pytest.fixture(autouse=True)
def only_new_objects():
    """What the process holds by now the collector leaves alone: after other tests it takes seconds, each time."""
    gc.freeze()
    yield
    gc.unfreeze()


X = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
LABELS, TABLE = torch.tensor([0, 1]), torch.randn(2, 32)
WEIGHT, BIAS = torch.randn(16, 16, 3, 3), torch.randn(16)
SEED = {"seed": 1}
ROW = torch.tensor([[1.0, 0.1, 0.2, 0.0, 0.0]])  # of the solvers

OPERATORS = {
    "cond_instance_norm_elu": lambda x: ops.cond_instance_norm_elu(x, LABELS, TABLE),
    "max_pool5, neg_inf": lambda x: ops.max_pool5(x),
    "max_pool5, zero": lambda x: ops.max_pool5(x, padding="zero"),
    "avg_pool5": lambda x: ops.avg_pool5(x),
    "elu_conv3x3": lambda x: ops.elu_conv3x3(x, WEIGHT, BIAS),
    "conv3x3": lambda x: ops.conv3x3(x, WEIGHT, BIAS, residual=X),
    "norm_elu_conv3x3": lambda x: ops.norm_elu_conv3x3(x, LABELS, TABLE, WEIGHT, BIAS),
    "norm_elu_conv3x3, pool": lambda x: ops.norm_elu_conv3x3(
        x, LABELS, TABLE, WEIGHT, BIAS, pool="zero"
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_forward_and_backward_keeps_nothing(name):
    operator, x = OPERATORS[name], X.clone().requires_grad_()

    def forward():
        with torch.no_grad():
            operator(X)

    def backward():
        x.grad = None
        operator(x).sum().backward()

    with record_backends() as ran:
        backward()
    assert set(ran) and all(backend == "native" for _, backend in ran), ran
    assert growth(forward, 200) < 16
    assert growth(backward, 200) < 16


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.langevin_step_(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), 0.1, **SEED),
        lambda: ops.solver_step_(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), ROW, 0, **SEED),
        lambda: ops.philox_normal((2, 40), **SEED),
        lambda: ops.philox_uniform((2, 40), **SEED),
        lambda: ops.philox_bits((2, 40), **SEED),
    ],
    ids=["langevin_step_", "solver_step_", "philox_normal", "philox_uniform", "philox_bits"],
)
def test_noise_keeps_nothing(call):
    assert growth(call, 200) < 16


def small_network() -> NCSN:
    sigmas = make_sigmas(1.0, 0.1, 2)
    return NCSN(NCSNConfig(in_channels=1, nf=8, num_classes=2, sigmas=sigmas))


def test_sampling_keeps_nothing():
    model = small_network()

    def sample():
        model.sample(2, 8, 1, n_steps_each=2, step_lr=1e-3, seed=0, verbose=False)

    # Python keeps some objects in pools of its own; a leak of a call of the pool's would be 3 KB here.
    assert growth(sample, 20) < 512


def test_a_training_step_keeps_nothing():
    model = small_network()
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.rand(4, 1, 8, 8) * 2 - 1

    def step():
        loss, _ = model.get_loss(images, seed=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert growth(step, 20) < 512


def test_the_resident_memory_does_not_grow():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    model = small_network()
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    for _ in range(30):
        model.get_loss(images, seed=1)[0].backward()
    before = resident()
    for _ in range(150):
        model.get_loss(images, seed=1)[0].backward()
    # Pages can be lost without a malloc, which the live heap does not show.
    assert resident() - before < 8 * 2**20


KEPT = """
import resource, sys
import torch
from ncsn_fast import memory

def faults():
    for turn in range(5):
        if turn == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.full((1 << 24,), 1.0)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

anew = faults()
assert memory.kept() == 0
memory.keep_freed_memory()
assert memory.kept() == memory.KEPT
kept, held = faults(), resident()
memory.release_memory()
assert resident() < held - (1 << 25), (resident(), held)
memory.keep_freed_memory(0)
again = faults()
print(anew, kept, again)
"""


def test_freed_memory_is_kept_until_it_is_released():
    """Counted by the pages that the system had to hand out anew."""
    result = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    anew, kept, again = map(int, result.stdout.split())
    assert anew >= 3 * 16 and again >= 3 * 16  # pages of 4 MiB at most
    assert kept < 16


def test_what_cannot_be_kept_is_refused(monkeypatch):
    for wrong, error in (
        (-1, ValueError),
        (2**31, ValueError),
        (1.5, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="limit must be"):
            memory.keep_freed_memory(wrong)
    monkeypatch.setattr(sys, "platform", "darwin")
    for call in (memory.keep_freed_memory, memory.release_memory):
        with pytest.raises(RuntimeError, match="mallopt, which darwin does not have"):
            call()
