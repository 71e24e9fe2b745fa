"""The loop that all samplers share: a state that is updated in place, step by step and level by level.

Belongs here: buffers, counters, the noise, how the score is asked, the known region, CUDA graphs, checks, progress,
callbacks and kept states. Does not belong here: the update rules (``langevin.py``, ``ode.py``, ``solvers.py``) and the
arithmetic of a Langevin step (``ops.langevin_step_``).

No step waits for the device. Level and step are Python numbers where steps are called one by one, and tensors on the
device where they are replayed from a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..progress import progress
from ..schedules import check_sigmas
from ..streams import KNOWN_NOISE_STEPS
from .start import draw_seed
from .steps import GraphedSteps, Position, Steps, Update, check_graph_device

# At least so many steps between two checks that the score was finite; each check waits for the device.
CHECK_EVERY = 100


class ScoreError(RuntimeError):
    """The score was not finite; the message says from which level and step on."""


class Ladder:
    """Noise levels in the order of a solver, and the condition with which the score is asked at each.

    A condition is what a score function takes beside x: a number of a level, or a sigma. With it a solver can go down
    any part of a network's ladder, or ask a network over a continuous sigma between its levels.

    Args:
        sigmas: the standard deviation of each level.
        conditions: for each level an int or a float; ``None``: the level's number, 0, 1, ...
        table: puts numbers on the device of the state.

    Attributes:
        sigmas: as Python floats.
        sigma_table: the same on the device, ``(K,)``.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        conditions: Sequence[int] | Sequence[float] | None,
        table: Callable[[Iterable[float]], Tensor],
    ) -> None:
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.sigma_table = table(self.sigmas)
        if conditions is not None and len(conditions) != len(self.sigmas):
            raise ValueError(
                f"there must be one condition for each of the {len(self.sigmas)} levels, got {len(conditions)}"
            )
        self.conditions = None if conditions is None else list(conditions)
        self._on_device: Tensor | None = None

    def condition(self, position: Position) -> int | float | Tensor:
        """What the score is asked with at the position's level; in a graph a tensor ``(1,)``."""
        if self.conditions is None:
            return position.level
        if not isinstance(position.level, Tensor):
            return self.conditions[position.level]
        if self._on_device is None:
            # Made when the updates are called for the first time, so before any capture.
            self._on_device = torch.tensor(
                self.conditions,
                dtype=self.sigma_table.dtype
                if isinstance(self.conditions[0], float)
                else torch.int64,
                device="cpu",
            ).to(position.level.device)
        return position.of(self._on_device)


