"""Training: the arguments checked, a trainer made of them, and run.

Belongs here: what stands before the first step. Does not belong here: the loop (``loop.py``), its parts (settings
``settings.py``, order ``order.py``, objective ``objective.py``), checkpoints (``checkpoints.py``), several processes
(``parallel.py``). Trains any :class:`~ncsn_fast.models.base.ScoreModel`, on images or on points.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..data import ImageDataset
from ..data.ranges import check_range, no_more_hints
from ..distributed import called_as, network_inside
from ..models.base import SIGMA, ScoreModel
from ..models.config import article
from ..models.registry import new_network
from .checkpoints import CHECKPOINT_NAME, load_checkpoint
from .config import RunConfig, save_config
from .guards import sole_run
from .loop import Trainer
from .observers import Observer
from .order import check_data
from .parallel import ALONE, Processes, joined
from .resuming import check_same_run, with_ema_warmup
from .settings import CONTINUOUS, TrainingSettings


def train(
    model: ScoreModel,
    images: Tensor | ImageDataset,
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
    """Train a network, in one process or, started by torchrun, in several: see docs/training.md.

    The folder ``out`` receives ``checkpoint.pt``, ``losses.csv`` and ``model/`` (``save_pretrained`` of the moving
    average). Ctrl-C or SIGTERM ends the step that is running, writes all three and raises; a second Ctrl-C ends at
    once.

    A run that has diverged ends in an error and leaves the last checkpoint from before: where a loss is not finite, or
    where at a checkpoint or the end the smoothed loss is over ten thousand times that of an untrained network
    (:meth:`~ncsn_fast.training.log.LossLog.check`).

    Args:
        model: any network with its sigmas set. Trained in place, and moved to ``device``. Compiled
            by ``model.compile()`` or ``torch.compile(model)`` it is trained so, and saved under its plain names.
        images: a data set (:func:`~ncsn_fast.data.open_images`, which may be larger than memory), or a tensor:
            ``(N, C, H, W)`` in the network's ``data_range``, [-1, 1], or points ``(N, D)``; floating point, finite,
            N >= 1. They stay where they are; each batch is moved to ``device``.
        settings: how to train.
        out: the folder; made if need be.
        resume: go on from the checkpoint in ``out``, exactly as that run would have: with the same configuration,
            images and settings, except ``iterations``, ``checkpoint_every`` and ``keep_last``, which may change; so may
            the number of processes, with rounding that differs.
        overwrite: allow ``out`` to hold a run already, and replace it.
        device: where to compute; ``"cuda"`` in several processes is a GPU for each.
        verbose: show a bar with loss and rate.
        config: what model, images and settings were made from; kept as ``config.toml`` in ``out``, with the sizes and
            the ladder that follow from the data.
        observers: what is called on the way, see :class:`~ncsn_fast.training.observers.Observer`.

    Returns:
        The moving average, in evaluation mode: the network to sample from.

    Raises:
        TypeError: another model, or one inside DataParallel, DDP or the like.
        ValueError: images of another shape or dtype, outside the network's ``data_range``, or with NaN or infinity;
            continuous levels for a network conditioned on labels, which knows its ladder only; a batch that the
            processes cannot share out evenly.
        FileExistsError: ``out`` holds a run, and neither ``resume`` nor ``overwrite`` is given.
        FileNotFoundError: ``resume``, and ``out`` holds no checkpoint.
        CheckpointError: a file could not be written; the checkpoint to resume is damaged, or of another run.
        TrainingError: the loss is no longer finite, or has exploded; another run is training in ``out``; of several
            processes, they could not join, or one has ended.
        TrainingInterrupted: Ctrl-C.
        TrainingTerminated: SIGTERM; it is a ``SystemExit``, with the status 143.

    Warns:
        DataRangeWarning: all images are in [0, 1], or almost black, as if they had been scaled otherwise.
    """
    given, model = model, network_inside(model, ScoreModel)
    expected = getattr(model, "data_range", None)
    scaled = isinstance(images, ImageDataset)
    images = check_data(images, expected)
    # Here, so that its warning names the line that calls train.
    what = "images" if images.ndim == 4 else "points"
    ends = torch.tensor(images.ends, dtype=images.dtype, device="cpu")
    check_range(ends, expected, what, scaled=scaled)
    out = Path(out).expanduser()
    _hint_own_layers(model)
    no_more_hints(model)
    how = {"resume": resume, "overwrite": overwrite}
    with joined(device) as (processes, own):
        trainer = prepared(model, images, settings, out, device=own, processes=processes, **how)
        trainer.observers.extend(observers)
        writes = processes.rank == 0
        with sole_run(out) if writes else contextlib.nullcontext(), called_as(given, model):
            if config is not None and writes:
                save_config(config.made(model, images), out)
            return trainer.run(verbose)


def prepared(
    model: ScoreModel,
    images: ImageDataset,
    settings: TrainingSettings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
) -> Trainer:
    """The trainer of checked arguments, those of :func:`train`, with the checkpoint in it. Nothing is written."""
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
    trainer = Trainer(model, images, settings, out, device, processes)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    return trainer


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
