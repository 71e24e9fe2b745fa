"""What all tests share: the CUDA marker, and the proof of which backend really ran."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from ncsn_fast.benchmarks.tf32 import tf32
from ncsn_fast.ops.record import record_backends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` are skipped, by name, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests marked ``cuda`` a convolution of float32 is one of float32."""
    if request.node.get_closest_marker("cuda") is None:
        yield
        return
    with tf32(False):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of small work wait for one another without end where other processes hold the CPUs; caches that each has
    of its own would blur a count of memory.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# TorchInductor keeps what it compiled under names that do not tell for which of these levels it was.
if os.environ.get("ATEN_CPU_CAPABILITY"):
    user = getpass.getuser()
    own = f"torchinductor_{user}_{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), own))

LOST = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """After an illegal access nothing works on the GPU in this process: no later test is to be blamed for it.

    Under pytest-xdist the process ends, and a new one takes the tests that are left; else the run stops.
    """
    report = yield
    if report.failed and item.get_closest_marker("cuda"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            item.stash[LOST] = True
    if report.when == "teardown" and item.stash.get(LOST, False):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        item.session.shouldstop = f"the GPU's state was lost in {item.nodeid}"
    return report


@pytest.fixture(name="record_backends")
def record_backends_fixture():
    """``with record_backends() as ran``: see :func:`ncsn_fast.ops.record.record_backends`."""
    return record_backends
