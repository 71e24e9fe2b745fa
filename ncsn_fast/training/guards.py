"""What stands around a run: one run a folder, and Ctrl-C that waits for the end of a step.

Belongs here: locks and signals. Does not belong here: what is done about them (``trainer.py``).
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


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C; a checkpoint has been written. Attributes: ``step`` (steps done), ``checkpoint`` (its path)."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; checkpoint written to {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


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


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising in the middle of a step; the second one raises.

    Outside the main thread, where Python delivers no signals, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
