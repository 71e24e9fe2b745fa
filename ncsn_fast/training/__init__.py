"""Training: settings, a run that can stop at any moment and go on exactly, and its files.

Belongs here: the names that users import. Does not belong here: the settings (``settings.py``), the loop and its parts
(``trainer.py``, ``loop.py``), checkpoints (``checkpoints.py``); the objective's formula (``losses.py`` of
the package above).
"""

from __future__ import annotations

from .guards import TrainingInterrupted, TrainingTerminated
from .log import LOG_NAME, LOSSES_NAME, TrainingError, read_log, read_losses
from .objective import Objective
from .observers import Observer
from .settings import CONTINUOUS, LADDER, LEARNED, TrainingSettings
from .trainer import Trainer, train
from .watching import HeldOut, Samples, Watch

__all__ = [
    "CONTINUOUS",
    "LADDER",
    "LEARNED",
    "LOG_NAME",
    "LOSSES_NAME",
    "HeldOut",
    "Objective",
    "Observer",
    "Samples",
    "Trainer",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingSettings",
    "TrainingTerminated",
    "Watch",
    "read_log",
    "read_losses",
    "train",
]
