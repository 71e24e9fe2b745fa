"""The command ``ncsn-fast evaluate``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from .. import plots
from ..data import ImageDataset
from ..data.ranges import from_image_range, to_image_range
from ..evaluation.features import choose_features
from ..evaluation.metrics import nearest_images
from ..evaluation.report import LOSS_IMAGES, REFERENCE, compare, evenly, losses_by_level, render
from ..files import write_atomically
from ..plots import pictures
from ..sampling import samplers
from .options import CACHE, DIGITS, choose_device, load_image_network, open_data
from .output import PICTURE_SIDE

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

ROWS, NEIGHBOURS = 10, 5  # of the picture
STEPS = 20  # at each noise level, as of sample
HELDOUT, OTHER_HALF = "held-out images", "real images"


def evaluate_command(
    source: Annotated[
        Path,
        typer.Argument(help="Folder of a run, a checkpoint file, or a save_pretrained folder."),
    ],
    data: Annotated[str, typer.Option(help="The training images, as of train.")] = DIGITS,
    heldout: Annotated[
        str | None,
        typer.Option(
            help="Images that were not trained on.",
            show_default="of the digits theirs; otherwise the other half of the data stands for them",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report.", show_default="evaluation, in the run's folder"),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", min=5, help="Images to draw; at most the held-out ones.")
    ] = 2000,
    features: Annotated[
        Literal["auto", "pca", "efficientnet", "inception"],
        typer.Option(help="What images are compared by; auto: pca below 16x16, else efficientnet."),
    ] = "auto",
    weights: Annotated[
        Literal["ema", "last"],
        typer.Option(help="Of a run: the moving average, or the weights of the last step."),
    ] = "ema",
    sampler: Annotated[Literal[samplers.NAMES], typer.Option(help=samplers.sampler_help())] = "ald",
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps at each noise level; not of samplers for few passes.",
            show_default=str(STEPS),
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            help=samplers.option_help("passes"), show_default=samplers.option_default("passes")
        ),
    ] = None,
    step_lr: Annotated[
        float | None, typer.Option(help="As of sample.", show_default="as of sample")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples and the noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> None:
    """Say how good a network is: distances of its samples to the data, and its loss at each level.

    Writes report.json, report.txt and nearest.png (samples and real images, each with its nearest training images).
    """
    where = choose_device(device)
    pictures.require()
    given = {"step_lr": step_lr, "passes": passes}
    samplers.check_options(sampler, given)
    if steps is None and samplers.SAMPLERS[sampler].level_count is None:
        steps = STEPS
    model, size = load_image_network(source, where, weights)
    if size is None or size[0] != size[1]:
        raise ValueError(f"{source} must be of square images of a known size, got {size}")
    shape, expected = (model.sample_shape[0], *size), model.data_range
    folder = source if source.is_dir() else source.parent
    out = folder / "evaluation" if out is None else out
    out.mkdir(parents=True, exist_ok=True)

    def opened(name: str) -> ImageDataset:
        return open_data(name, size[0], shape[0], cache=folder / CACHE, verbose=True)

    training = opened(data)
    if heldout is None and data == DIGITS:
        heldout = f"{DIGITS}:heldout"
    if heldout is None:
        real, real_name = training.part(slice(1, None, 2)), OTHER_HALF
        training_of_losses, compared = training, training.part(slice(0, None, 2))
    else:
        real, real_name = opened(heldout), HELDOUT
        training_of_losses = compared = training
    for name, images in ((data, training), (heldout or data, real)):
        if images.shape[1:] != shape:
            raise ValueError(
                f"the images of {name} must be {shape}, as those that {source} was trained on, "
                f"got {tuple(images.shape[1:])}"
            )
    if len(real) < n:
        n = len(real)
        typer.echo(f"{n} samples are drawn: as many as there are {real_name}")
    some = real[:: len(real) // n][:n]
    network = choose_features(features, evenly(compared, REFERENCE), where)
    options = samplers.own_options(sampler, model.sigmas.tolist(), given)
    drawn = [
        model.sample(
            min(batch, n - begin),
            size,
            sampler=sampler,
            n_steps_each=steps,
            clip=False,
            denoise=True,
            seed=seed,
            sample_offset=begin,
            **options,
        )
        for begin in range(0, n, batch)
    ]
    samples = to_image_range(torch.cat(drawn), expected).cpu()
    report = compare(samples, compared, some, network, real_name=real_name, seed=seed)
    losses = {"sigmas": model.sigmas.tolist()}
    for name, images in {"training images": training_of_losses, HELDOUT: real}.items():
        if name != HELDOUT or heldout is not None:
            seen = from_image_range(evenly(images, LOSS_IMAGES), expected)
            losses[name] = losses_by_level(model, seen, seed=seed)
    report["loss_by_level"] = losses
    report["sampling"] = {"sampler": sampler, "n_steps_each": steps, "seed": seed, **options}
    report |= {"data": data, "heldout": heldout, "weights": weights}
    text = render(report)
    write_atomically(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_atomically(out / "report.txt", (text + "\n").encode())
    _draw_nearest({"samples": samples, real_name: some}, compared, out / "nearest.png")
    typer.echo(text)
    typer.echo(f"report: {out}")


def _draw_nearest(sets: dict[str, Tensor], training: ImageDataset, path: Path) -> None:
    """Each image of a set at the left of a row, its nearest training images beside it."""
    neighbours = min(NEIGHBOURS, len(training))
    grids = {}
    for name, images in sets.items():
        shown = images[:ROWS]
        _, where = nearest_images(shown, training, neighbours)
        found = training[where.flatten()].unflatten(0, where.shape)
        rows = torch.cat([shown.unsqueeze(1), found], 1).flatten(0, 1)
        scale = max(1, PICTURE_SIDE // max(images.shape[2:]))
        grids[f"{name}, and their nearest"] = plots.image_grid(
            rows, columns=neighbours + 1, scale=scale, gap=max(1, scale // 4)
        )
    buffer = io.BytesIO()
    plots.side_by_side(grids).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
