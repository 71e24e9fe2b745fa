"""What looks at a training from outside: logs, held-out losses, pictures on the way.

Belongs here: the moments at which the loop calls an observer. Does not belong here: observers, and the loop
(``loop.py``), which knows nothing of what they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .loop import Trainer


class Observer:
    """A base class for what watches a training; each method does nothing, and may be overridden.

    Give observers to :func:`~ncsn_fast.training.train`, or append them to ``trainer.observers`` before ``run``. They
    are called in that order, in the process that writes the files only, so they must not wait for other processes. They
    read the trainer (``step``, ``model``, ``average``, ``settings``, ``out``, ...) and change nothing of it, nor the
    state of torch's generator, or a run that goes on would not be exact. An error of theirs ends the training.

    Example::

        class Printer(Observer):
            def on_checkpoint(self, trainer):
                print(trainer.step)
    """

    def on_start(self, trainer: Trainer) -> None:
        """The run begins, or goes on after ``trainer.step`` steps: what a log holds of later steps is to be cut off."""

    def on_step(self, trainer: Trainer, loss: Tensor, rate: float) -> None:
        """A step is done, the ``trainer.step``-th.

        Args:
            loss: of the step, 0-d, on the device. Reading it waits for the device: keep it, and read many at once.
            rate: the learning rate of the step.
        """

    def on_checkpoint(self, trainer: Trainer) -> float | None:
        """The checkpoint of ``trainer.step`` is about to be written: a log that runs ahead of it can be cut back.

        Returns:
            A loss on held-out data, if the observer finds one, the lower the better; otherwise ``None``.
        """

    def on_end(self, trainer: Trainer) -> None:
        """The run is over, or was interrupted; its last checkpoint and ``model/`` are written. Not called on errors."""
