"""The loop of a training, and the parts that it goes over.

Belongs here: :class:`Trainer`, a step, what is saved. Does not belong here: the checks before it (``trainer.py``), the
parts themselves: the batches (``order.py``), the objective (``objective.py``), settings (``settings.py``), checkpoints
(``checkpoints.py``) and which of them are kept (``keeping.py``), other processes (``parallel.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data import ImageDataset
from ..losses import loss_of_zero_score
from ..models.base import ScoreModel
from ..progress import progress
from .checkpoints import (
    CHECKPOINT_NAME,
    MODEL_NAME,
    Checkpoint,
    average_name,
    save_checkpoint,
    save_model,
)
from .guards import deferred_signals, end_of
from .keeping import clear_leftovers, forget, keep
from .live import LOG_EVERY, live_line
from .log import LOSSES_NAME, LossLog
from .objective import Objective
from .observers import Observer
from .order import Batches
from .parallel import ALONE, Processes
from .resuming import with_ema_warmup
from .settings import TrainingSettings


class Trainer:
    """The parts of a training, and the loop over them.

    :func:`train` checks its arguments, makes one and runs it. To replace a part, make a trainer, set the attribute, and
    run it; parts may be subclasses of today's, or anything with the methods that are used here::

        trainer = Trainer(model, images, settings, out)
        trainer.optimizer = torch.optim.AdamW(trainer.parameters, weight_decay=0.01)
        network = trainer.run()  # to go on instead: trainer.restore(load_checkpoint(...)) before

    Args:
        model: the network with its sigmas set; trained in place, moved to ``device``, and compiled in place if the
            settings say so.
        images: a data set or a tensor, ``(N, C, H, W)`` or points ``(N, D)``, floating point, finite.
        settings: how to train.
        out: the folder of the run.
        device: where to compute.
        processes: those that train together, of which the first one writes and calls observers.

    Attributes:
        batches: :class:`~ncsn_fast.training.order.Batches`, the batch of each step.
        objective: :class:`~ncsn_fast.training.objective.Objective`, the loss of a batch.
        parameters: what is optimised, a list.
        optimizer: Adam or AdamW.
        average: of the network's weights, an ``AveragedModel``; its ``module`` is the network to sample from.
        averages: the further ones by their decays, a dict of such.
        observers: a list of :class:`~ncsn_fast.training.observers.Observer`, called on the way.
        step: steps done.
        best: ``step`` and ``loss`` of the best checkpoint so far by a held-out loss; empty without one.
    """

    def __init__(
        self,
        model: ScoreModel,
        images: Tensor | ImageDataset,
        settings: TrainingSettings,
        out: str | Path,
        device: torch.device | str = "cpu",
        processes: Processes = ALONE,
    ) -> None:
        self.settings = with_ema_warmup(settings)
        self.out = Path(out)
        self.step = 0
        self.processes = processes
        self.model = model.to(device).train()
        self.batches = Batches(
            images, self.settings, model.sigmas, rank=processes.rank, processes=processes.count
        )
        self.data = self.batches.data.describe()
        self.objective = Objective(
            model, settings.weighting, settings.objective, directions=settings.directions
        )
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = _new_optimizer(self.parameters, settings)
        with torch.device("cpu"):  # of its counter, on which every step looks
            self.average = self._new_average(settings.ema_decay)
            self.averages = {decay: self._new_average(decay) for decay in settings.ema_decays}
        if settings.compile and model._compiled_call_impl is None:
            model.compile()
        self.observers: list[Observer] = []
        self.best: dict[str, float] = {}
        self._log: LossLog | None = None
        self._restored = False
        self._wrapped: nn.Module | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same run, exactly; torch's generator is as it was too."""
        self.model.load_state_dict(checkpoint.model)
        self.average.module.load_state_dict(checkpoint.ema)
        self.average.n_averaged.fill_(checkpoint.step)
        for decay, average in self.averages.items():
            average.module.load_state_dict(checkpoint.averages[average_name(decay)])
            average.n_averaged.fill_(checkpoint.step)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.objective.learned is not None:
            self.objective.learned.load_state_dict(checkpoint.weighting)
        torch.set_rng_state(checkpoint.torch_rng)
        self.step = checkpoint.step
        self.best = dict(checkpoint.best)
        self._restored = True

    def run(self, verbose: bool = True) -> ScoreModel:
        """Train to the last iteration, with checkpoints on the way; the moving average, in evaluation mode.

        Raises:
            CheckpointError, TrainingError, TrainingInterrupted, TrainingTerminated: as of :func:`train`.
        """
        first, last, device = self.step, self.settings.iterations, self.model.sigmas.device
        writes = self.processes.rank == 0
        if writes:
            self._begin()
        # Of several processes each may be told twice to stop, by the terminal and by torchrun.
        with deferred_signals(patient=self.processes.count > 1) as told:
            bar = progress(
                max(last, first),
                shown=verbose and writes,
                initial=first,
                desc="training",
                unit="step",
            )
            with bar:
                while self.step < last and not (signum := self.processes.highest(told.signum)):
                    loss, rate = self.train_step()
                    bar.update()
                    if writes:
                        self._log.add(loss, rate)
                        for observer in self.observers:
                            observer.on_step(self, loss, rate)
                        if self.step % LOG_EVERY == 0:  # reading a loss waits for the device
                            size = self.settings.batch_size
                            smooth = self._log.collect()
                            bar.set_postfix(live_line(bar, smooth, rate, size, device))
                        if self.step % self.settings.checkpoint_every == 0 and self.step < last:
                            self.save()
            if writes:
                self._end(first)
            self.processes.wait()  # or the end of one would be taken for a failure
        if self.step < last:
            raise end_of(signum, self.step, self.out / CHECKPOINT_NAME)
        return self.average.module.eval()

    def train_step(self) -> tuple[Tensor, float]:
        """One step: its loss, 0-d, on the device, and its learning rate.

        The loss is not read, so that nothing waits for the device. Where the gradient is not finite, it is the norm of
        the gradient in its place: such a gradient spoils the weights a step before the loss shows it.
        """
        rate = self.settings.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradient()
        limit = self.settings.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        for average in (self.average, *self.averages.values()):
            average.update_parameters(self.model)
        self.step += 1
        return torch.where(norm.isfinite(), loss, norm), rate

    def _gradient(self) -> Tensor:
        """The gradient of a step's batch, of all processes; its loss."""
        objective, parts = self._shared_objective(), self.settings.accumulate
        device = self.model.sigmas.device
        losses = []
        for part in range(parts):
            batch = self.batches.at(self.step, part)
            # Gradients are averaged over the processes with the last part.
            last = part == parts - 1 or objective is self.objective
            with contextlib.nullcontext() if last else objective.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bf16):
                    loss = objective(
                        batch.x, seed=batch.seed, sample_offset=batch.offset, **batch.levels
                    )
                (loss if parts == 1 else loss / parts).backward()
            losses.append(loss.detach())
        return self.processes.mean(losses[0] if parts == 1 else torch.stack(losses).mean())

    def _shared_objective(self) -> nn.Module:
        if self.processes.count == 1:
            return self.objective
        if self._wrapped is None or self._wrapped.module is not self.objective:
            self._wrapped = self.processes.wrap(self.objective)
        return self._wrapped

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
        losses = [observer.on_checkpoint(self) for observer in self.observers]
        found = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        if found and min(found) < self.best.get("loss", math.inf):
            self.best = {"step": self.step, "loss": min(found)}
        save_checkpoint(self.checkpoint(), self.out / CHECKPOINT_NAME)
        keep(self.out, self.step, self.settings.keep_last, self.best)

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
            averages={
                average_name(decay): average.module.state_dict()
                for decay, average in self.averages.items()
            },
            best=self.best,
        )

    def _begin(self) -> None:
        clear_leftovers(self.out)
        dim = math.prod(self.data["shape"][1:])
        of_nothing = loss_of_zero_score(dim, self.model.sigmas, self.objective.weighting)
        self._log = LossLog(self.out / LOSSES_NAME, self.step, of_nothing)
        # Only now, when the folder has proved writable: a run begun anew must not end with the old run's weights.
        if self._restored:  # it may have been killed just before
            keep(self.out, self.step, self.settings.keep_last, self.best)
        else:
            forget(self.out)
        for observer in self.observers:
            observer.on_start(self)

    def _end(self, first: int) -> None:
        self._log.collect()
        if self.step > first or not (self.out / CHECKPOINT_NAME).exists():
            self.save()
        save_model(self.average.module, self.out / MODEL_NAME, tuple(self.data["shape"][2:]))
        for observer in self.observers:
            observer.on_end(self)

    def _new_average(self, decay: float) -> AveragedModel:
        def rule(averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
            now = self.settings.ema_decay_at(self.step, decay)
            get_ema_multi_avg_fn(now)(averages, weights, None)

        return AveragedModel(self.model, multi_avg_fn=rule)


def _new_optimizer(parameters: list[Tensor], settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        decay = settings.weight_decay
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=decay, fused=True)
    return torch.optim.Adam(parameters, lr=settings.lr, fused=True)
