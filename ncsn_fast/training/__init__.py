"""Training: settings, a run that can stop at any moment and go on exactly, and its files.

Belongs here: the names that users import. Does not belong here: the settings (``settings.py``), the loop
(``trainer.py``), the record of losses (``log.py``), checkpoints (``checkpoints.py``); the objective's formula
(``losses.py`` of the package above).
"""

from __future__ import annotations

from .log import LOSSES_NAME, TrainingError, read_losses
from .settings import CONTINUOUS, LADDER, LEARNED, TrainingSettings
from .trainer import TrainingInterrupted, train

__all__ = [
    "CONTINUOUS",
    "LADDER",
    "LEARNED",
    "LOSSES_NAME",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingSettings",
    "read_losses",
    "train",
]
