"""TensorBoard and Weights & Biases: the numbers and pictures of a run, handed on.

Belongs here: what is the same of all such boards, and one thin class for each. Does not belong here: what is looked at
(``watching.py``). Both packages are extras, and imported where used.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..files import write_atomically
from .log import cannot_write

if TYPE_CHECKING:
    from PIL.Image import Image

    from .watch_settings import WatchSettings

INSTALL = 'pip install "ncsn_fast[{extra}]"'
WANDB_ID_NAME = "wandb_id"


class Board(Protocol):
    """What a board is given."""

    def start(self, out: Path, step: int, settings: Mapping[str, Any]) -> None:
        """The run in the folder ``out`` begins, or goes on after ``step`` steps; plain settings."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their names."""

    def picture(self, step: int, name: str, image: Image) -> None:
        """A picture of pillow."""

    def close(self) -> None:
        """The run is over, or interrupted."""


class TensorBoard:
    """``tensorboard/`` in the run's folder, by ``torch.utils.tensorboard``.

    Raises:
        ImportError: TensorBoard is not installed; the message says what to do.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--tensorboard takes TensorBoard: {INSTALL.format(extra='tensorboard')}"
            ) from error
        self._make = SummaryWriter

    def start(self, out: Path, step: int, settings: Mapping[str, Any]) -> None:
        """What was written of later steps is hidden, as they come again."""
        self._writer = self._make(out / "tensorboard", purge_step=step + 1 if step else 0)
        lines = (f"    {name} = {value}" for name, value in settings.items())
        self._writer.add_text("settings", "\n".join(lines), step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project of Weights & Biases, as ``wandb`` is set up; a run that goes on is the same run there.

    Args:
        project: its name.

    Raises:
        ImportError: wandb is not installed; the message says what to do.
    """

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"--wandb takes wandb: {INSTALL.format(extra='wandb')}") from error
        self._wandb, self._project = wandb, project

    def start(self, out: Path, step: int, settings: Mapping[str, Any]) -> None:
        path = out / WANDB_ID_NAME
        if step == 0 or not path.exists():
            try:
                write_atomically(path, f"{uuid.uuid4().hex}\n".encode())
            except OSError as error:
                raise cannot_write(path, error) from error
        self._run = self._wandb.init(
            project=self._project,
            name=out.resolve().name,
            id=path.read_text().strip(),
            resume="allow",
            dir=str(out),
            config=dict(settings),
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


def boards_of(settings: WatchSettings) -> list[Board]:
    """Those that are asked for. ImportError: one is not installed."""
    boards: list[Board] = [TensorBoard()] if settings.tensorboard else []
    if settings.wandb is not None:
        boards.append(WeightsAndBiases(settings.wandb))
    return boards
