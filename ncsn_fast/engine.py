"""The loop that the samplers of ``sampling.py`` share: a state updated in place, step after step, level after level.

Belongs here: buffers, counters, the noise, the known region, CUDA graphs, and what can be watched meanwhile. Does not
belong here: the update rules (``sampling.py``) and the arithmetic of a step (``ops.langevin_step_``).

Nothing waits for the device from step to step: level and step are Python numbers where steps are called one by one, and
tensors on the device where they are replayed from a graph.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import TMonitor

from . import ops
from .progress import progress
from .schedules import check_sigmas
from .streams import KNOWN_NOISE_STEPS

# Steps in one graph, at most: enough that a replay costs little beside them, few enough to be captured quickly.
CAPTURED_STEPS = 10
# Steps, at least, between looks at whether the score was finite; each look waits for the device.
CHECK_EVERY = 100


class ScoreError(RuntimeError):
    """The score was not finite; the message says from which level and step on."""


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


class Chain:
    """A batch of Markov chains and what they need on their way.

    Args:
        score: ``score(x, level)``, in the shape of ``x`` and any floating dtype. ``level`` is an int; with
            ``cuda_graph`` an int64 tensor ``(1,)`` on the device.
        init: where the chains start, ``(N, ...)``; not modified. The state keeps a channels_last layout.
        sigmas: the ladder, strictly descending.
        seed: of the noise; ``None``: drawn from torch's default CPU generator.
        sample_offset: number of the first sample in the noise stream.
        known: values of the known region, of a shape that broadcasts to that of ``init``.
        mask: bool, where the values are known; broadcasts too.
        verbose: show a progress bar with the level's sigma.
        callback: called as ``callback(level, x)`` after each level, with a copy of the state.
        return_intermediates: keep the state after every so many steps.
        cuda_graph: replay steps from CUDA graphs.

    Attributes:
        x: the state, float32.
        sigmas: the ladder as Python floats.
        noise: seed and offset, as ``ops`` take them.
    """

    def __init__(
        self,
        score: Callable[[Tensor, int | Tensor], Tensor],
        init: Tensor,
        sigmas: Sequence[float],
        *,
        seed: int | None = None,
        sample_offset: int = 0,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        verbose: bool = False,
        callback: Callable[[int, Tensor], object] | None = None,
        return_intermediates: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        check_sigmas(sigmas, len(sigmas))
        self.sigmas = [float(sigma) for sigma in sigmas]
        channels_last = init.dim() == 4 and init.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.x = init.detach().to(torch.float32, copy=True, memory_format=layout)
        self.noise = {
            "seed": draw_seed() if seed is None else seed,
            "sample_offset": sample_offset,
        }
        self.verbose, self.callback, self.every = verbose, callback, return_intermediates
        if self.every is not None and self.every < 1:
            raise ValueError(f"return_intermediates must be at least 1, got {self.every}")
        self.states: Tensor | None = None
        self._score = score
        self._sums = torch.zeros(0, dtype=torch.float32, device=self.x.device)
        self._normal, self._zeros = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self._known = None if known is None and mask is None else self._check_known(known, mask)
        self._sigmas = self.table(self.sigmas)
        device = self.x.device
        if cuda_graph and device.type != Graph.device_type:
            raise ValueError(f"cuda_graph takes a CUDA device, the samples are on {device}")
        self._graphed = cuda_graph

    def table(self, values: Iterable[float]) -> Tensor:
        """A number for each level, where the state is; :meth:`Now.of` reads it."""
        return torch.tensor(list(values), dtype=torch.float32, device="cpu").to(self.x.device)

    def score(self, now: Now) -> Tensor:
        """The score at the state. To be called once in every update."""
        score = self._score(self.x, now.level)
        if score.shape != self.x.shape:
            raise ValueError(
                f"score must have shape {tuple(self.x.shape)}, got {tuple(score.shape)}"
            )
        # One number a step: it is finite if and only if all of the score is (but for an overflow of the sum).
        if isinstance(now.step, Tensor):
            self._sums.index_copy_(0, now.step, score.sum(dtype=torch.float32).view(1))
        else:
            torch.sum(score, dim=None, dtype=torch.float32, out=self._sums[now.step])
        return score

    def normal(self, step: int | Tensor) -> Tensor:
        """Standard normal numbers of the stream of Langevin noise, always in the same memory."""
        # A step of size 1/2 from zero, with a score of zero, is the noise itself, bit for bit.
        return ops.langevin_step_(self._normal.zero_(), self._zeros, 0.5, step=step, **self.noise)

    def run(
        self,
        updates: Sequence[Sequence[Update]],
        *,
        denoise: bool = False,
        clip: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Take the steps of each level, then one without noise if wanted.

        Args:
            updates: for each level, its updates ``update(x, now)`` in order.
            denoise: end with ``x + sigma_K**2 * score``, Tweedie's expected clean sample.
            clip: clamp to ``[-clip, clip]`` after that.

        Returns:
            The state, contiguous; with ``return_intermediates`` also the states kept on the way.

        Raises:
            ScoreError: the score was not finite.
        """
        total = sum(map(len, updates))
        self._sums = self._sums.new_zeros(total + 1)
        if self.every is not None:
            self.states = self.x.new_empty((total // self.every, *self.x.shape))
        # Not an attribute: a cycle would keep the graphs' memory until the garbage collector comes by.
        steps = GraphedSteps(self._take, self.x.device) if self._graphed else Steps(self._take)
        done = checked = 0
        bar = progress(total, shown=self.verbose, desc="sampling", unit="step")
        # Graphs and streams are made on the current device.
        with bar, torch.cuda.device_of(self.x):
            for level, of_level in enumerate(updates):
                bar.set_postfix(sigma=f"{self.sigmas[level]:.4g}")
                for piece in self._pieces(of_level, done, steps.at_once):
                    steps.take(piece, level, done)
                    done += len(piece)
                    bar.update(len(piece))
                    if self.states is not None and done % self.every == 0:
                        self.states[done // self.every - 1].copy_(self.x)
                if done - checked >= CHECK_EVERY:
                    self._check_scores(updates, checked, done)
                    checked = done
                if self.callback is not None:
                    self.callback(level, self.x.clone(memory_format=torch.contiguous_format))
        if denoise:
            self._take(self._denoise, steps.now(len(updates) - 1, done))
            done += 1
            if clip is not None:
                self.x.clamp_(-clip, clip)
        if self._known is not None:
            values, mask = self._known
            torch.where(mask, values, self.x, out=self.x)
        self._check_scores(updates, checked, done)
        x = self.x.contiguous()
        return x if self.states is None else (x, self.states)

    def _pieces(
        self, updates: Sequence[Update], done: int, at_once: int
    ) -> Iterator[tuple[Update, ...]]:
        """A level's updates in runs of some at once, cut where the state is to be kept."""
        begin = 0
        while begin < len(updates):
            size = at_once
            if self.every is not None:
                size = min(size, self.every - (done + begin) % self.every)
            yield tuple(updates[begin : begin + size])
            begin += size

    def _take(self, update: Update, now: Now) -> None:
        if self._known is not None:  # before the score is asked: it shall see the level's own noise
            values, mask = self._known
            noisy = self.normal(now.step + KNOWN_NOISE_STEPS)
            torch.addcmul(values, noisy, now.of(self._sigmas), out=noisy)
            torch.where(mask, noisy, self.x, out=self.x)
        update(self.x, now)

    def _denoise(self, x: Tensor, now: Now) -> None:
        x.add_(self.score(now), alpha=self.sigmas[-1] ** 2)

    def _check_known(self, known: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = self.x.shape
        for name, value in (("known", known), ("mask", mask)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"known and mask must both be tensors, got {name} {type(value).__name__}"
                )
            fits = value.dim() <= len(shape) and all(
                side in (1, whole)
                for side, whole in zip(value.shape[::-1], shape[::-1], strict=False)
            )
            if not fits:
                raise ValueError(
                    f"{name} must have the shape of the samples, {tuple(shape)}, or one that "
                    f"broadcasts to it, got {tuple(value.shape)}"
                )
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True where the values are known, got {mask.dtype}")
        if not known.is_floating_point():
            raise TypeError(f"known must be floating point, got {known.dtype}")
        values = known.detach().to(self.x.device, torch.float32)
        return values, mask.to(self.x.device)

    def _check_scores(self, updates: Sequence[Sequence[Update]], begin: int, end: int) -> None:
        """Waits for the device, once: was the score finite in the steps from begin to end?"""
        for step, total in enumerate(self._sums[begin:end].tolist(), begin):
            if math.isfinite(total):
                continue
            if step == sum(map(len, updates)):
                where = "in the denoising step at the end"
            else:
                level, first = 0, 0
                while step >= first + len(updates[level]):
                    first += len(updates[level])
                    level += 1
                where = (
                    f"at level {level} (sigma {self.sigmas[level]:.4g}), step {step - first} of "
                    f"that level, step {step} in all"
                )
            raise ScoreError(f"the score was NaN or infinite, first {where}, counted from 0")


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


def use_graphs(device: torch.device, cuda_graph: bool | None) -> bool:
    """Whether a network's sampling replays its steps from CUDA graphs: as asked; ``None``: on a CUDA device."""
    return device.type == "cuda" if cuda_graph is None else cuda_graph


def draw_seed() -> int:
    """A seed from torch's default CPU generator: ``torch.manual_seed`` governs, no device waits."""
    return int(torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu"))
