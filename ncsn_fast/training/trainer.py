"""Training: one process, one device, and a run that can stop at any moment and go on exactly.

Belongs here: the loop, the order of the data, their noise levels. Does not belong here: its settings
(``settings.py``), the objective (``losses.py``, ``get_loss``), the record of losses (``losslog.py``), the checkpoint
file (``checkpoints.py``), reading images (``data/``).

It trains any :class:`~ncsn_fast.models.base.ScoreModel`, on images or on points.

Nothing depends on the state of a random generator: the data, levels and noise of a step are functions of the seed
and the step's number, by the counter-based stream of ``ops.philox_*``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from .. import ops
from ..checks import differences
from ..data.ranges import Range, byte_hint, check_range, no_more_hints
from ..distributed import called_as, network_inside, world_size
from ..files import CheckpointError
from ..losses import LearnedWeighting, loss_of_zero_score
from ..models.base import SIGMA, ScoreModel, log_uniform_sigmas
from ..models.config import article
from ..models.registry import config_to_dict, new_network
from ..progress import progress
from ..streams import LABEL_SAMPLE, ORDER_SAMPLE, STREAM_BATCHES
from .checkpoints import (
    CHECKPOINT_NAME,
    MODEL_NAME,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from .log import LOSSES_NAME, LossLog, TrainingError
from .settings import CONTINUOUS, LEARNED, TrainingSettings

FLUSH_EVERY = 10  # steps; reading a loss waits for the device
HOST = {"device": "cpu", "backend": "auto"}  # whatever backend was chosen for the network


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C; a checkpoint has been written. Attributes: ``step`` (steps done), ``checkpoint`` (its path)."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; checkpoint written to {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


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

    A run that has diverged ends in an error and leaves the last checkpoint from before: where a loss is not finite, or
    where at a checkpoint or the end the smoothed loss is over ten thousand times that of an untrained network
    (:meth:`~ncsn_fast.training.log.LossLog.check`).

    Args:
        model: any network with its sigmas set. Trained in place, and moved to ``device``. Compiled
            by ``model.compile()`` or ``torch.compile(model)`` it is trained so, and saved under its plain names.
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
        TypeError: another model, or one inside DataParallel, DDP or the like.
        ValueError: images of another shape or dtype, outside the network's ``data_range``, or with NaN or infinity;
            continuous levels for a network conditioned on labels, which knows its ladder only.
        FileExistsError: ``out`` holds a run, and neither ``resume`` nor ``overwrite`` is given.
        FileNotFoundError: ``resume``, and ``out`` holds no checkpoint.
        CheckpointError: a file could not be written; the checkpoint to resume is damaged, or of another run.
        TrainingError: the loss is no longer finite, or has exploded; one of several processes, as of torchrun, each of
            which would train the same; another process is training in ``out``.
        TrainingInterrupted: Ctrl-C.

    Warns:
        DataRangeWarning: all images are in [0, 1], or almost black, as if they had been scaled otherwise.
    """
    out = Path(out).expanduser()
    path = out / CHECKPOINT_NAME
    given, model = model, network_inside(model, ScoreModel)
    expected = getattr(model, "data_range", None)
    _check_images(images, expected)
    # Here, so that its warning names the line that calls train.
    check_range(images, expected, "images" if images.ndim == 4 else "points")
    if world_size() > 1:
        raise TrainingError(
            f"this is one of {world_size()} processes (WORLD_SIZE, torch.distributed), each of which would do the "
            "whole training by itself: train does not share the work out yet; start it without torchrun, in one process"
        )
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{path} exists: resume that run, overwrite it, or choose another folder"
        )

    if settings.levels == CONTINUOUS and model.conditioned_on != SIGMA:
        raise ValueError(
            'levels "continuous" take a network conditioned on sigma, such as ScoreMLP or ScoreCNN; '
            f"{article(type(model).__name__)} knows the levels of its ladder only"
        )

    data = {"shape": tuple(images.shape), "fingerprint": _fingerprint(images)}
    checkpoint = load_checkpoint(path) if resume else None
    settings = _with_ema_warmup(settings, checkpoint)
    if checkpoint is not None:
        _check_same_run(checkpoint, model, data, settings)
    _hint_own_layers(model)
    no_more_hints(model)
    with _sole_run(out), called_as(given, model):
        return _train(model, images.to(device), settings, out, checkpoint, data, verbose)


