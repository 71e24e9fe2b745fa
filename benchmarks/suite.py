"""A case and its peers, and how a case is run: correctness first, then modes, then interleaved times.

Cases are made by the modules of ``cases/``, each with a function ``cases(settings)``; a new module there is found by
itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ncsn_fast import info
from ncsn_fast.ops.tolerances import TOLERANCES, Tolerance, relative_error

from . import cases as cases_package
from .measure import (
    Clock,
    Load,
    Timed,
    Times,
    TurnFailed,
    copy_bandwidth,
    interleaved,
    matmul_rate,
    noise_of,
    peak_memory,
)
from .results import FAILED, NOISY, NOT_RUN, OK, WRONG, NotRun, Result, commit
from .tf32 import in_tf32, tf32

SUITES = ("ops", "model", "train", "sample")
Outputs = tuple[Tensor, ...]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}


class WrongMode(RuntimeError):
    """A peer did not run in the mode that its name says."""


def graphs_and_breaks() -> tuple[int, int]:
    """How many graphs torch.compile has made in this process, and how many breaks it met."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@dataclass(frozen=True)
class Settings:
    """What was asked for; case modules read it to decide what they make.

    Attributes:
        device: where to run.
        dtypes: of the operators; see also :attr:`network_dtypes`.
        batches: instead of a case's own batch sizes; None for those.
        quick: a few representative shapes instead of all.
        compiled: with the peers under torch.compile, which take most of a run's time.
        engines: with inference engines, which are processes of their own (``engines.py``).
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...] | None = None
    quick: bool = False
    compiled: bool = True
    engines: bool = False

    @property
    def network_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of whole networks: a quick run takes the first alone."""
        return self.dtypes[:1] if self.quick else self.dtypes

    def batch_sizes(self, full: tuple[int, ...], quick: tuple[int, ...]) -> tuple[int, ...]:
        """The batch sizes that were asked for, else the case's own."""
        return self.batches or (quick if self.quick else full)


@dataclass(frozen=True)
class Prepared:
    """A peer that has run once, in the mode that its name says.

    Attributes:
        timed: the call.
        outputs: what is compared with the expected outputs.
        backend: what ran.
        out_layout: of the first output.
        graphs: how many torch.compile made; None without it.
    """

    timed: Timed
    outputs: Callable[[], Outputs]
    backend: str
    out_layout: str = ""
    graphs: int | None = None


@dataclass(frozen=True)
class Peer:
    """One way to do a case's work. ``prepare`` makes its inputs, warms it up and proves its mode."""

    name: str
    layout: str
    prepare: Callable[[], Prepared]


@dataclass(frozen=True)
class Case:
    """A piece of work, the ways to do it, and what must come out.

    Attributes:
        suite: one of SUITES.
        group: the operator, layer or loop.
        name: what of it, such as ``"forward"``.
        shape: of the input.
        dtype: of the input.
        peers: the ways; those whose names begin with "eager" are what speed-ups are over.
        expected: the outputs in float64.
        tolerance: relative L2 distance from them that is still right.
        setting: what else varies, such as ``"nf=128"``.
        bytes: that must be read and written, at the least; 0 if arithmetic is the limit.
        flops: of the direct algorithm; 0 if memory is the limit.
        tf32: whether float32 may be computed in TF32.
    """

    suite: str
    group: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    peers: tuple[Peer, ...]
    expected: Callable[[], Outputs]
    tolerance: float
    setting: str = ""
    bytes: int = 0
    flops: int = 0
    tf32: bool = False

    @property
    def precision(self) -> str:
        """The dtype's name, or "tf32"."""
        return "tf32" if self.tf32 else dtype_name(self.dtype)

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        parts = (self.group, self.name, shape, self.precision, self.setting)
        return " ".join(part for part in parts if part)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Of a whole network: some eighty operators add up their errors (eager PyTorch is 5e-6 off in float32), and a maximum
# that rounding moves to the next pixel sends its gradient there. A mistake is off by 1.
NETWORK_TOLERANCES = {
    torch.float32: Tolerance(1e-4, 3e-2),
    torch.float16: Tolerance(2e-2, 1e-1),
    torch.bfloat16: Tolerance(1e-1, 3e-1),
}


def tolerance_of(dtype: torch.dtype, *, backward: bool = False, network: bool = False) -> float:
    """The project's tolerance for an operator, or that for a network."""
    tolerance = (NETWORK_TOLERANCES if network else TOLERANCES)[dtype]
    return tolerance.gradient if backward else tolerance.forward


