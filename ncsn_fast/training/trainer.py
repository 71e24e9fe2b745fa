"""The trainer: its parts, one step, the loop, and a run that can stop at any moment and go on exactly.

Belongs here: how the parts work together. Does not belong here: the parts: settings (``settings.py``), the data and
their order (``order.py``), the objective (``objective.py``), the record of losses (``log.py``), the checkpoint file
(``checkpoints.py``), whether it is the same run (``resuming.py``), locks and signals (``guards.py``).

It trains any :class:`~ncsn_fast.models.base.ScoreModel`, on images or on points, in one process on one device.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.ranges import check_range, no_more_hints
from ..distributed import called_as, network_inside, world_size
from ..losses import loss_of_zero_score
from ..models.base import SIGMA, ScoreModel
from ..models.config import article
from ..models.registry import new_network
from ..progress import progress
from .checkpoints import (
    CHECKPOINT_NAME,
    MODEL_NAME,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from .config import RunConfig, save_config
from .guards import TrainingInterrupted, deferred_interrupt, sole_run
from .live import LOG_EVERY, live_line
from .log import LOSSES_NAME, LossLog, TrainingError
from .objective import Objective
from .observers import Observer
from .order import Batches, check_data, describe_data
from .resuming import check_same_run, with_ema_warmup
from .settings import CONTINUOUS, TrainingSettings


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
    config: RunConfig | None = None,
    observers: Iterable[Observer] = (),
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
            finite, N >= 1. They stay where they are; each batch is moved to ``device``.
        settings: how to train.
        out: the folder; made if need be.
        resume: go on from the checkpoint in ``out``, exactly as that run would have: with the same configuration,
            images and settings, except ``iterations`` and ``checkpoint_every``, which may change.
        overwrite: allow ``out`` to hold a run already, and replace it.
        device: where to compute.
        verbose: show a bar with loss and rate.
        config: what model, images and settings were made from; kept as ``config.toml`` in ``out``.
        observers: what is called on the way, see :class:`~ncsn_fast.training.observers.Observer`.

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
    given, model = model, network_inside(model, ScoreModel)
    expected = getattr(model, "data_range", None)
    check_data(images, expected)
    # Here, so that its warning names the line that calls train.
    check_range(images, expected, "images" if images.ndim == 4 else "points")
    out = Path(out).expanduser()
    trainer = prepared(
        model, images, settings, out, resume=resume, overwrite=overwrite, device=device
    )
    trainer.observers.extend(observers)
    _hint_own_layers(model)
    no_more_hints(model)
    with sole_run(out), called_as(given, model):
        if config is not None:
            save_config(config, out)
        return trainer.run(verbose)


def prepared(
    model: ScoreModel,
    images: Tensor,
    settings: TrainingSettings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> Trainer:
    """The trainer of checked arguments, those of :func:`train`, with the checkpoint in it. Nothing is written."""
    if world_size() > 1:
        raise TrainingError(
            f"this is one of {world_size()} processes (WORLD_SIZE, torch.distributed), each of which would do the "
            "whole training by itself: train does not share the work out yet; start it without torchrun, in one process"
        )
    path = out / CHECKPOINT_NAME
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{path} exists: resume that run, overwrite it, or choose another folder"
        )
    _check_levels(model, settings)
    checkpoint = load_checkpoint(path) if resume else None
    settings = with_ema_warmup(settings, checkpoint)
    if checkpoint is not None:
        check_same_run(checkpoint, model, images, settings)
    trainer = Trainer(model, images, settings, out, device)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    return trainer


class Trainer:
    """The parts of a training, and the loop over them.

    :func:`train` checks its arguments, makes one and runs it. To replace a part, make a trainer, set the attribute, and
    run it; parts may be subclasses of today's, or anything with the methods that are used here::

        trainer = Trainer(model, images, settings, out)
        trainer.optimizer = torch.optim.AdamW(trainer.parameters, weight_decay=0.01)
        network = trainer.run()  # to go on instead: trainer.restore(load_checkpoint(...)) before

    Args:
        model: the network with its sigmas set; trained in place, and moved to ``device``.
        images: ``(N, C, H, W)`` or points ``(N, D)``, floating point, finite.
        settings: how to train.
        out: the folder of the run.
        device: where to compute.

    Attributes:
        batches: :class:`~ncsn_fast.training.order.Batches`, the batch of each step.
        objective: :class:`~ncsn_fast.training.objective.Objective`, the loss of a batch.
        parameters: what is optimised, a list.
        optimizer: Adam.
        average: of the network's weights, an ``AveragedModel``; its ``module`` is the network to sample from.
        observers: a list of :class:`~ncsn_fast.training.observers.Observer`, called on the way.
        step: steps done.
    """

    def __init__(
        self,
        model: ScoreModel,
        images: Tensor,
        settings: TrainingSettings,
        out: str | Path,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = with_ema_warmup(settings)
        self.out = Path(out)
        self.step = 0
        self.data = describe_data(images)
        self.model = model.to(device).train()
        self.batches = Batches(images, self.settings, model.sigmas)
        self.objective = Objective(model, self.settings.weighting)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.settings.lr, fused=True)
        with torch.device("cpu"):  # of its counter, on which every step looks
            self.average = AveragedModel(model, multi_avg_fn=self._average_in)
        self.observers: list[Observer] = []
        self._log: LossLog | None = None
        self._restored = False

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same run, exactly; torch's generator is as it was too."""
        self.model.load_state_dict(checkpoint.model)
        self.average.module.load_state_dict(checkpoint.ema)
        self.average.n_averaged.fill_(checkpoint.step)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.objective.learned is not None:
            self.objective.learned.load_state_dict(checkpoint.weighting)
        torch.set_rng_state(checkpoint.torch_rng)
        self.step = checkpoint.step
        self._restored = True

    def run(self, verbose: bool = True) -> ScoreModel:
        """Train to the last iteration, with checkpoints on the way; the moving average, in evaluation mode.

        Raises:
            CheckpointError, TrainingError, TrainingInterrupted: as of :func:`train`.
        """
        first, last, device = self.step, self.settings.iterations, self.model.sigmas.device
        path = self.out / CHECKPOINT_NAME
        self._log = self._new_log()
        # Only now, when the folder has proved writable: a run begun anew must not end with the old run's weights.
        if not self._restored:
            path.unlink(missing_ok=True)
        for observer in self.observers:
            observer.on_start(self)
        with (
            deferred_interrupt() as interrupted,
            progress(
                max(last, first), shown=verbose, initial=first, desc="training", unit="step"
            ) as bar,
        ):
            while self.step < last and not interrupted.is_set():
                loss, rate = self.train_step()
                self._log.add(loss, rate)
                for observer in self.observers:
                    observer.on_step(self, loss, rate)
                bar.update()
                if self.step % LOG_EVERY == 0:  # reading a loss waits for the device
                    smooth = self._log.collect()
                    bar.set_postfix(live_line(bar, smooth, rate, self.settings.batch_size, device))
                if self.step % self.settings.checkpoint_every == 0 and self.step < last:
                    self.save()
            self._log.collect()
        # The handler of Ctrl-C is the caller's again: a second one stops the writing below, which is safe.
        if self.step > first or not path.exists():
            self.save()
        network = self.average.module
        save_model(network, self.out / MODEL_NAME, tuple(self.data["shape"][2:]))
        for observer in self.observers:
            observer.on_end(self)
        if interrupted.is_set() and self.step < last:
            raise TrainingInterrupted(self.step, path)
        return network.eval()

    def train_step(self) -> tuple[Tensor, float]:
        """One step: its loss, 0-d, on the device, and its learning rate.

        The loss is not read, so that nothing waits for the device. Where the gradient is not finite, it is the norm of
        the gradient in its place: such a gradient spoils the weights a step before the loss shows it.
        """
        rate = self.settings.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batches.at(self.step)
        loss = self.objective(batch.x, seed=batch.seed, **batch.levels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.settings.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return torch.where(norm.isfinite(), loss.detach(), norm), rate

    def save(self) -> None:
        """Write the record of losses and the checkpoint; observers are called before it.

        Raises:
            TrainingError: the training has diverged; nothing is written.
            CheckpointError: it could not be written.
        """
        if self._log is not None:
            self._log.check()
            # First: the record may run ahead of the checkpoint, resuming cuts it back.
            self._log.flush()
        for observer in self.observers:
            observer.on_checkpoint(self)
        save_checkpoint(self.checkpoint(), self.out / CHECKPOINT_NAME)

    def checkpoint(self) -> Checkpoint:
        """The state, all that :meth:`restore` needs; its tensors are the trainer's own, not copies."""
        learned = self.objective.learned
        return Checkpoint(
            config=dataclasses.replace(self.model.config, sigmas=self.model.sigmas.tolist()),
            model=self.model.state_dict(),
            ema=self.average.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            settings=dataclasses.asdict(self.settings),
            data=self.data,
            torch_rng=torch.get_rng_state(),
            weighting={} if learned is None else learned.state_dict(),
        )

    def _new_log(self) -> LossLog:
        dim = math.prod(self.data["shape"][1:])
        of_nothing = loss_of_zero_score(dim, self.model.sigmas, self.objective.weighting)
        return LossLog(self.out / LOSSES_NAME, self.step, of_nothing)

    def _average_in(self, averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
        get_ema_multi_avg_fn(self.settings.ema_decay_at(self.step))(averages, weights, None)


def _check_levels(model: ScoreModel, settings: TrainingSettings) -> None:
    if settings.levels == CONTINUOUS and model.conditioned_on != SIGMA:
        raise ValueError(
            'levels "continuous" take a network conditioned on sigma, such as ScoreMLP or ScoreCNN; '
            f"{article(type(model).__name__)} knows the levels of its ladder only"
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
