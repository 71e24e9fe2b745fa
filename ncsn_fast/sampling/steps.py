"""How steps are taken: one by one, or in runs that are replayed from CUDA graphs.

Belongs here: the position of a chain (:class:`Position`), captures, replays, and the clean-up after a failed capture.
Does not belong here: what a step does (``engine.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import TMonitor

# The most steps in one graph. With ten, the launch of a replay is a small part of the time, and a capture is quick.
CAPTURED_STEPS = 10


class Position(NamedTuple):
    """Where a chain is: Python numbers, or int64 tensors ``(1,)`` on the device in a captured graph.

    Attributes:
        level: number of the noise level in the chain's ladder, from 0.
        step: number of updates made before, over all levels.
    """

    level: int | Tensor
    step: int | Tensor

    def of(self, table: Tensor) -> Tensor:
        """The level's entry of a table with one entry for each level, ``(1,)``."""
        if isinstance(self.level, Tensor):
            return table.index_select(0, self.level)
        return table[self.level : self.level + 1]

    def next_level(self) -> Position:
        """The same step at the next level, for a score that is asked there."""
        return Position(self.level + 1, self.step)


Update = Callable[[Tensor, Position], object]


class Steps:
    """Takes steps one by one."""

    at_once = 1

    def __init__(self, take: Callable[[Update, Position], object]) -> None:
        self._take = take

    def position(self, level: int, step: int) -> Position:
        return Position(level, step)

    def take(self, updates: tuple[Update, ...], level: int, step: int) -> None:
        for i, update in enumerate(updates):
            self._take(update, self.position(level, step + i))


class GraphedSteps:
    """Takes runs of steps from CUDA graphs.

    The first time a run of updates comes, the updates are called one by one on a side stream, which compiles and loads
    what they need. The second time they are captured, and from then on replayed. Level and step are on the device,
    where the graph reads them and counts the step. The graph reads the weights from their memory, so weights that are
    changed in place have their effect. Everything else (shape, dtype, backend, seed) is fixed in it. Therefore a graph
    is kept for one call of a sampler only, and the next call captures again.
    """

    at_once = CAPTURED_STEPS

    def __init__(self, take: Callable[[Update, Position], object], device: torch.device) -> None:
        self._take = take
        self._level_on_host = 0
        numbers = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._position = Position(*numbers)
        self._graphs: dict[tuple[Update, ...], Graph | None] = {}
        self._called: set[Update] = set()

    def position(self, level: int, step: int) -> Position:
        """The position on the device. Its step is counted there and equals ``step`` already; its level is set here."""
        if level != self._level_on_host:
            self._position.level.fill_(level)
            self._level_on_host = level
        return self._position

    def take(self, updates: tuple[Update, ...], level: int, step: int) -> None:
        position = self.position(level, step)

        def steps(around: Callable[[Update], AbstractContextManager] = nullcontext) -> None:
            for update in updates:
                with around(update):
                    self._take(update, position)
                    position.step.add_(1)

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
        """Around a call before any capture. Only an update's first call may wait for the device: a capture may not."""
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
        # A new stream: PyTorch's default one for captures is shared by all threads and fixed to its first device.
        # Thread-local: other threads may pin memory meanwhile, which would end a global capture.
        capture = torch.cuda.graph(
            self._graph,
            pool=pool,
            stream=torch.cuda.Stream(),
            capture_error_mode="thread_local",
        )
        # The graph must not read weights that autocast has cast and cached before: that cache is freed later. With an
        # empty cache the casts become part of the graph.
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
        """Make the calls on a side stream, as PyTorch asks for the calls before a capture."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                calls()
        finally:
            # After an error too: memory that the calls used may be allocated again on the current stream.
            current.wait_stream(side)


NOT_CAPTURED = (
    "the steps could not be captured in a CUDA graph (cuda_graph=False does without one): {}"
)
# Graphs whose capture failed: PyTorch's allocators may go on asking them whether they still capture.
_failed: list[torch.cuda.CUDAGraph] = []


def _recover(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Clean up after a capture that failed: PyTorch then skips a part of its own clean-up."""
    _failed.append(graph)
    torch.cuda.set_stream(stream)
    # The generator's state still counts as being captured; a copy of it does not.
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())
    graph.reset()
    # Allocations on the stream still go to the graph's pool, unless the capture ended that; these calls raise then.
    for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):
            give_back(stream.device_index, pool)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """A block in which a call of PyTorch that waits for the GPU raises: in a capture it would, and break the capture.

    PyTorch's switch holds for the whole process. Other threads may wait for the GPU, so where there are any it stays
    off.
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
    """ValueError if the device has no CUDA graphs."""
    if device.type != Graph.device_type:
        raise ValueError(f"cuda_graph takes a CUDA device, the samples are on {device}")


def use_graphs(device: torch.device, cuda_graph: bool | None) -> bool:
    """Whether a network's sampling replays its steps from CUDA graphs: as asked; ``None``: on a CUDA device."""
    return device.type == "cuda" if cuda_graph is None else cuda_graph
