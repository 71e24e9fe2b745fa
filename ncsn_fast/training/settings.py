"""How to train: the settings of a run, what each may be, and what follows from them at a step.

Belongs here: settings as data. Does not belong here: the loop (``trainer.py``), the shape of a network
(``config.py``).
"""

from __future__ import annotations

import dataclasses
import math

from ..checks import boolean, integer, number, one_of, positive_int, positive_number
from ..losses import WEIGHTINGS

SCHEDULES = ("cosine", "constant")
LEARNED = "learned"
LADDER, CONTINUOUS = "ladder", "continuous"
MAX_SEED = 2**32 - 1  # above it in the 64 bits of a noise seed stands the step


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How to train. Numbers of NumPy and PyTorch are taken, and kept as Python's.

    Args:
        iterations: optimiser steps in all.
        batch_size: images a step.
        lr: learning rate of Adam, at its highest.
        lr_schedule: ``"cosine"``, down to zero at the last step, or ``"constant"``.
        warmup: steps over which the learning rate rises linearly from zero, before the schedule.
        ema_decay: of the moving average of the weights, in [0, 1); with ``ema_warmup``, at its highest.
        grad_clip: largest norm of the gradient; ``0`` for no clipping.
        seed: of the order of the data, the levels and the noise, ``0 <= seed < 2**32``.
        checkpoint_every: steps from one checkpoint to the next; there is always one at the end.
        weighting: of the noise levels in the loss, ``"sigma2"``, ``"one"`` or ``"learned"``; see
            :func:`~ncsn_fast.losses.denoising_score_matching_loss`.
        levels: ``"ladder"``, those of the network's ladder; or ``"continuous"``, any sigma between its ends, evenly
            spread in log sigma, for a network conditioned on sigma itself.
        ema_warmup: let the average begin short and grow, see :meth:`ema_decay_at`. ``None``: as the run that is
            resumed has it, and True in a new one. Without it, a run short beside ``1 / (1 - ema_decay)`` steps ends
            with an average of mostly untrained weights.

    Raises:
        TypeError: a value of another type, such as a string for a number; the message names the field.
        ValueError: a value out of its range; likewise.
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
    ema_warmup: bool | None = None

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "checkpoint_every"):
            self._store(name, positive_int(name, getattr(self, name)))
        self._store("warmup", integer("warmup", self.warmup, 0))
        self._store("seed", integer("seed", self.seed, 0, MAX_SEED))
        self._store("lr", positive_number("lr", self.lr))
        for name, expected, limit in (
            ("ema_decay", "in [0, 1)", 1.0),
            ("grad_clip", "0 (off) or positive and finite", math.inf),
        ):
            value = number(name, getattr(self, name))
            if not 0 <= value < limit:
                raise ValueError(f"{name} must be {expected}, got {value:g}")
            self._store(name, value)
        for name, known in (
            ("lr_schedule", SCHEDULES),
            ("weighting", (*WEIGHTINGS, LEARNED)),
            ("levels", (LADDER, CONTINUOUS)),
        ):
            self._store(name, one_of(name, getattr(self, name), known))
        if self.ema_warmup is not None:
            self._store("ema_warmup", boolean("ema_warmup", self.ema_warmup))

    def _store(self, name: str, value: object) -> None:
        """Set a field of this frozen object; for normalising during construction only."""
        object.__setattr__(self, name, value)

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup))
        if self.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.iterations))
        return rate

    def ema_decay_at(self, step: int) -> float:
        """The decay of the average at step ``step``, counted from 0; at step 0 the average is the weights themselves.

        With the warm-up, ``min(ema_decay, (1 + step) / (10 + step))``: the average reaches back over about a ninth of
        the steps done.
        """
        if self.ema_warmup is False:
            return self.ema_decay
        return min(self.ema_decay, (1 + step) / (10 + step))
