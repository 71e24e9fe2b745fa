"""Training: one process, one device, and a run that can stop at any moment and go on exactly.

Belongs here: the loop, the learning rate, the order of the data, the record of losses. Does not belong here: the
objective (``losses.py``, ``get_loss``), the checkpoint file (``checkpoints.py``), reading images (``data/``).

It trains any :class:`~ncsn_fast.interface.ScoreModel`, on images or on points.

Nothing depends on the state of a random generator: the data, levels and noise of a step are functions of the seed
and the step's number, by the counter-based stream of ``ops.philox_*``.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import ops
from .checkpoints import (
    CHECKPOINT_NAME,
    MODEL_NAME,
    Checkpoint,
    CheckpointError,
    config_to_dict,
    differences,
    load_checkpoint,
    save_checkpoint,
    save_model,
    write_atomically,
)
from .interface import ScoreModel, log_uniform_sigmas
from .losses import WEIGHTINGS, LearnedWeighting
from .model import NCSN
from .progress import progress
from .ranges import byte_hint, check_range, no_more_hints

LOSSES_NAME = "losses.csv"
LOSS_COLUMNS = ("step", "loss", "learning_rate")
FLUSH_EVERY = 10  # steps; reading a loss waits for the device
SCHEDULES = ("cosine", "constant")
LEARNED = "learned"
LADDER, CONTINUOUS = "ladder", "continuous"

# Two uses of the stream for everything else, told apart by the sample number.
ORDER_SAMPLE, LABEL_SAMPLE = 0, 1
HOST = {"device": "cpu", "backend": "auto"}  # whatever backend was chosen for the network


class TrainingError(RuntimeError):
    """Training cannot go on."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C; a checkpoint has been written. Attributes: ``step`` (steps done), ``checkpoint`` (its path)."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; checkpoint written to {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Args:
        iterations: optimiser steps in all.
        batch_size: images a step.
        lr: learning rate of Adam, at its highest.
        lr_schedule: ``"cosine"``, down to zero at the last step, or ``"constant"``.
        warmup: steps over which the learning rate rises linearly from zero, before the schedule.
        ema_decay: of the moving average of the weights, in [0, 1).
        grad_clip: largest norm of the gradient; ``0`` for no clipping.
        seed: of the order of the data, the levels and the noise, ``0 <= seed < 2**32``.
        checkpoint_every: steps from one checkpoint to the next; there is always one at the end.
        weighting: of the noise levels in the loss, ``"sigma2"``, ``"one"`` or ``"learned"``; see
            :func:`~ncsn_fast.losses.denoising_score_matching_loss`.
        levels: ``"ladder"``, those of the network's ladder; or ``"continuous"``, any sigma between its ends, evenly
            spread in log sigma, for a network conditioned on sigma itself.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    iterations: int = 10_000
    batch_size: int = 64
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    warmup: int = 50
    ema_decay: float = 0.999
    grad_clip: float = 10.0
    seed: int = 0
    checkpoint_every: int = 1000
    weighting: str = "sigma2"
    levels: str = LADDER

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "checkpoint_every"):
            self._check(name, "an int >= 1", lambda value: _is_int(value) and value >= 1)
        self._check("warmup", "an int >= 0", lambda value: _is_int(value) and value >= 0)
        self._check(
            "seed", "an int in 0..2**32-1", lambda value: _is_int(value) and 0 <= value < 2**32
        )
        self._check("lr", "positive and finite", lambda value: 0 < value < math.inf)
        self._check("ema_decay", "in [0, 1)", lambda value: 0 <= value < 1)
        self._check(
            "grad_clip", "0 (off) or positive and finite", lambda value: 0 <= value < math.inf
        )
        for name, known in (
            ("lr_schedule", SCHEDULES),
            ("weighting", (*WEIGHTINGS, LEARNED)),
            ("levels", (LADDER, CONTINUOUS)),
        ):
            self._check(name, f"one of {known}", lambda value, known=known: value in known)

    def _check(self, name: str, expected: str, holds: Any) -> None:
        if not holds(getattr(self, name)):
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup))
        if self.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.iterations))
        return rate


