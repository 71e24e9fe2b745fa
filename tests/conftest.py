"""What all tests share: the CUDA marker, and the proof of which backend really ran."""

from __future__ import annotations

import pytest
import torch

from ncsn_fast.ops.record import record_backends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` are skipped, by name, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(name="record_backends")
def record_backends_fixture():
    """``with record_backends() as ran``: see :func:`ncsn_fast.ops.record.record_backends`."""
    return record_backends