def find_cases(settings: Settings, suites: tuple[str, ...] = SUITES) -> list[Case]:
    """The cases of all modules of ``cases/``, in the order of SUITES."""
    found = []
    for module in pkgutil.iter_modules(cases_package.__path__):
        made = importlib.import_module(f"{cases_package.__name__}.{module.name}").cases(settings)
        for case in (case for case in made if case.suite in suites):
            if not settings.compiled:
                peers = tuple(peer for peer in case.peers if "compile" not in peer.name)
                case = dataclasses.replace(case, peers=peers)
            found += [case, *in_tf32(case, settings.device)]
    return sorted(found, key=lambda case: SUITES.index(case.suite))


@dataclass(frozen=True)
class Effort:
    """How long each peer is measured, and at least how often."""

    seconds: float
    min_rounds: int


QUICK_EFFORT, FULL_EFFORT = Effort(0.3, 5), Effort(0.5, 5)


@dataclass(frozen=True)
class Bench:
    """Runs cases on one machine: its clock, its limits, its facts."""

    clock: Clock
    limits: dict[str, float]
    facts: dict[str, str | int]
    effort: Effort

    def run(self, case: Case, tell: Callable[[str], None] = lambda what: None) -> list[Result]:
        """One result for each peer. A peer that is wrong, or fails, has no time and says why.

        ``tell`` is called with what is being done, for a progress display.
        """
        return [result for result, _ in self.run_with_times(case, tell)]

    def run_with_times(
        self, case: Case, tell: Callable[[str], None] = lambda what: None
    ) -> list[tuple[Result, Times | None]]:
        """:meth:`run`, with all rounds of each result."""
        with tf32(case.tf32):
            return self._run(case, tell)

    def _run(self, case: Case, tell: Callable[[str], None]) -> list[tuple[Result, Times | None]]:
        torch._dynamo.reset()  # graphs of the case before
        tell("float64 reference")
        expected = case.expected()
        outcomes = [_Outcome(peer) for peer in case.peers]
        for outcome in outcomes:
            tell(f"checking {outcome.peer.name} {outcome.peer.layout}")
            outcome.prepare(expected, case.tolerance, self.clock.device)
        self._time([o for o in outcomes if o.status == OK], tell)
        eager = [o.times.median for o in outcomes if o.times and o.peer.name.startswith("eager")]
        baseline = min(eager, default=None)
        return [(self._result(case, outcome, baseline), outcome.times) for outcome in outcomes]

    def _time(self, outcomes: list[_Outcome], tell: Callable[[str], None]) -> None:
        if not outcomes:
            return
        timed_calls = [o.prepared.timed for o in outcomes]
        rounds = interleaved(timed_calls, self.clock, **dataclasses.asdict(self.effort))
        graphs = graphs_and_breaks()
        try:
            with Load() as load:
                for times in rounds:
                    tell(f"timing, round {len(times[0].rounds)}")
        except TurnFailed as stop:
            guilty = next(o for o in outcomes if o.prepared.timed is stop.timed)
            guilty.fail(stop.__cause__)
            return self._time([o for o in outcomes if o is not guilty], tell)
        lasted = graphs_and_breaks() == graphs
        for outcome, measured in zip(outcomes, times, strict=True):
            outcome.finish(measured, load.others, lasted)

    def not_run(self, case: Case, why: str) -> list[Result]:
        """The rows of a case there was no time for."""
        outcomes = [_Outcome(peer, NOT_RUN, why) for peer in case.peers]
        return [self._result(case, outcome, None) for outcome in outcomes]

    def _result(self, case: Case, outcome: _Outcome, baseline: float | None) -> Result:
        times, prepared = outcome.times, outcome.prepared
        seconds = times.median if times else None
        dtype = case.precision
        gb_per_s = case.bytes / seconds / 1e9 if seconds and case.bytes else None
        gflop_per_s = case.flops / seconds / 1e9 if seconds and case.flops else None
        if gflop_per_s is not None:
            share = gflop_per_s / self.limits[f"matmul {dtype} GFLOP/s"]
        else:
            share = gb_per_s and gb_per_s / self.limits["copy GB/s"]
        low, high = times.quartiles if times else (None, None)
        return Result(
            suite=case.suite,
            group=case.group,
            name=case.name,
            shape="x".join(map(str, case.shape)),
            dtype=dtype,
            setting=case.setting,
            device=self.clock.device.type,
            peer=outcome.peer.name,
            layout=outcome.peer.layout,
            backend=prepared.backend if prepared else "",
            status=outcome.status,
            note=outcome.note,
            median_us=_rounded(seconds, 1e6),
            q1_us=_rounded(low, 1e6),
            q3_us=_rounded(high, 1e6),
            rounds=len(times.rounds) if times else None,
            speedup=_rounded(baseline and seconds and baseline / seconds),
            memory_mib=_rounded(outcome.memory, 2.0**-20),
            gb_per_s=_rounded(gb_per_s),
            gflop_per_s=_rounded(gflop_per_s),
            limit_share=_rounded(share),
            error=_rounded(outcome.error),
            out_layout=prepared.out_layout if prepared else "",
            graphs=prepared.graphs if prepared else None,
            **self.facts,
        )


