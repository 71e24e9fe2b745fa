"""The command ``ncsn-fast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from ..training.checkpoints import CHECKPOINT_NAME

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None


def demo_command(
    name: Annotated[
        Literal["digits", "two-gaussians", "checkerboard"], typer.Argument(help="Which demo.")
    ] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for everything.", show_default="ncsn_demo, or ncsn_demo_NAME"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, training and samples.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(help="Training steps.", show_default="the demo's own")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="How many to draw.", show_default="100 digits, or 2000 points"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew, even if OUT holds a demo's network.")
    ] = False,
) -> None:
    """Train a small network on small data, draw from it, measure and draw figures.

    digits: scikit-learn's handwritten ones, with an NCSN, a few minutes. two-gaussians: points whose score is known, to
    compare with. checkerboard: points again. About a minute each. A network that is in OUT already is trained to its
    end, or used as it is.
    """
    from ..demos import digits as demo
    from ..demos import points as toy_demos

    run = {
        "digits": demo.run,
        "two-gaussians": toy_demos.run_two_gaussians,
        "checkerboard": toy_demos.run_checkerboard,
    }[name]
    if out is None:
        out = Path("ncsn_demo" if name == "digits" else f"ncsn_demo_{name.replace('-', '_')}")
    if fresh:
        (out / CHECKPOINT_NAME).unlink(missing_ok=True)
    given = {} if samples is None else {"n_samples": samples}
    run(out, seed=seed, iterations=iterations, **given)
