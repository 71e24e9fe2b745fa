"""Is it the same run: whether a checkpoint belongs to the network, the data and the settings that are to go on.

Belongs here: the comparison, and what an older checkpoint means by what it does not say. Does not belong here: the file
(``checkpoints.py``), the loop (``loop.py``).
"""

from __future__ import annotations

import dataclasses

from ..checks import differences
from ..data import ImageDataset
from ..data.ranges import IMAGE_RANGE
from ..files import CheckpointError
from ..models.base import ScoreModel
from ..models.registry import config_to_dict
from .checkpoints import Checkpoint
from .settings import TrainingSettings

FREE = (
    "iterations",
    "checkpoint_every",
    "keep_last",
)  # settings that may change when a run goes on
UNSAID = {
    "flips": False,
    "dequantise": False,
    "data_range": IMAGE_RANGE,
}  # of a description of data


def with_ema_warmup(
    settings: TrainingSettings, checkpoint: Checkpoint | None = None
) -> TrainingSettings:
    """The settings with ``ema_warmup`` decided: as the run that goes on has it, True in a new one."""
    if settings.ema_warmup is not None:
        return settings
    warmup = True if checkpoint is None else held_settings(checkpoint).ema_warmup
    return dataclasses.replace(settings, ema_warmup=warmup)


def held_settings(checkpoint: Checkpoint) -> TrainingSettings:
    """The settings of a checkpoint. One that does not say has a setting's default, but no warm-up of the average."""
    return TrainingSettings(**{"ema_warmup": False, **checkpoint.settings})


def check_same_run(
    checkpoint: Checkpoint,
    model: ScoreModel,
    data: ImageDataset,
    settings: TrainingSettings,
) -> None:
    """Refuse to go on with another network, other data or other settings than the checkpoint's.

    Raises:
        CheckpointError: the message says what differs, there and here.
    """
    config = dataclasses.replace(model.config, sigmas=model.sigmas.tolist())
    free = {name: getattr(settings, name) for name in FREE}
    held = dataclasses.replace(held_settings(checkpoint), **free)
    for what, there, here in (
        ("another configuration", config_to_dict(checkpoint.config), config_to_dict(config)),
        ("another data set", UNSAID | checkpoint.data, UNSAID | data.describe()),
        ("other settings", dataclasses.asdict(held), dataclasses.asdict(settings)),
    ):
        different = differences(there, here)
        if different:
            raise CheckpointError(f"the checkpoint was made with {what}: {different}")