@dataclass
class _Outcome:
    """The state of a peer while its case runs: proven, checked, timed, or failed."""

    peer: Peer
    status: str = OK
    note: str = ""
    prepared: Prepared | None = None
    error: float | None = None
    memory: int | None = None
    times: Times | None = None

    def prepare(self, expected: Outputs, tolerance: float, device: torch.device) -> None:
        try:
            self.prepared = self.peer.prepare()
            error = worst_error(self.prepared.outputs(), expected)
            if not error <= tolerance:  # NaN is wrong too
                self.status = WRONG
                self.note = f"relative error {error:.1e}, tolerance {tolerance:.0e}"
            if math.isfinite(error):  # JSON has no other numbers
                self.error = error
            if self.status == WRONG:
                return
            timed = self.prepared.timed
            if timed.turn is not None:  # torch allocates nothing of it
                return
            self.memory = peak_memory(
                lambda: (timed.before and timed.before(), timed.call()), device
            )
        except NotRun as reason:
            self.status, self.note = NOT_RUN, str(reason)
        except Exception as error:  # whatever a peer does, the others are measured
            self.fail(error)

    def fail(self, error: Exception) -> None:
        self.status = FAILED
        self.note = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def finish(self, times: Times, load: float, lasted: bool) -> None:
        if not lasted and self.prepared.graphs is not None:
            self.status = FAILED
            self.note = "torch.compile compiled again while the case was timed"
            return
        self.times = times
        self.note = noise_of(times, load)
        if self.note:
            self.status = NOISY


def worst_error(outputs: Outputs, expected: Outputs) -> float:
    """The largest relative L2 distance of an output."""
    errors = [relative_error(a, b.to(a.device)) for a, b in zip(outputs, expected, strict=True)]
    return max(errors, key=lambda e: (e != e, e))  # NaN is the largest


def _rounded(value: float | None, unit: float = 1.0) -> float | None:
    return None if value is None else float(f"{value * unit:.4g}")


def start(device: torch.device, dtypes: tuple[torch.dtype, ...], *, quick: bool) -> Bench:
    """Measures the limits of the device and collects the facts that go into every row."""
    clock = Clock(device)
    machine = info.collect()
    name = next(d["name"] for d in machine["devices"] if d["device"].startswith(device.type))
    facts = {
        "threads": torch.get_num_threads(),
        "device_name": name,
        "torch": torch.__version__,
        "triton": machine["packages"]["triton"] or "",
        "ncsn_fast": machine["ncsn_fast"],
        "commit": commit(),
        "date": date.today().isoformat(),
    }
    effort = QUICK_EFFORT if quick else FULL_EFFORT
    return Bench(clock, measure_limits(clock, dtypes), facts, effort)


def measure_limits(clock: Clock, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """What a copy and a matrix product reach on this device."""
    limits = {"copy GB/s": copy_bandwidth(clock)}
    for dtype in dtypes:
        with tf32(False):
            limits[f"matmul {dtype_name(dtype)} GFLOP/s"] = matmul_rate(clock, dtype)
    if clock.device.type == "cuda" and torch.float32 in dtypes:
        with tf32(True):
            limits["matmul tf32 GFLOP/s"] = matmul_rate(clock, torch.float32)
    return {name: _rounded(value) for name, value in limits.items()}


def run_all(
    bench: Bench, cases: list[Case], minutes: float | None, tell: Callable[[Case, str], None]
) -> Iterator[tuple[Case, list[Result]]]:
    """Each case and its results; cases that no time is left for come back as not run."""
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for case in cases:
        if time.monotonic() > end:
            yield case, bench.not_run(case, f"the {minutes:g} minutes were over")
        else:
            yield case, bench.run(case, lambda what, case=case: tell(case, what))
