"""What all tests share: the CUDA marker, and the proof of which backend really ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_fast.ops import extension


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` are skipped, by name, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


class _Recorder(TorchDispatchMode):
    def __init__(self, ran: list[tuple[str, str]]) -> None:
        super().__init__()
        self.ran = ran

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "ncsn_fast_triton":
            self.ran.append((name, "triton"))
        elif namespace == "ncsn_fast":
            device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
            compiled = extension.has_kernel(name, "native", device)
            self.ran.append((name, "native" if compiled else "reference"))
        return func(*args, **(kwargs or {}))


@contextmanager
def _record() -> Iterator[list[tuple[str, str]]]:
    ran: list[tuple[str, str]] = []
    with _Recorder(ran):
        yield ran


@pytest.fixture
def record_backends():
    """``with record_backends() as ran``: the (operator, backend) pairs that the dispatcher ran.

    A backend that only claims to have run is not in the list: an operator counts as native only if compiled code is
    registered for it, and a call of the plain-PyTorch reference leaves no entry at all.
    """
    return _record
