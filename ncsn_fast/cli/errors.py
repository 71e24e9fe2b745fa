"""How every command shows errors: those to be expected as one line, ours with a traceback, and an exit status.

Belongs here: which errors are a user's, and what is printed of them. Does not belong here: the commands.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ..files import CheckpointError
from ..ops.dispatch import BackendError
from ..sampling import ScoreError
from ..sampling.to_folder import ShardError
from ..training import TrainingError, TrainingInterrupted, TrainingTerminated

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

USER_ERROR = 2
FAULT = 1  # of ours: anything that is not expected, shown with its traceback
DEBUG = "NCSN_FAST_DEBUG"  # an environment variable: expected errors with their traceback too
INTERRUPTED = 128 + 2  # as a shell reports SIGINT

EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    BackendError,
    CheckpointError,
    TrainingError,
    ScoreError,
    ShardError,
    torch.OutOfMemoryError,
)


def with_clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with expected errors and Ctrl-C as one line on stderr and an exit status."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EXPECTED_ERRORS as error:
            if os.environ.get(DEBUG, "") not in ("", "0"):
                traceback.print_exc()
            raise typer.Exit(complain(_one_line(error))) from error
        except (TrainingInterrupted, TrainingTerminated) as stop:
            how = "the same command" + (
                "" if command.__name__ == "demo_command" else " with --resume"
            )
            complain(f"{stop}; {how} goes on")
            terminated = isinstance(stop, TrainingTerminated)
            raise typer.Exit(stop.code if terminated else INTERRUPTED) from stop
        except KeyboardInterrupt as stop:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from stop
        except Exception as error:
            if isinstance(error, (typer.Exit, typer.Abort, typer.BadParameter.__base__)):
                raise
            traceback.print_exc()
            complain(f"unexpected {type(error).__name__}, a fault of ncsn_fast: {_one_line(error)}")
            raise typer.Exit(FAULT) from error

    return guarded


def complain(message: str) -> int:
    print(f"ncsn-fast: {message}", file=sys.stderr)
    return USER_ERROR


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
