"""The command ``ncsn-fast info``."""

from __future__ import annotations

from typing import Annotated

from .. import info

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None


def info_command(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Versions, devices, the build, and which backend serves which operator, or why not."""
    typer.echo(info.as_json() if as_json else info.render(info.collect()))
