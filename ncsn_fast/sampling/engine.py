"""The loop that the samplers of ``sampling.py`` share: a state updated in place, step after step, level after level.

Belongs here: buffers, counters, the noise, the known region, CUDA graphs, and what can be watched meanwhile. Does not
belong here: the update rules (``sampling.py``) and the arithmetic of a step (``ops.langevin_step_``).

Nothing waits for the device from step to step: level and step are Python numbers where steps are called one by one, and
tensors on the device where they are replayed from a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..progress import progress
from ..schedules import check_sigmas
from ..streams import KNOWN_NOISE_STEPS
from .start import draw_seed
from .steps import GraphedSteps, Now, Steps, Update, check_graph_device

# Steps, at least, between looks at whether the score was finite; each look waits for the device.
CHECK_EVERY = 100


class ScoreError(RuntimeError):
    """The score was not finite; the message says from which level and step on."""


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
        if cuda_graph:
            check_graph_device(self.x.device)
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
