"""What stands around a run: one run a folder, and signals that wait for the end of a step.

Belongs here: locks and signals. Does not belong here: what is done about them (``loop.py``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from ..files import CheckpointError
from .log import TrainingError

TERMINATED = 128 + 15  # as a shell reports SIGTERM


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C; a checkpoint has been written. Attributes: ``step`` (steps done), ``checkpoint`` (its path)."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; checkpoint written to {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


class TrainingTerminated(SystemExit):
    """SIGTERM, as a cluster gives notice; a checkpoint has been written. Not caught, it is the exit status 143.

    Attributes: ``step`` (steps done), ``checkpoint`` (its path).
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(TERMINATED)
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"terminated after step {self.step}; checkpoint written to {self.checkpoint}"


@contextlib.contextmanager
def sole_run(out: Path) -> Iterator[None]:
    """A lock on the folder while the block runs, where there are such: two runs in one would spoil each other.

    It goes with the process, however that ends, and leaves no file.

    Raises:
        TrainingError: another process, or another call in this one, has it.
        CheckpointError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(out, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"could not write {out}: {error.strerror or error}") from error
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainingError(
                    f"another run is training in {out}: choose another folder"
                ) from error
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if handle is not None:
            os.close(handle)


class Told:
    """Whether the process was told to stop. Attributes: ``signum``, by which signal; 0: it was not."""

    signum: int = 0


@contextlib.contextmanager
def deferred_signals(*, patient: bool = False) -> Iterator[Told]:
    """Ctrl-C and SIGTERM are noted instead of ending a step, or a file, in the middle; a second Ctrl-C does.

    Outside the main thread, where Python delivers no signals, none is ever noted.

    Args:
        patient: a second Ctrl-C does not either.
    """
    told = Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def handle(signum: int, frame: object) -> None:
        if signum == signal.SIGINT == told.signum and not patient:
            raise KeyboardInterrupt
        told.signum = told.signum or signum

    previous = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def end_of(signum: int, step: int, checkpoint: Path) -> TrainingInterrupted | TrainingTerminated:
    """The exception with which a run that was told to stop ends."""
    kind = TrainingTerminated if signum == signal.SIGTERM else TrainingInterrupted
    return kind(step, checkpoint)
