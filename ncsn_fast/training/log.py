"""The records of a run, and when a loss says that training has failed.

Belongs here: ``losses.csv``, the loss of every step; ``log.jsonl``, what was seen on the way; losses that are not
finite or have exploded. Does not belong here: the loss itself (``losses.py`` of the package above), what is looked at
and when (``watching.py``), pictures of it (``plots``).
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError, write_atomically

LOSSES_NAME = "losses.csv"
LOG_NAME = "log.jsonl"
LOSS_COLUMNS = ("step", "loss", "learning_rate")
# A smoothed loss so many times as large as an untrained network's is no training.
EXPLODED = 1e4


class TrainingError(RuntimeError):
    """Training cannot go on."""


class LossLog:
    """The loss of every step, as a CSV file (``step`` counts from 1) that stays in line with the checkpoint.

    Args:
        path: the file; it is made anew for a run from step 0, and otherwise cut back to the first ``step`` rows.
        step: steps done so far.
        of_nothing: the loss of a network that has learned nothing, the score 0
            (:func:`~ncsn_fast.losses.loss_of_zero_score`).

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int, of_nothing: float) -> None:
        self.path = path
        self._step = step
        self._of_nothing = of_nothing
        self._fresh: list[tuple[Tensor, float]] = []
        self._unwritten: list[str] = []
        self._smooth: float | None = None
        self._first: float | None = None
        kept = _read_rows(path, step) if step else []
        for row in kept:
            self._note(float(row[1]))
        lines = [",".join(LOSS_COLUMNS), *(",".join(row) for row in kept)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise cannot_write(path, error) from error

    def add(self, loss: Tensor, rate: float) -> None:
        """Note a step's loss, without waiting for the device."""
        self._fresh.append((loss, rate))

    def collect(self) -> float:
        """Read the noted losses from the device; returns the smoothed loss.

        Raises:
            TrainingError: one of them is not finite.
        """
        values = torch.stack([loss for loss, _ in self._fresh]).tolist() if self._fresh else []
        for value, (_, rate) in zip(values, self._fresh, strict=True):
            self._step += 1
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss of step {self._step}, or its gradient, is {value}: try a smaller "
                    "learning rate; no checkpoint was written after it"
                )
            self._unwritten.append(f"{self._step},{value:.6g},{rate:.6g}\n")
            self._note(value)
        self._fresh.clear()
        return math.nan if self._smooth is None else self._smooth

    def check(self) -> None:
        """Tell a run that has diverged from one that trains.

        It has if the smoothed loss (an average over some 50 steps) is over ten thousand times both the loss of the
        score 0, which knows nothing, and that of the first step, the network's own before any training. Single steps
        count for little: with the weighting ``"one"`` they differ by as much as the squares of the sigmas do.

        Raises:
            TrainingError: it has.
        """
        smooth = self.collect()
        if self._first is None:
            return
        level = max(self._of_nothing, self._first)
        if smooth > EXPLODED * level:
            raise TrainingError(
                f"the training has diverged: after step {self._step} the smoothed loss is {smooth:.3g}, and "
                f"{level:.3g} is what it is without any training: try a smaller learning rate; no checkpoint was "
                "written of this state"
            )

    def flush(self) -> None:
        """Append what was noted to the file, down to the disk."""
        self.collect()
        _append(self.path, self._unwritten)

    def _note(self, value: float) -> None:
        if self._first is None:
            self._first = value
        self._smooth = value if self._smooth is None else 0.98 * self._smooth + 0.02 * value


class RunLog:
    """``log.jsonl``: what was seen at a step, one JSON object a line, in line with the checkpoint as the losses are.

    Every record has ``step``, the steps done, and ``time``, in UTC. A killed run may have written more of them than its
    checkpoint knows of; they are cut off when it goes on. A number that is not finite is ``null``.

    Args:
        path: the file; made anew for a run from step 0, and otherwise cut back to the records up to ``step``.
        step: steps done so far.

    Attributes:
        kept: the records that were kept.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._unwritten: list[str] = []
        self.kept = [record for record in read_log(path) if record["step"] <= step] if step else []
        lines = "".join(json.dumps(record) + "\n" for record in self.kept)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lines.encode())
        except OSError as error:
            raise cannot_write(path, error) from error

    def add(self, step: int, **values: Any) -> None:
        """Note a record: plain values, lists and dictionaries of them."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"step": step, "time": now, **_jsonable(values)}
        self._unwritten.append(json.dumps(record, allow_nan=False) + "\n")

    def write(self, *, synced: bool = False) -> None:
        """Append what was noted to the file; down to the disk with ``synced``, as before a checkpoint.

        Raises:
            CheckpointError: the file cannot be written.
        """
        _append(self.path, self._unwritten, synced=synced)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``, in their order; none if there is no file. What is no whole record is left out."""
    path = Path(path)
    return list(_read_records(path)) if path.exists() else []


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield record


def _jsonable(value: Any) -> Any:
    """With six digits, as the losses have, and without NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _jsonable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_losses(path: str | Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a ``losses.csv``."""
    rows = _read_rows(Path(path), None)
    return [int(row[0]) for row in rows], [float(row[1]) for row in rows]


def _read_rows(path: Path, last: int | None) -> list[list[str]]:
    """The whole rows of a loss file up to step ``last``; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [
            row for row in csv.reader(file) if len(row) == len(LOSS_COLUMNS) and row[0].isdecimal()
        ]
    return [row for row in rows if last is None or int(row[0]) <= last]


def _append(path: Path, lines: list[str], *, synced: bool = True) -> None:
    """Append to a file, and empty the list.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            if synced:
                os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error
    lines.clear()


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """The error to raise where a file of a run could not be written."""
    return CheckpointError(f"could not write {path}: {error.strerror or error}")
