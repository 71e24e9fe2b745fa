"""Options of ``pytest benchmarks``, and the facts of the machine in its JSON."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ncsn_fast benchmarks")
    group.addoption("--suite", action="append", help="ops, model, train or sample; default: all")
    group.addoption("--device", default="auto", help="cpu, cuda or auto")
    group.addoption("--dtype", action="append", help="float32, bfloat16 or float16")
    group.addoption("--batch", help="batch sizes, such as 1,16")
    group.addoption("--quick", action="store_true", help="a few representative shapes")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Puts versions, devices and the build beside the figures."""
    from ncsn_fast.benchmarks.results import machine

    machine_info["ncsn_fast"] = machine()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each peer of each case."""
    if "peer" not in metafunc.fixturenames:
        return
    from ncsn_fast.benchmarks import suite
    from ncsn_fast.benchmarks.command import settings_of, suites_of

    option = metafunc.config.option
    try:
        settings = settings_of(option.device, option.dtype, option.batch, quick=option.quick)
        suites = suites_of(option.suite)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    pairs = [
        pytest.param(settings, case, peer, id=f"{case.label} {peer.name} {peer.layout}")
        for case in suite.find_cases(settings, suites)
        for peer in case.peers
    ]
    metafunc.parametrize(("settings", "case", "peer"), pairs)
