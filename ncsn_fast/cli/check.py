"""The command ``ncsn-fast check``."""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

FOUND_WRONG = 1


def check_command(
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON, with what `info` tells: for a bug report.")
    ] = False,
) -> None:
    """Compare every kernel with the reference, on this machine; in under a minute. Exit status 1 if one is wrong."""
    from ..benchmarks import check  # which no other command may need

    def tell(what: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    rows = check.check(tell=tell)
    tell("")
    typer.echo(check.as_json(rows) if as_json else check.render(rows))
    if any(row.status == check.WRONG for row in rows):
        raise typer.Exit(FOUND_WRONG)
