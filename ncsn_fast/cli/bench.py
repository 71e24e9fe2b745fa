"""The command ``ncsn-fast bench``, which hands on to the benchmark suite."""

from __future__ import annotations

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None


def bench_command(context: typer.Context) -> None:
    """Measure operators, layers, network, training and sampling beside PyTorch; its own --help tells more."""
    from ..benchmarks import command  # which no other command may need

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command.bench_command)
    own = typer.main.get_command(app)
    # Not app(...): it would take Ctrl-C for itself.
    with own.make_context("ncsn-fast bench", context.args) as inner:
        own.invoke(inner)