class Chain:
    """A batch of Markov chains, or of solutions of an ODE, and all that updates need.

    Args:
        score: ``score(x, condition)``, in the shape of ``x`` and any floating dtype. ``condition`` is a Python number;
            with ``cuda_graph`` a tensor ``(1,)`` on the device, int64 or in the dtype of the state.
        init: where the chains start, ``(N, ...)``; not modified.
        sigmas: the levels that the solver passes, strictly descending.
        conditions: what the score is asked with at each level: numbers of levels of a network's own ladder, or the
            sigmas themselves. ``None``: the level's number in ``sigmas``.
        like_init: the state has the strides of ``init``, and is float64 if ``init`` is. Otherwise it is float32, and
            channels_last if ``init`` is, else contiguous.
        seed: of the noise; ``None``: drawn from torch's default CPU generator.
        sample_offset: number of the first sample in the noise stream.
        known: values of the known region, of a shape that broadcasts to that of ``init``.
        mask: bool, where the values are known; broadcasts too.
        verbose: show a progress bar with the level's sigma.
        callback: called as ``callback(level, x)`` after each level, with a copy of the state.
        return_intermediates: keep the state after every so many steps.
        clip_end: clamp the result to this range, after all steps; the known region is not clamped.
        cuda_graph: replay steps from CUDA graphs.

    Attributes:
        x: the state, float32 or float64.
        sigmas: the levels as Python floats.
        noise: seed and offset, as ``ops`` take them.
    """

    def __init__(
        self,
        score: Callable[[Tensor, Any], Tensor],
        init: Tensor,
        sigmas: Sequence[float],
        *,
        conditions: Sequence[int] | Sequence[float] | None = None,
        like_init: bool = False,
        seed: int | None = None,
        sample_offset: int = 0,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        verbose: bool = False,
        callback: Callable[[int, Tensor], object] | None = None,
        return_intermediates: int | None = None,
        clip_end: tuple[float, float] | None = None,
        cuda_graph: bool = False,
    ) -> None:
        check_sigmas(sigmas, len(sigmas))
        layout = torch.contiguous_format
        if like_init:
            layout = torch.preserve_format
        elif init.dim() == 4 and init.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        double = like_init and init.dtype == torch.float64
        self.dtype = torch.float64 if double else torch.float32
        self.x = init.detach().to(self.dtype, copy=True, memory_format=layout)
        self.noise = {
            "seed": draw_seed() if seed is None else seed,
            "sample_offset": sample_offset,
        }
        self.verbose, self.callback, self.every = verbose, callback, return_intermediates
        self._clip_end = clip_end
        if self.every is not None and self.every < 1:
            raise ValueError(f"return_intermediates must be at least 1, got {self.every}")
        self.states: Tensor | None = None
        self._score = score
        self._sums = torch.zeros(0, dtype=self.dtype, device=self.x.device)
        self._normal = torch.zeros_like(self.x, dtype=torch.float32)
        self._zeros = torch.zeros_like(self._normal)
        self._known = None if known is None and mask is None else self._check_known(known, mask)
        self._ladder = self.ladder(sigmas, conditions)
        self.sigmas = self._ladder.sigmas
        if cuda_graph:
            check_graph_device(self.x.device)
        self._graphed = cuda_graph

    def table(self, values: Iterable[float]) -> Tensor:
        """A number for each level, on the device and in the dtype of the state; :meth:`Position.of` reads it."""
        return torch.tensor(list(values), dtype=self.dtype, device="cpu").to(self.x.device)

    def ladder(
        self, sigmas: Sequence[float], conditions: Sequence[int] | Sequence[float] | None
    ) -> Ladder:
        """Other noise levels, one for each level of the chain, at which an update may ask the score."""
        return Ladder(sigmas, conditions, self.table)

    def score(self, x: Tensor, position: Position, ladder: Ladder | None = None) -> Tensor:
        """The score at ``x`` and the position's level. An update may ask as often as it needs.

        Args:
            x: the state, or another one in its shape. In another one the known region is set here, in place, with the
                noise of the level.
            position: its level says where. Its step counts for the checks and for the noise of the known region.
            ladder: noise levels in place of the chain's own.
        """
        ladder = ladder or self._ladder
        if x is not self.x:
            self._set_known(x, position, ladder)
        score = self._score(x, ladder.condition(position))
        if score.shape != x.shape:
            raise ValueError(f"score must have shape {tuple(x.shape)}, got {tuple(score.shape)}")
        # One number a step: it is finite if and only if all of its scores are, unless the sum overflows.
        total = score.sum(dtype=self.dtype)
        if isinstance(position.step, Tensor):
            self._sums.index_add_(0, position.step, total.view(1))
        else:
            self._sums[position.step].add_(total)
        return score

    def normal(self, step: int | Tensor) -> Tensor:
        """Standard normal numbers of the stream of Langevin noise, in the dtype of the state.

        They may lie in the memory that the next call, or the next score at another state, writes to.
        """
        # A step of size 1/2 from zero, with a score of zero, is the noise itself, bit for bit.
        z = ops.langevin_step_(self._normal.zero_(), self._zeros, 0.5, step=step, **self.noise)
        return z.to(self.dtype)

    def denoise(self, x: Tensor, position: Position) -> None:
        """An update from the last level to the expected clean sample, ``x + sigma_K**2 * score`` (Tweedie)."""
        x.add_(self.score(x, position), alpha=self.sigmas[-1] ** 2)

    def run(
        self, updates: Sequence[Sequence[Update]], *, end: Update | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Take the steps of each level, then one more at the last level if wanted.

        Args:
            updates: for each level, its updates ``update(x, position)`` in order.
            end: an update after all steps, such as :meth:`denoise`. No progress, callback or kept state counts it.

        Returns:
            The state, contiguous; with ``return_intermediates`` also the states kept on the way.

        Raises:
            ScoreError: the score was not finite.
        """
        total = sum(map(len, updates))
        self._sums = self._sums.new_zeros(total + 1)
        if self.every is not None:
            self.states = self.x.new_empty((total // self.every, *self.x.shape))
        # Not an attribute: a reference cycle would keep the graphs' memory until the garbage collector runs.
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
        if end is not None:
            self._take(end, steps.position(len(updates) - 1, done))
            done += 1
        if self._clip_end is not None:
            self.x.clamp_(*self._clip_end)
        if self._known is not None:
            values, mask = self._known
            torch.where(mask, values, self.x, out=self.x)
        self._check_scores(updates, checked, done)
        x = self.x.contiguous()
        return x if self.states is None else (x, self.states)

    def _pieces(
        self, updates: Sequence[Update], done: int, at_once: int
    ) -> Iterator[tuple[Update, ...]]:
        """A level's updates in runs of at most ``at_once``, which also end where the state is to be kept."""
        begin = 0
        while begin < len(updates):
            size = at_once
            if self.every is not None:
                size = min(size, self.every - (done + begin) % self.every)
            yield tuple(updates[begin : begin + size])
            begin += size

    def _take(self, update: Update, position: Position) -> None:
        # Before the update: its score shall see the known region with the noise of the level.
        self._set_known(self.x, position, self._ladder)
        update(self.x, position)

    def _set_known(self, x: Tensor, position: Position, ladder: Ladder) -> None:
        """Write the known values into ``x``, with the noise of the position's level."""
        if self._known is None:
            return
        values, mask = self._known
        noisy = self.normal(position.step + KNOWN_NOISE_STEPS)
        torch.addcmul(values, noisy, position.of(ladder.sigma_table), out=noisy)
        torch.where(mask, noisy, x, out=x)

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
        values = known.detach().to(self.x.device, self.dtype)
        return values, mask.to(self.x.device)

    def _check_scores(self, updates: Sequence[Sequence[Update]], begin: int, end: int) -> None:
        """Raise if the score was not finite in the steps from begin to end. Waits for the device once."""
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
