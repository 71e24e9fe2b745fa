"""What of a run is watched: these settings by their names, and which data are held out.

Belongs here: settings as data. Does not belong here: watching itself (``watching.py``), settings that change what is
trained (``settings.py``).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ..checks import boolean, number, positive_int
from ..data import ImageDataset


@dataclasses.dataclass(frozen=True)
class WatchSettings:
    """What is looked at on the way. Nothing of it changes what is trained, but for the data that are held out.

    Args:
        held_out: data that are not trained on: a share of the data in (0, 1), which is taken out of them, or what to
            read others from. A text that is a number is a share.
        evaluate_every: steps from one held-out loss to the next; ``None``: ``checkpoint_every``.
        samples_every: steps from one picture of samples to the next; ``None``: no pictures.
        tensorboard: write for TensorBoard too, into ``tensorboard/``.
        wandb: project of Weights & Biases to write to as well.

    Raises:
        TypeError, ValueError: a value of another type or out of its range; the message begins with the name.
    """

    held_out: float | str | None = None
    evaluate_every: int | None = None
    samples_every: int | None = None
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "samples_every"):
            if getattr(self, name) is not None:
                self._store(name, positive_int(name, getattr(self, name)))
        if self.held_out is not None:
            self._store("held_out", _share_or_path(self.held_out))
        elif self.evaluate_every is not None:
            raise ValueError("evaluate_every takes held-out data: give held_out too")
        self._store("tensorboard", boolean("tensorboard", self.tensorboard))
        if self.wandb is not None and not (isinstance(self.wandb, str) and self.wandb):
            raise TypeError(f"wandb must be the name of a project, got {self.wandb!r}")

    def _store(self, name: str, value: object) -> None:
        """Set a field of this frozen object; for normalising during construction only."""
        object.__setattr__(self, name, value)

    @property
    def share(self) -> float | None:
        """The share of the data that is held out; ``None`` if it is none."""
        return self.held_out if isinstance(self.held_out, float) else None


WATCH_NAMES = tuple(field.name for field in dataclasses.fields(WatchSettings))


def _share_or_path(value: object) -> float | str:
    if isinstance(value, (str, Path)):
        try:
            value = float(value)
        except ValueError:
            return str(value)
    share = number("held_out", value)
    if not 0 < share < 1:
        raise ValueError(f"held_out must be a share in (0, 1), or a path, got {share:g}")
    return share


def held_out_rows(n: int, share: float) -> Tensor:
    """Which of ``n`` samples a share is: spread evenly, so that of sorted data each kind is held out.

    They depend on nothing else, so that runs with other seeds and settings are measured on the same.

    Returns:
        bool ``(n,)``.

    Raises:
        ValueError: too few samples for both parts.
    """
    count = max(1, round(share * n))
    if count >= n:
        raise ValueError(f"held_out {share:g} of {n} samples leaves none to train on")
    middles = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) * (n / count)
    rows = torch.zeros(n, dtype=torch.bool, device="cpu")
    rows[middles.long()] = True
    return rows


def split_held_out(
    data: Tensor | ImageDataset, share: float
) -> tuple[Tensor | ImageDataset, Tensor | ImageDataset]:
    """Data to train on, and a share of them that is held out, :func:`held_out_rows`; of a data set both are views.

    Raises:
        Those of :func:`held_out_rows`.
    """
    held = held_out_rows(len(data), share)
    if isinstance(data, ImageDataset):
        return data.part(~held), data.part(held)
    rows = held.to(data.device)
    return data[~rows], data[rows]
