"""The command ``ncsn-fast report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..files import write_atomically
from ..plots import run_page
from ..training.config import CONFIG_NAME
from ..training.log import LOG_NAME, LOSSES_NAME, read_log, read_losses
from ..training.presets import read_toml
from ..training.watching import sample_pictures

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

REPORT_NAME = "report.html"


def report_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file.", show_default=f"{REPORT_NAME}, in the run's folder"),
    ] = None,
) -> None:
    """Make one HTML page about a run: curves, held-out loss by level, samples, settings, machine.

    The file needs nothing beside it. The run may still be going on; the page is of what it has written so far.
    """
    losses_file = run / LOSSES_NAME
    if not losses_file.is_file():
        raise FileNotFoundError(f"{run} holds no run: there is no {losses_file}")
    _, losses = read_losses(losses_file)
    if not losses:
        raise ValueError(f"{losses_file} holds no losses yet: they are written with a checkpoint")
    config = run / CONFIG_NAME
    page = run_page(
        run.resolve().name,
        losses=losses,
        records=read_log(run / LOG_NAME),
        pictures=[(step, path.read_bytes()) for step, path in sample_pictures(run)],
        settings=read_toml(config) if config.is_file() else {},
    )
    out = run / REPORT_NAME if out is None else out
    write_atomically(out, page.encode())
    typer.echo(f"report: {out}")
