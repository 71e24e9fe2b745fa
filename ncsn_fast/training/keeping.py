"""Which checkpoints stay beside the newest one: the last few, and the best by a held-out loss.

Belongs here: their names, and the files. Does not belong here: what a checkpoint holds (``checkpoints.py``), when one
is written (``loop.py``).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..files import CheckpointError, write_atomically
from .checkpoints import CHECKPOINT_NAME, MODEL_NAME

BEST_NAME = "best.pt"


def kept_name(step: int) -> str:
    """The name of a checkpoint that is kept: ``checkpoint_00001000.pt``."""
    return f"checkpoint_{step:08d}.pt"


def kept(out: Path) -> list[Path]:
    """Those in the folder of a run, the oldest first."""
    found = out.glob("checkpoint_*.pt")
    return sorted(path for path in found if re.fullmatch(r"checkpoint_\d{8,}\.pt", path.name))


def keep(out: Path, step: int, last: int, best: dict[str, float]) -> None:
    """Keep the newest checkpoint, of ``step``, if it is to be, and remove what is no longer.

    They take no room of their own where the file system has hard links.

    Args:
        last: how many of the last ones; 1: the newest only, under its own name.
        best: ``step`` and ``loss`` of the best one; empty if nobody says.

    Raises:
        CheckpointError: one could not be written.
    """
    newest = out / CHECKPOINT_NAME
    try:
        if last > 1:
            _link(newest, out / kept_name(step))
        for path in kept(out)[: None if last == 1 else -last]:
            path.unlink()
        if best and best["step"] == step:
            _link(newest, out / BEST_NAME)
    except OSError as error:
        raise CheckpointError(
            f"could not keep a checkpoint in {out}: {error.strerror or error}"
        ) from error


def clear_leftovers(out: Path) -> None:
    """Remove the temporary files of a run in this folder that was killed while it wrote."""
    for path in out.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)
    for path in (out / MODEL_NAME).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def forget(out: Path) -> None:
    """Remove the checkpoints of a run that is begun anew."""
    for path in (out / CHECKPOINT_NAME, out / BEST_NAME, *kept(out)):
        path.unlink(missing_ok=True)


def _link(newest: Path, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(newest, temporary)
    except OSError:  # a file system without hard links
        write_atomically(path, newest.read_bytes())
        return
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # which stays if both were the same file
