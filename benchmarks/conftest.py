"""What all benchmarks share: the device, and a timed call that waits for it."""

from __future__ import annotations

import pytest
import torch


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every benchmark that takes a ``device`` runs on each that is there."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Puts versions, devices and the build beside the figures."""
    from ncsn_fast import info

    machine_info["ncsn_fast"] = info.collect()


@pytest.fixture
def timed(benchmark):
    """``timed(function, device, **facts)``: the benchmark of a call, the device's work included."""

    def run(function, device: str, **facts) -> None:
        benchmark.extra_info.update(facts, device=device)

        def call() -> None:
            function()
            if device == "cuda":
                torch.cuda.synchronize()

        for _ in range(3):
            call()
        benchmark(call)

    return run
