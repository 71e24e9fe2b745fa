"""The command ``ncsn-fast schedule``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .. import plots
from ..plots import figures
from ..schedules import make_sigmas, suggest_num_scales, suggest_sigma_begin, suggest_step_lr
from .options import DIGITS, choose_device, open_data
from .output import check_pictures

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None


def schedule_command(
    data: Annotated[
        str,
        typer.Argument(help='Folder of images, .npy or .npz file, or "digits" (scikit-learn\'s).'),
    ] = DIGITS,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width.", show_default="32, of the digits 8")
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="1 for grey, 3 for RGB.", show_default="3, of the digits 1"),
    ] = None,
    sigma_end: Annotated[float, typer.Option(help="Smallest noise level.")] = 0.01,
    c: Annotated[
        float, typer.Option("--c", help="Overlap of neighbours; the paper's ladders have 0.567.")
    ] = 0.5,
    num_classes: Annotated[
        int | None, typer.Option(help="Noise levels.", show_default="from the overlap")
    ] = None,
    steps: Annotated[int, typer.Option(help="Langevin steps at each noise level.")] = 5,
    plot: Annotated[
        Path | None, typer.Option(help="Also a picture (.png) of the ladder and its step sizes.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where distances are taken.")] = "auto",
) -> None:
    """Suggest noise levels and a step size for data, by the rules of Song & Ermon 2020."""
    where = choose_device(device)
    check_pictures({"--plot": plot})
    if plot is not None:
        figures.require()
    images = open_data(data, image_size, channels)
    dim = images[0].numel()
    begin = suggest_sigma_begin(images, where)
    levels = suggest_num_scales(dim, begin, sigma_end, c) if num_classes is None else num_classes
    sigmas = make_sigmas(begin, sigma_end, levels)
    step_lr = float(f"{suggest_step_lr(sigmas, steps):.3g}")
    typer.echo(
        f"{len(images)} images of {tuple(images.shape[1:])}, {dim} dimensions\n"
        f"sigma_begin {begin:g}  (technique 1: the largest distance between two images)\n"
        f"sigma_end   {sigma_end:g}\n"
        f"num_classes {levels}  "
        + (f"(technique 2: overlap {c:g})\n" if num_classes is None else "(given)\n")
        + f"step_lr     {step_lr:g}  (technique 4: {steps} steps at each level)\n"
        f"ncsn-fast train --sigma-begin {begin:g} --sigma-end {sigma_end:g} --num-classes {levels} ...\n"
        f"ncsn-fast sample ... --steps {steps} --step-lr {step_lr:g}"
    )
    if plot is not None:
        plots.ladder(sigmas.tolist(), step_lr, plot)
        typer.echo(f"picture: {plot}")