def train(
    model: ScoreModel,
    images: Tensor,
    settings: TrainingSettings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    verbose: bool = True,
) -> ScoreModel:
    """Train with Adam on the denoising score matching loss.

    The folder ``out`` receives ``checkpoint.pt``, ``losses.csv`` and ``model/`` (``save_pretrained`` of the moving
    average). Ctrl-C ends the step that is running, writes all three and raises; a second one ends at once.

    Args:
        model: with its sigmas set. Trained in place, and moved to ``device``.
        images: ``(N, C, H, W)`` in the network's ``data_range``, [-1, 1], or points ``(N, D)``; floating point,
            finite, N >= 1; held on ``device``.
        settings: how to train.
        out: the folder; made if need be.
        resume: go on from the checkpoint in ``out``, exactly as that run would have: with the same configuration,
            images and settings, except ``iterations`` and ``checkpoint_every``, which may change.
        overwrite: allow ``out`` to hold a run already, and replace it.
        device: where to compute.
        verbose: show a bar with loss and rate.

    Returns:
        The moving average, in evaluation mode: the network to sample from.

    Raises:
        ValueError: images of another shape or dtype, outside the network's ``data_range`` or not finite; continuous
            levels for an NCSN, which knows its ladder only.
        FileExistsError: ``out`` holds a run, and neither ``resume`` nor ``overwrite`` is given.
        FileNotFoundError: ``resume``, and ``out`` holds no checkpoint.
        CheckpointError: a file could not be written; the checkpoint to resume is damaged, or of another run.
        TrainingError: the loss is no longer finite.
        TrainingInterrupted: Ctrl-C.

    Warns:
        DataRangeWarning: all images are in [0, 1], or almost black, as if they had been scaled otherwise.
    """
    out = Path(out).expanduser()
    path = out / CHECKPOINT_NAME
    expected = getattr(model, "data_range", None)
    if images.ndim not in (2, 4) or images.numel() < 1 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (N, C, H, W), or points (N, D), with N >= 1, got {images.dtype} of shape "
            f"{tuple(images.shape)}{byte_hint(images.dtype, expected)}"
        )
    check_range(images, expected, "images" if images.ndim == 4 else "points")
    no_more_hints(model)
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{path} exists: resume that run, overwrite it, or choose another folder"
        )

    if settings.levels == CONTINUOUS and isinstance(model, NCSN):
        raise ValueError(
            'levels "continuous" take a network conditioned on sigma, such as ScoreMLP or ScoreCNN; '
            "an NCSN knows the levels of its ladder only"
        )

    data = {"shape": tuple(images.shape), "fingerprint": _fingerprint(images)}
    checkpoint = load_checkpoint(path) if resume else None

    model.to(device).train()
    images = images.to(device)
    learned = LearnedWeighting().to(device) if settings.weighting == LEARNED else None
    weighting = settings.weighting if learned is None else learned
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters += [] if learned is None else learned.parameters()
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    step = 0
    if checkpoint is not None:
        _check_same_run(checkpoint, model, data, settings)
        model.load_state_dict(checkpoint.model)
        average.module.load_state_dict(checkpoint.ema)
        average.n_averaged.fill_(checkpoint.step)
        optimizer.load_state_dict(checkpoint.optimizer)
        if learned is not None:
            learned.load_state_dict(checkpoint.weighting)
        torch.set_rng_state(checkpoint.torch_rng)
        step = checkpoint.step
    first = step
    losses = LossLog(out / LOSSES_NAME, first)
    # Dropped only now, when the folder has proved writable: a run begun anew must not end with the old run's weights.
    if checkpoint is None:
        path.unlink(missing_ok=True)

    def save() -> None:
        losses.flush()  # first: the record may run ahead of the checkpoint, resuming cuts it back
        save_checkpoint(
            Checkpoint(
                config=dataclasses.replace(model.config, sigmas=model.sigmas.tolist()),
                model=model.state_dict(),
                ema=average.module.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                settings=dataclasses.asdict(settings),
                data=data,
                torch_rng=torch.get_rng_state(),
                weighting={} if learned is None else learned.state_dict(),
            ),
            path,
        )

    total = max(settings.iterations, first)
    with (
        _deferred_interrupt() as interrupted,
        progress(total, shown=verbose, initial=first, desc="training", unit="step") as bar,
    ):
        while step < settings.iterations and not interrupted.is_set():
            rate = settings.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = images[_batch_indices(settings, len(images), step).to(images.device)]
            levels = _batch_levels(settings, model.sigmas, step)
            seed = (settings.seed << 32) + step
            loss, _ = model.get_loss(batch, seed=seed, weighting=weighting, **levels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
            optimizer.step()
            average.update_parameters(model)
            # A gradient that is not finite spoils the weights a step before the loss shows it.
            losses.add(torch.where(norm.isfinite(), loss.detach(), norm), rate)
            step += 1
            bar.update()
            if step % FLUSH_EVERY == 0:
                bar.set_postfix(loss=f"{losses.collect():.3f}", lr=f"{rate:.1e}")
            if step % settings.checkpoint_every == 0 and step < settings.iterations:
                save()
        losses.collect()
    # The handler of Ctrl-C is the caller's again: a second one stops the writing below, which is safe.
    if step > first or not path.exists():
        save()
    save_model(average.module, out / MODEL_NAME, tuple(images.shape[2:]))
    if interrupted.is_set() and step < settings.iterations:
        raise TrainingInterrupted(step, path)
    return average.module.eval()


class LossLog:
    """The loss of every step, as a CSV file (``step`` counts from 1) that stays in line with the checkpoint.

    Args:
        path: the file; it is made anew for a run from step 0, and otherwise cut back to the first ``step`` rows.
        step: steps done so far.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._step = step
        self._fresh: list[tuple[Tensor, float]] = []
        self._unwritten: list[str] = []
        self._smooth: float | None = None
        kept = _read_rows(path, step) if step else []
        lines = [",".join(LOSS_COLUMNS), *(",".join(row) for row in kept)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise _cannot_write(path, error) from error

    def add(self, loss: Tensor, rate: float) -> None:
        """Note a step's loss, without waiting for the device."""
        self._fresh.append((loss, rate))

    def collect(self) -> float:
        """Read the noted losses from the device; returns the smoothed loss.

        Raises:
            TrainingError: one of them is not finite.
        """
        values = torch.stack([loss for loss, _ in self._fresh]).tolist() if self._fresh else []
        for value, (_, rate) in zip(values, self._fresh, strict=True):
            self._step += 1
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss of step {self._step}, or its gradient, is {value}: try a smaller "
                    "learning rate; no checkpoint was written after it"
                )
            self._unwritten.append(f"{self._step},{value:.6g},{rate:.6g}\n")
            self._smooth = value if self._smooth is None else 0.98 * self._smooth + 0.02 * value
        self._fresh.clear()
        return math.nan if self._smooth is None else self._smooth

    def flush(self) -> None:
        """Append what was noted to the file, down to the disk."""
        self.collect()
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(self._unwritten)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._unwritten.clear()


