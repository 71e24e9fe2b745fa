"""The command ``ncsn-fast``.

Belongs here: the list of its commands, and its entry point. Does not belong here: the commands, one file each; options
that several share (``options.py``), the files that they write (``output.py``), how errors are shown (``errors.py``);
anything a Python user would want too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

from .. import __version__, memory, threads
from .bench import bench_command
from .check import check_command
from .convert import convert_command
from .demo import demo_command
from .errors import DEBUG, complain, with_clean_errors
from .evaluate import evaluate_command
from .info import info_command
from .report import report_command
from .sample import sample_command
from .schedule import schedule_command
from .train import train_command
from .tune import tune_command

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``ncsn-fast``: runs a command and exits.

    Exit status: 0; 2 for a mistake of the user, with one line on stderr (and the traceback before it, with --debug or
    NCSN_FAST_DEBUG=1); 1 for any other error, always with its traceback; 130 after Ctrl-C.
    """
    if typer is None:
        sys.exit(complain('the command line takes typer: pip install "ncsn_fast[cli]"'))
    if threads.is_command() and memory.why_not() is None:
        memory.keep_freed_memory()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage_error = typer.BadParameter.__base__  # click's, or the copy of it that typer has
    try:
        status = _build_app()(arguments or ["--help"], prog_name="ncsn-fast", standalone_mode=False)
    except usage_error as error:
        status = complain(f"{error.format_message()} (try --help)")
    sys.exit(status or 0)


def _build_app() -> typer.Typer:
    app = typer.Typer(
        help="Noise Conditional Score Networks: train on images, draw new ones.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def version(
        show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
        debug: Annotated[
            bool,
            typer.Option("--debug", help=f"Show the traceback of any error; as {DEBUG}=1 does."),
        ] = False,
    ) -> None:
        if debug:
            os.environ[DEBUG] = "1"  # for the processes that a command starts too
        if show:
            typer.echo(f"ncsn_fast {__version__}")
            raise typer.Exit

    for command in (
        train_command,
        sample_command,
        tune_command,
        evaluate_command,
        report_command,
        schedule_command,
        convert_command,
        demo_command,
        info_command,
        check_command,
    ):
        app.command(command.__name__.removesuffix("_command"))(with_clean_errors(command))
    hand_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("bench", context_settings=hand_on)(with_clean_errors(bench_command))
    return app
