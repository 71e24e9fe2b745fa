"""The clock, the load of the machine, memory, and what the hardware can do at most.

Nothing here knows what is measured.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Action = Callable[[], object]

# A turn repeats a short call until it takes as long: far above the clock's own cost.
TURN_SECONDS = 0.005
MAX_ROUNDS = 200
# Larger than any cache: read and written between timed calls on a GPU, whose cache would hold small operands.
GPU_FLUSH_BYTES = 256 << 20

# From here on a figure is not trusted: the distance between the quartiles over the median, and the share of the CPUs
# that other processes used meanwhile.
NOISY_SPREAD, NOISY_LOAD = 0.2, 0.1


@dataclass(frozen=True)
class Timed:
    """A call to time.

    Attributes:
        call: it.
        before: what must happen untimed before each call, if anything.
        turn: of a call in another process, which takes its time itself: the mean seconds of so many calls.
    """

    call: Action
    before: Action | None = None
    turn: Callable[[int], float] | None = None


@dataclass
class Times:
    """Seconds a call took, one number a round."""

    rounds: list[float] = field(default_factory=list)
    calls: int = 1  # of a round; its number is their mean

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        low, high = self.quartiles
        return (high - low) / self.median


# --- the clock ------------------------------------------------------------------------------------


class Clock:
    """Times calls on a device: with device events and a flushed cache on a GPU, else by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = None
        if device.type == "cuda":
            self.flush = torch.empty(GPU_FLUSH_BYTES, dtype=torch.int8, device=device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def turn(self, timed: Timed, calls: int) -> float:
        """Mean seconds of ``calls`` calls."""
        if timed.turn is not None:
            return timed.turn(calls)
        if self.device.type == "cuda":
            return self._turn_by_events(timed, calls)
        if timed.before is None:
            start = time.perf_counter()
            for _ in range(calls):
                timed.call()
            return (time.perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            timed.before()
            start = time.perf_counter()
            timed.call()
            total += time.perf_counter() - start
        return total / calls

    def _turn_by_events(self, timed: Timed, calls: int) -> float:
        pairs = []
        for _ in range(calls):
            if timed.before is not None:
                timed.before()
            # Writing this much also keeps the GPU busy while the call is launched: what is timed is its work.
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            timed.call()
            end.record()
            pairs.append((start, end))
        self.wait()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3

    def calls_a_turn(self, timed: Timed) -> int:
        """How often a call is repeated in a turn; warms it up too."""
        seconds = 0.0
        for _ in range(3):
            seconds = self.turn(timed, 1)
            if seconds > TURN_SECONDS:
                break
        return max(1, min(1000, round(TURN_SECONDS / max(seconds, 1e-7))))


class TurnFailed(RuntimeError):
    """A call raised while it was timed; ``timed`` says which."""

    def __init__(self, timed: Timed) -> None:
        super().__init__("a call failed while it was timed")
        self.timed = timed


def interleaved(
    timed_calls: Sequence[Timed], clock: Clock, *, seconds: float, min_rounds: int
) -> Iterator[list[Times]]:
    """Times all in turns, and again, in a new order each round, so that what disturbs the machine disturbs all alike.

    Args:
        timed_calls: what is timed.
        clock: of the device.
        seconds: about how long each is measured, if ``min_rounds`` allow.
        min_rounds: at the least.

    Yields:
        After every round, the times so far, one for each call.

    Raises:
        TurnFailed: from whatever a call raised.
    """

    def turn(timed: Timed, action: Callable[..., Any], *calls: int) -> Any:
        try:
            return action(timed, *calls)
        except Exception as error:
            raise TurnFailed(timed) from error

    times = [Times(calls=turn(c, clock.calls_a_turn)) for c in timed_calls]
    start = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= min_rounds and time.perf_counter() - start > seconds * len(timed_calls):
            return
        shift = number % len(timed_calls)
        for i in [*range(shift, len(timed_calls)), *range(shift)]:
            if times[i].calls > 1:
                turn(timed_calls[i], clock.turn, 1)  # the cache held another's operands
            times[i].rounds.append(turn(timed_calls[i], clock.turn, times[i].calls))
        yield times


# --- the load of the machine ----------------------------------------------------------------------

measured_processes: set[int] = set()  # by their ids: beside this one, they are no others


class Load:
    """The share of the CPUs that other processes use while a block runs; on a virtual machine, its neighbours too."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self.others = 0.0

    def _seconds(self) -> tuple[float, float]:
        total = self._psutil.cpu_times()
        idle = total.idle + getattr(total, "iowait", 0.0)
        # Linux counts a guest's time in user time as well.
        guests = getattr(total, "guest", 0.0) + getattr(total, "guest_nice", 0.0)
        own = [self._psutil.Process().cpu_times()]
        for pid in measured_processes:
            with contextlib.suppress(self._psutil.Error):  # it has ended
                own.append(self._psutil.Process(pid).cpu_times())
        return sum(total) - guests - idle, sum(times.user + times.system for times in own)

    def __enter__(self) -> Load:
        self._start = time.perf_counter()
        self._before = self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own = (b - a for a, b in zip(self._before, self._seconds(), strict=True))
        wall = time.perf_counter() - self._start
        # The kernel counts in hundredths of a second: over a shorter block the share would be made of rounding.
        if wall > 0.2:
            self.others = max(0.0, busy - own) / (wall * self._psutil.cpu_count())


def noise_of(times: Times, load: float) -> str:
    """Why a figure is not to be trusted; empty if it is."""
    reasons = []
    if load > NOISY_LOAD:
        reasons.append(f"other processes used {load:.0%} of the CPUs")
    if times.spread > NOISY_SPREAD:
        reasons.append(f"the quartiles lie {times.spread:.0%} of the median apart")
    return "; ".join(reasons)


# --- memory ---------------------------------------------------------------------------------------


def peak_memory(action: Action, device: torch.device) -> int:
    """The most bytes that torch's allocator held at once during a call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = action()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its start and end
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
        del result
    held = most = 0
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# --- limits of the hardware -----------------------------------------------------------------------

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
LIMIT_SECONDS = 0.5


def copy_bandwidth(clock: Clock) -> float:
    """GB/s, read and written, of a copy far larger than the caches."""
    source = torch.randn(COPY_BYTES[clock.device.type] // 4, device=clock.device)
    target = torch.empty_like(source)
    seconds = _best(Timed(lambda: target.copy_(source)), clock)
    return 2 * source.numel() * source.element_size() / seconds / 1e9


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """GFLOP/s of a large product of two square matrices of random numbers."""
    n = MATMUL_SIZE[clock.device.type]
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(Timed(lambda: a @ b), clock) / 1e9


def _best(timed: Timed, clock: Clock) -> float:
    """The least seconds of a call: a limit is what the machine can do undisturbed."""
    *_, times = interleaved([timed], clock, seconds=LIMIT_SECONDS, min_rounds=3)
    return min(times[0].rounds)
