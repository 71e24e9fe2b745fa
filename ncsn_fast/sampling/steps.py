"""How steps are taken: one by one, or in runs that are replayed from CUDA graphs.

Belongs here: where a chain is (:class:`Now`), captures, replays, and what a failed capture must not leave behind. Does
not belong here: what a step does (``engine.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import TMonitor

# Steps in one graph, at most: enough that a replay costs little beside them, few enough to be captured quickly.
CAPTURED_STEPS = 10


class Now(NamedTuple):
    """Where a chain is: Python numbers, or int64 tensors ``(1,)`` on the device in a captured graph.

    Attributes:
        level: noise level, from 0.
        step: updates done before, over all levels.
    """

    level: int | Tensor
    step: int | Tensor

    def of(self, table: Tensor) -> Tensor:
        """The level's entry of a table of all levels, ``(1,)``."""
        if isinstance(self.level, Tensor):
            return table.index_select(0, self.level)
        return table[self.level : self.level + 1]


Update = Callable[[Tensor, Now], object]


class Steps:
    """Takes steps one by one."""

    at_once = 1

    def __init__(self, take: Callable[[Update, Now], object]) -> None:
        self._take = take

    def now(self, level: int, step: int) -> Now:
        return Now(level, step)

    def take(self, updates: tuple[Update, ...], level: int, step: int) -> None:
        for i, update in enumerate(updates):
            self._take(update, self.now(level, step + i))


class GraphedSteps:
    """Takes runs of steps from CUDA graphs.

    A run that is met for the first time is called as it is, on a side stream, which compiles and loads what it needs;
    the second time it is captured; from then on it is replayed. Level and step live on the device, where the graph
    reads and counts them. It reads the weights where they are, so that weights changed in place count. Everything else
    (shape, dtype, backend, seed) is fixed in it; therefore it lives no longer than one call of a sampler, and the next
    call captures anew.
    """

    at_once = CAPTURED_STEPS

    def __init__(self, take: Callable[[Update, Now], object], device: torch.device) -> None:
        self._take = take
        self._level_on_host = 0
        self._now = Now(*(torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)))
        self._graphs: dict[tuple[Update, ...], Graph | None] = {}
        self._called: set[Update] = set()

    def now(self, level: int, step: int) -> Now:
        """The device's own count of steps, which is at ``step`` already, with the level set."""
        if level != self._level_on_host:
            self._now.level.fill_(level)
            self._level_on_host = level
        return self._now

    def take(self, updates: tuple[Update, ...], level: int, step: int) -> None:
        now = self.now(level, step)

        def steps(around: Callable[[Update], AbstractContextManager] = nullcontext) -> None:
            for update in updates:
                with around(update):
                    self._take(update, now)
                    now.step.add_(1)

        if updates not in self._graphs:
            Graph.warm_up(lambda: steps(self._watched))
            self._graphs[updates] = None
            return
        graph = self._graphs[updates]
        if graph is None:
            graph = self._graphs[updates] = Graph(steps)
        graph.replay()

    @contextmanager
    def _watched(self, update: Update) -> Iterator[None]:
        """A call before any capture: what is called again must not wait, since a capture cannot."""
        with waiting_is_an_error() if update in self._called else nullcontext():
            yield
        self._called.add(update)


class Graph:
    """Calls captured in a CUDA graph, to be replayed.

    Raises:
        RuntimeError: they could not be captured. Stream, random numbers and memory are then as before.
    """

    device_type = "cuda"

    def __init__(self, calls: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        current, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        # A stream of its own: PyTorch's default one is shared by all threads, and lies on the device of its first use.
        # Thread-local: what other threads do meanwhile, such as pinning memory, must not end the capture.
        capture = torch.cuda.graph(
            self._graph,
            pool=pool,
            stream=torch.cuda.Stream(),
            capture_error_mode="thread_local",
        )
        # What autocast has cast before would be frozen in, and freed with its cache: cast within, once a replay.
        torch.clear_autocast_cache()
        try:
            with capture:
                calls()
        except BaseException as error:
            _recover(self._graph, pool, current)
            if isinstance(error, RuntimeError):
                raise RuntimeError(NOT_CAPTURED.format(error)) from error
            raise
        finally:
            torch.clear_autocast_cache()

    def replay(self) -> None:
        self._graph.replay()

    @staticmethod
    def warm_up(calls: Callable[[], None]) -> None:
        """Make the calls, on a side stream, where PyTorch wants what precedes a capture."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                calls()
        finally:  # also after an error: the memory that the calls used is given out again on the current stream
            current.wait_stream(side)


NOT_CAPTURED = (
    "the steps could not be captured in a CUDA graph (cuda_graph=False does without one): {}"
)
# Graphs whose capture failed: PyTorch's allocators may go on asking them whether they still capture.
_failed: list[torch.cuda.CUDAGraph] = []


def _recover(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Undo what a capture leaves behind if it fails: its end is then left halfway by PyTorch."""
    _failed.append(graph)
    torch.cuda.set_stream(stream)
    # The generator's state still counts as being captured; a copy of it does not.
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())
    graph.reset()
    # Allocations on the stream still go to the graph's pool; an error means that they were ended with the capture.
    for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):
            give_back(stream.device_index, pool)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within, a call of PyTorch that waits for the GPU raises, as it would in a capture, which cannot go on after it.

    PyTorch's switch holds for the whole process: with other threads, which may wait as they like, nothing is watched.
    """
    others = (t for t in threading.enumerate() if t is not threading.current_thread())
    if not torch.cuda.is_initialized() or not all(isinstance(t, TMonitor) for t in others):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" in str(error):
            raise RuntimeError(NOT_CAPTURED.format(error)) from error
        raise
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_graph_device(device: torch.device) -> None:
    """ValueError where there are no graphs."""
    if device.type != Graph.device_type:
        raise ValueError(f"cuda_graph takes a CUDA device, the samples are on {device}")


def use_graphs(device: torch.device, cuda_graph: bool | None) -> bool:
    """Whether a network's sampling replays its steps from CUDA graphs: as asked; ``None``: on a CUDA device."""
    return device.type == "cuda" if cuda_graph is None else cuda_graph
