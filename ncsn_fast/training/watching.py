"""Watching a run: its log, its loss on held-out data, and samples on the way.

Belongs here: what is looked at and when. Does not belong here: settings of it (``watch_settings.py``), the files of
records (``log.py``), TensorBoard and the like (``boards.py``), the moments at which the loop calls (``observers.py``),
the page about a run (``plots/report.py``).

How a loss is measured and how a picture is made are given as functions, such as
:func:`~ncsn_fast.evaluation.losses_by_level` and :func:`~ncsn_fast.plots.image_grid`.
"""

from __future__ import annotations

import dataclasses
import io
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.ranges import IMAGE_RANGE
from ..files import write_atomically
from ..models.base import LABEL, ScoreModel
from ..sampling.engine import ScoreError
from .live import LOG_EVERY, machine, peak_memory
from .log import LOG_NAME, LOSSES_NAME, RunLog, cannot_write, read_losses
from .observers import Observer

if TYPE_CHECKING:
    from PIL.Image import Image

    from .boards import Board
    from .trainer import Trainer

SAMPLES_NAME = "samples"  # the folder of pictures
PICTURE = "step_"  # before the step; what else is in the folder is not ours


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The loss by level on data that are not trained on, of the moving average.

    Args:
        data: ``(N, ...)`` in the network's range.
        measure: ``measure(network, data)``, a loss for each level, with noise that is always the same.
        every: steps; also at the end.
    """

    data: Any
    measure: Callable[[ScoreModel, Any], Sequence[float]]
    every: int


@dataclasses.dataclass(frozen=True)
class Samples:
    """A picture of samples from the moving average, always of the same noise.

    Args:
        grid: from images ``(N, C, H, W)`` in [-1, 1] to a picture of pillow.
        every: steps; also at the end.
        n: samples in a picture.
        sampler, passes: how they are drawn, see :meth:`~ncsn_fast.models.base.ScoreModel.sample`. Of a network that
            knows its ladder only there are at most as many passes as levels.
        seed: of their noise.
    """

    grid: Callable[[Tensor], Image]
    every: int
    n: int = 64
    sampler: str = "dpmpp_2m_sde"
    passes: int = 10
    seed: int = 0

    def draw(self, trainer: Trainer) -> Image:
        """The picture of now."""
        network, passes = trainer.average.module, self.passes
        if network.conditioned_on == LABEL:  # it knows no other levels than its ladder's
            passes = min(passes, len(network.sigmas))
        images = network.sample(
            self.n,
            tuple(trainer.data["shape"][2:]),
            sampler=self.sampler,
            passes=passes,
            seed=self.seed,
            clip=True,
            cuda_graph=False,  # to capture one takes longer than these few passes
            verbose=False,
        )
        (low, high), (bottom, top) = network.data_range, IMAGE_RANGE
        return self.grid((images - low) * ((top - bottom) / (high - low)) + bottom)


class Watch(Observer):
    """Writes ``log.jsonl``, and what else is asked for; an observer for :func:`~ncsn_fast.training.train`.

    Every 10 steps a record with the mean ``loss`` since the last one, ``lr``, ``images_per_second`` (of the training
    alone) and ``memory_bytes`` (the highest so far); with ``held_out`` records with ``held_out``: ``loss``, the mean of
    ``loss_by_level`` at the ``sigmas``; at each start one with ``machine``, where it ran. With ``samples`` pictures
    ``samples/step_STEP.png``. A run that goes on continues them all.

    Args:
        held_out, samples: see there; ``None``: not.
        boards: what is to have the same numbers and pictures, see ``boards.py``.

    Raises:
        ValueError: when the run starts: pictures of what are no images of a known range.
        CheckpointError: on the way: a file cannot be written.

    Warns:
        UserWarning: samples could not be drawn, as the network gave NaN or infinity; the picture is left out.

    Example::

        watch = Watch(
            HeldOut(held_out_images, losses_by_level, every=500),
            Samples(image_grid, every=1000),
        )
        train(model, images, settings, "run", observers=[watch])
    """

    def __init__(
        self,
        held_out: HeldOut | None = None,
        samples: Samples | None = None,
        boards: Sequence[Board] = (),
    ) -> None:
        self.held_out, self.samples, self.boards = held_out, samples, boards
        self._log: RunLog | None = None
        self._fresh: list[Tensor] = []  # losses that are on the device yet
        self._before: list[float] = []  # of before the run went on, that no record has
        self._measured: tuple[int, float] | None = None  # the step and its held-out loss
        self._clock: tuple[float, int] | None = None  # a time and the step done then

    def on_start(self, trainer: Trainer) -> None:
        """See :class:`~ncsn_fast.training.observers.Observer`; so the others."""
        if self.samples is not None:
            _check_images(trainer)
        step = trainer.step
        self._log = RunLog(trainer.out / LOG_NAME, step)
        self._fresh, self._measured = [], None
        steps, losses = read_losses(trainer.out / LOSSES_NAME)
        last = max((r["step"] for r in self._log.kept if "loss" in r), default=0)
        self._before = [x for n, x in zip(steps, losses, strict=True) if last < n <= step]
        self._log.add(step, machine=machine(trainer.model.sigmas.device))
        self._log.write()
        for number, path in sample_pictures(trainer.out):
            if number > step or step == 0:
                path.unlink()
        for board in self.boards:
            board.start(trainer.out, step, _settings(trainer))
        self._clock = (time.perf_counter(), step)

    def on_step(self, trainer: Trainer, loss: Tensor, rate: float) -> None:
        step, last = trainer.step, trainer.step == trainer.settings.iterations
        if self._clock is None:  # a checkpoint was written: its time is not the training's
            self._clock = (time.perf_counter(), step)
        self._fresh.append(loss)
        if step % LOG_EVERY == 0 or last:
            self._record(trainer, rate)
        looked = False
        if self.held_out is not None and (step % self.held_out.every == 0 or last):
            self._evaluate(trainer)
            looked = True
        if self.samples is not None and (step % self.samples.every == 0 or last):
            self._draw(trainer)
            looked = True
        if looked:
            self._clock = (time.perf_counter(), step)

    def on_checkpoint(self, trainer: Trainer) -> float | None:
        self._log.write(synced=True)
        self._clock = None
        step, loss = self._measured or (None, None)
        return loss if step == trainer.step else None

    def on_end(self, trainer: Trainer) -> None:
        if self._fresh:  # after Ctrl-C
            self._record(trainer, trainer.settings.lr_at(trainer.step - 1))
            self._log.write(synced=True)
        for board in self.boards:
            board.close()

    def _record(self, trainer: Trainer, rate: float) -> None:
        losses = [*self._before, *torch.stack(self._fresh).tolist()]  # waits for the device
        self._fresh, self._before = [], []
        step, now, speed = trainer.step, time.perf_counter(), None
        then, first = self._clock or (now, step)  # None at the end: a checkpoint was written since
        if step > first:
            speed = (step - first) * trainer.settings.batch_size / (now - then)
        self._clock = (now, step)
        values = {
            # Of the digits that losses.csv has, as a run that goes on knows no others.
            "loss": math.fsum(float(f"{loss:.6g}") for loss in losses) / len(losses),
            "lr": rate,
            "images_per_second": speed,
            "memory_bytes": peak_memory(trainer.model.sigmas.device),
        }
        self._log.add(step, **values)
        self._log.write()
        self._show(step, values)

    def _evaluate(self, trainer: Trainer) -> None:
        network, step = trainer.average.module, trainer.step
        by_level = list(self.held_out.measure(network, self.held_out.data))
        mean = math.fsum(by_level) / len(by_level)
        sigmas = network.sigmas.tolist()
        found = {"loss": mean, "loss_by_level": by_level, "sigmas": sigmas}
        self._log.add(step, held_out=found)
        self._log.write()
        self._measured = step, mean
        levels = {f"held_out/sigma_{s:.4g}": loss for s, loss in zip(sigmas, by_level, strict=True)}
        self._show(step, {"held_out/mean": mean} | levels)

    def _draw(self, trainer: Trainer) -> None:
        try:
            picture = self.samples.draw(trainer)
        except ScoreError as error:
            warnings.warn(f"no picture of samples after step {trainer.step}: {error}", stacklevel=2)
            return
        path = trainer.out / SAMPLES_NAME / f"{PICTURE}{trainer.step:08d}.png"
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise cannot_write(path, error) from error
        for board in self.boards:
            board.picture(trainer.step, "samples", picture)

    def _show(self, step: int, values: dict[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        for board in self.boards:
            board.numbers(step, known)


def sample_pictures(run: str | Path) -> list[tuple[int, Path]]:
    """The pictures of samples in a run's folder, each with its step, in their order."""
    found = (Path(run) / SAMPLES_NAME).glob(f"{PICTURE}*.png")
    steps = ((path.stem.removeprefix(PICTURE), path) for path in found)
    return sorted((int(step), path) for step, path in steps if step.isdecimal())


def _check_images(trainer: Trainer) -> None:
    shape, expected = trainer.data["shape"], trainer.model.data_range
    if len(shape) != 4 or shape[1] not in (1, 3) or expected is None:
        raise ValueError(
            "samples_every takes images of 1 or 3 channels in a known range, got data of shape "
            f"{tuple(shape)} in the range {expected}"
        )


def _settings(trainer: Trainer) -> dict[str, Any]:
    network = dataclasses.asdict(trainer.model.config)
    return {**dataclasses.asdict(trainer.settings), **network, "data": tuple(trainer.data["shape"])}