def _train(
    model: ScoreModel,
    images: Tensor,
    settings: TrainingSettings,
    out: Path,
    checkpoint: Checkpoint | None,
    data: dict[str, Any],
    verbose: bool,
) -> ScoreModel:
    """The training itself, of checked arguments, on the device of the images; from the checkpoint on, if there is one.

    Args:
        data: of the images, as a checkpoint holds it.
    """
    path, device = out / CHECKPOINT_NAME, images.device
    model.to(device).train()
    learned = None
    if settings.weighting == LEARNED:
        learned = LearnedWeighting(device="cpu", dtype=torch.float32).to(device)
    weighting = settings.weighting if learned is None else learned
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters += [] if learned is None else learned.parameters()
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=True)
    step = 0

    def average_in(averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
        get_ema_multi_avg_fn(settings.ema_decay_at(step))(averages, weights, None)

    with torch.device("cpu"):  # of its counter, on which every step looks
        average = AveragedModel(model, multi_avg_fn=average_in)
    if checkpoint is not None:
        model.load_state_dict(checkpoint.model)
        average.module.load_state_dict(checkpoint.ema)
        average.n_averaged.fill_(checkpoint.step)
        optimizer.load_state_dict(checkpoint.optimizer)
        if learned is not None:
            learned.load_state_dict(checkpoint.weighting)
        torch.set_rng_state(checkpoint.torch_rng)
        step = checkpoint.step
    first = step
    of_nothing = loss_of_zero_score(images[0].numel(), model.sigmas, weighting)
    losses = LossLog(out / LOSSES_NAME, first, of_nothing)
    # Dropped only now, when the folder has proved writable: a run begun anew must not end with the old run's weights.
    if checkpoint is None:
        path.unlink(missing_ok=True)

    def save() -> None:
        losses.check()
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


def _batch_indices(settings: TrainingSettings, n: int, step: int) -> Tensor:
    """Which images step ``step`` takes, int64 ``(batch_size,)``: a slice of an endless row of permutations."""
    begin = step * settings.batch_size
    end = begin + settings.batch_size
    epochs = range(begin // n, (end - 1) // n + 1)
    row = torch.cat([_permutation(settings.seed, n, epoch) for epoch in epochs])
    return row[begin - epochs[0] * n : end - epochs[0] * n]


@functools.lru_cache(maxsize=2)  # a batch touches the end of one epoch and the start of the next
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    place = {"step": epoch, "sample_offset": ORDER_SAMPLE, **HOST}
    keys = ops.philox_uniform((1, n), seed=seed, stream=STREAM_BATCHES, **place)
    return keys[0].argsort(stable=True)


def _batch_levels(settings: TrainingSettings, sigmas: Tensor, step: int) -> dict[str, Tensor]:
    """The noise levels of a step, ``(batch_size,)``: each uniform, together spread evenly over the ladder.

    Stratified: sample i draws from the i-th of ``batch_size`` equal parts of the ladder. Which sample that is, is
    random, so every sample meets every level; the loss varies less from step to step than with independent draws.

    Returns:
        ``labels``, int64, or ``sigma``, float32, as ``get_loss`` takes them.
    """
    size = settings.batch_size
    place = {"step": step, "sample_offset": LABEL_SAMPLE, **HOST}
    u = ops.philox_uniform((1, size), seed=settings.seed, stream=STREAM_BATCHES, **place)[0]
    even = torch.arange(size, dtype=torch.float64, device="cpu") + u.double()
    if settings.levels == CONTINUOUS:
        ends = sigmas[-1].item(), sigmas[0].item()
        return {"sigma": log_uniform_sigmas(even / size, *ends).to(sigmas.device)}
    labels = (even * (len(sigmas) / size)).long().clamp(max=len(sigmas) - 1)
    return {"labels": labels.to(sigmas.device)}


def _check_images(images: Tensor, expected: Range | None) -> None:
    if images.ndim not in (2, 4) or images.numel() < 1 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (N, C, H, W), or points (N, D), with N >= 1, got {images.dtype} of shape "
            f"{tuple(images.shape)}{byte_hint(images.dtype, expected)}"
        )
    broken = ~images.isfinite()
    if bool(broken.any()):
        first = tuple(broken.nonzero()[0].tolist())
        raise ValueError(
            f"images must be finite, got {int(broken.sum())} values that are NaN or infinite, in "
            f"{int(broken.flatten(1).any(1).sum())} of {len(images)} samples: the first is {images[first].item()} at "
            f"images[{', '.join(map(str, first))}]"
        )


def _hint_own_layers(model: ScoreModel) -> None:
    """Warn before the training if what it writes will not load into a new network of the model's configuration."""
    with torch.device("meta"):
        plain = new_network(model.config).state_dict().keys()
    own = sorted(model.state_dict().keys() ^ plain)
    if own:
        warnings.warn(
            f"the model's layers are not those of a new {type(model).__name__} ({len(own)} names of weights differ, "
            f"such as {own[0]}): the checkpoint will load only into a model changed in the same way, not by "
            "load_model, ema_model or the command line",
            stacklevel=3,
        )


def _with_ema_warmup(settings: TrainingSettings, checkpoint: Checkpoint | None) -> TrainingSettings:
    """The settings with ``ema_warmup`` decided: as the run that goes on has it, True in a new one."""
    if settings.ema_warmup is not None:
        return settings
    warmup = True if checkpoint is None else _held_warmup(checkpoint)
    return dataclasses.replace(settings, ema_warmup=warmup)


def _held_warmup(checkpoint: Checkpoint) -> bool:
    """Whether a run warms its average up; one that does not say is older than the warm-up."""
    return checkpoint.settings.get("ema_warmup", False)


@contextlib.contextmanager
def _sole_run(out: Path) -> Iterator[None]:
    """A lock on the folder while the block runs, where there are such: two runs in one would spoil each other.

    It goes with the process, however that ends, and leaves no file.

    Raises:
        TrainingError: another process, or another call in this one, has it.
        CheckpointError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(out, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"could not write {out}: {error.strerror or error}") from error
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainingError(
                    f"another run is training in {out}: choose another folder"
                ) from error
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _check_same_run(
    checkpoint: Checkpoint, model: ScoreModel, data: dict[str, Any], settings: TrainingSettings
) -> None:
    config = dataclasses.replace(model.config, sigmas=model.sigmas.tolist())
    free = {"iterations": settings.iterations, "checkpoint_every": settings.checkpoint_every}
    # A checkpoint that does not know of a setting was made with its default.
    held = {**checkpoint.settings, **free, "ema_warmup": _held_warmup(checkpoint)}
    held = dataclasses.asdict(TrainingSettings(**held))
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