def read_losses(path: str | Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a ``losses.csv``."""
    rows = _read_rows(Path(path), None)
    return [int(row[0]) for row in rows], [float(row[1]) for row in rows]


def _read_rows(path: Path, last: int | None) -> list[list[str]]:
    """The whole rows of a loss file up to step ``last``; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [
            row for row in csv.reader(file) if len(row) == len(LOSS_COLUMNS) and row[0].isdecimal()
        ]
    return [row for row in rows if last is None or int(row[0]) <= last]


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"could not write {path}: {error.strerror or error}")


def _batch_indices(settings: TrainingSettings, n: int, step: int) -> Tensor:
    """Which images step ``step`` takes, int64 ``(batch_size,)``: a slice of an endless row of permutations."""
    begin = step * settings.batch_size
    end = begin + settings.batch_size
    epochs = range(begin // n, (end - 1) // n + 1)
    row = torch.cat([_permutation(settings.seed, n, epoch) for epoch in epochs])
    return row[begin - epochs[0] * n : end - epochs[0] * n]


@functools.lru_cache(maxsize=2)  # a batch touches the end of one epoch and the start of the next
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    keys = ops.philox_uniform((1, n), seed=seed, step=epoch, sample_offset=ORDER_SAMPLE, **HOST)
    return keys[0].argsort(stable=True)


def _batch_levels(settings: TrainingSettings, sigmas: Tensor, step: int) -> dict[str, Tensor]:
    """The noise levels of a step, ``(batch_size,)``: each uniform, together spread evenly over the ladder.

    Stratified: sample i draws from the i-th of ``batch_size`` equal parts of the ladder. Which sample that is, is
    random, so every sample meets every level; the loss varies less from step to step than with independent draws.

    Returns:
        ``labels``, int64, or ``sigma``, float32, as ``get_loss`` takes them.
    """
    size = settings.batch_size
    u = ops.philox_uniform(
        (1, size), seed=settings.seed, step=step, sample_offset=LABEL_SAMPLE, **HOST
    )[0]
    even = torch.arange(size) + u.double()
    if settings.levels == CONTINUOUS:
        ends = sigmas[-1].item(), sigmas[0].item()
        return {"sigma": log_uniform_sigmas(even / size, *ends).to(sigmas.device)}
    labels = (even * (len(sigmas) / size)).long().clamp(max=len(sigmas) - 1)
    return {"labels": labels.to(sigmas.device)}


def _check_same_run(
    checkpoint: Checkpoint, model: ScoreModel, data: dict[str, Any], settings: TrainingSettings
) -> None:
    config = dataclasses.replace(model.config, sigmas=model.sigmas.tolist())
    free = {"iterations": settings.iterations, "checkpoint_every": settings.checkpoint_every}
    # A checkpoint that does not know of a setting was made with its default.
    held = dataclasses.asdict(TrainingSettings(**{**checkpoint.settings, **free}))
    for what, there, here in (
        ("another configuration", config_to_dict(checkpoint.config), config_to_dict(config)),
        ("another data set", checkpoint.data, data),
        ("other settings", held, dataclasses.asdict(settings)),
    ):
        different = differences(there, here)
        if different:
            raise CheckpointError(f"the checkpoint was made with {what}: {different}")


def _fingerprint(images: Tensor) -> str:
    array = images.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(array).hexdigest()[:16]


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising in the middle of a step; the second one raises.

    Outside the main thread, where Python delivers no signals, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
