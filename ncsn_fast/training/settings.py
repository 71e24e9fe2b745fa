"""How to train: the settings of a run, what each may be, and what follows from them at a step.

Belongs here: settings as data. Does not belong here: the loop (``loop.py``), the shape of a network
(``config.py``).
"""

from __future__ import annotations

import dataclasses
import math

from ..checks import boolean, integer, number, one_of, positive_int, positive_number
from ..losses import WEIGHTINGS

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("cosine", "linear", "constant")
LEARNED = "learned"
WEIGHTING_NAMES = (*WEIGHTINGS, LEARNED)
LADDER, CONTINUOUS = "ladder", "continuous"
LEVELS = (LADDER, CONTINUOUS)
DENOISING = "dsm"
OBJECTIVES = (DENOISING, "ssm", "ssm_vr")
MAX_SEED = 2**32 - 1  # above it in the 64 bits of a noise seed stands the step


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How to train. Numbers of NumPy and PyTorch are taken, and kept as Python's.

    Args:
        iterations: optimiser steps in all.
        batch_size: images a step, of all processes together.
        lr: learning rate of Adam, at its highest.
        lr_schedule: ``"cosine"`` or ``"linear"``, down to zero at the last step, or ``"constant"``.
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
        optimizer: ``"adam"`` or ``"adamw"``.
        weight_decay: of AdamW, decoupled from the gradient.
        accumulate: parts into which a batch is cut, one after the other, for less memory; it must divide
            ``batch_size``. The result is that of the whole batch, but for rounding.
        bf16: compute the network in bfloat16 (autocast); its statistics, the loss, the weights and the optimiser stay
            in float32.
        compile: compile the network by ``torch.compile``.
        ema_decays: of further averages, which are saved too, for ``load_model(run, weights="ema:0.99")``.
        keep_last: how many of the last checkpoints stay; 1: ``checkpoint.pt`` only.
        objective: ``"dsm"``, denoising score matching; ``"ssm"``, sliced score matching of the data at their noise
            levels, or ``"ssm_vr"``, its form of less variance; see
            :func:`~ncsn_fast.losses.sliced_score_matching_loss`.
        directions: of sliced score matching, random ones for each sample.

    Raises:
        TypeError: a value of another type, such as a string for a number; the message names the field.
        ValueError: a value out of its range, or one that another one does not go with; likewise.
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
    optimizer: str = "adam"
    weight_decay: float = 0.0
    accumulate: int = 1
    bf16: bool = False
    compile: bool = False
    ema_decays: tuple[float, ...] = ()
    keep_last: int = 1
    objective: str = DENOISING
    directions: int = 1

    def __post_init__(self) -> None:
        for name in (
            "iterations",
            "batch_size",
            "checkpoint_every",
            "accumulate",
            "keep_last",
            "directions",
        ):
            self._store(name, positive_int(name, getattr(self, name)))
        self._store("warmup", integer("warmup", self.warmup, 0))
        self._store("seed", integer("seed", self.seed, 0, MAX_SEED))
        self._store("lr", positive_number("lr", self.lr))
        self._store("ema_decay", _decay("ema_decay", self.ema_decay))
        if not isinstance(self.ema_decays, (tuple, list)):
            raise TypeError(f"ema_decays must be a list of numbers, got {self.ema_decays!r}")
        decays = {_decay("ema_decays", decay) for decay in self.ema_decays}
        self._store("ema_decays", tuple(sorted(decays - {self.ema_decay})))
        for name in ("grad_clip", "weight_decay"):
            value = number(name, getattr(self, name))
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 (off) or positive and finite, got {value:g}")
            self._store(name, value)
        for name, known in CHOICES.items():
            self._store(name, one_of(name, getattr(self, name), known))
        for name in ("bf16", "compile", *(["ema_warmup"] if self.ema_warmup is not None else [])):
            self._store(name, boolean(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size, {self.batch_size}, got {self.accumulate}"
            )
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f'weight_decay takes optimizer "adamw", got {self.weight_decay:g} with {self.optimizer!r}'
            )
        if self.objective != DENOISING and self.weighting == LEARNED:
            raise ValueError(
                f'objective {self.objective!r} takes the weighting "sigma2" or "one", got {LEARNED!r}'
            )
        if self.objective != DENOISING and self.compile:
            raise ValueError(
                f"objective {self.objective!r} takes second derivatives, which torch.compile does not know: got "
                "compile too"
            )

    def _store(self, name: str, value: object) -> None:
        """Set a field of this frozen object; for normalising during construction only."""
        object.__setattr__(self, name, value)

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup))
        if self.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.iterations))
        elif self.lr_schedule == "linear":
            rate *= 1 - step / self.iterations
        return rate

    def ema_decay_at(self, step: int, decay: float | None = None) -> float:
        """The decay of the average at step ``step``, counted from 0; at step 0 the average is the weights themselves.

        Of another average with ``decay``. With the warm-up, ``min(ema_decay, (1 + step) / (10 + step))``: the average
        reaches back over about a ninth of the steps done.
        """
        decay = self.ema_decay if decay is None else decay
        return decay if self.ema_warmup is False else min(decay, (1 + step) / (10 + step))


CHOICES = {
    "optimizer": OPTIMIZERS,
    "lr_schedule": SCHEDULES,
    "weighting": WEIGHTING_NAMES,
    "levels": LEVELS,
    "objective": OBJECTIVES,
}


def _decay(name: str, value: object) -> float:
    value = number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value:g}")
    return value
