"""The cases under pytest-benchmark: a group for each case, a test for each peer.

The peers of a case are measured together and interleaved, as ``ncsn-fast bench`` does; each test then hands the rounds
of its peer to pytest-benchmark, which shows, saves and compares them.
"""

from __future__ import annotations

import pytest

from ncsn_fast.benchmarks import suite
from ncsn_fast.benchmarks.results import OK, Result
from ncsn_fast.benchmarks.suite import Bench, Case, Peer, Settings

_benches: dict[Settings, Bench] = {}
_measured: dict[str, tuple] = {}  # of the last case only


def measure(settings: Settings, case: Case, peer: Peer) -> tuple[Result, object]:
    """The result of a peer and its rounds; measures the whole case when its first peer comes."""
    if settings not in _benches:
        start = suite.start(settings.device, settings.dtypes, quick=settings.quick)
        _benches[settings] = start
    if case.label not in _measured:
        _measured.clear()
        _measured[case.label] = _benches[settings].run_with_times(case)
    rows = _measured[case.label]
    return next(row for row in rows if (row[0].peer, row[0].layout) == (peer.name, peer.layout))


def test_benchmark(benchmark, settings, case, peer):
    result, times = measure(settings, case, peer)
    benchmark.group = f"{case.suite}: {case.label}"
    benchmark.extra_info.update(vars(result))
    if times is None:
        pytest.fail(f"{result.status}: {result.note}", pytrace=False)
    # pytest-benchmark would time each peer on its own, some minutes apart; this hands it rounds that were interleaved.
    stats = benchmark._make_stats(times.calls)
    for seconds in times.rounds:
        stats.update(seconds * times.calls)
    if result.status != OK:
        print(f"{result.status}: {result.note}")
