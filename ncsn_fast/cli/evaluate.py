"""The command ``ncsn-fast evaluate``."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from .. import plots
from ..data import ImageDataset
from ..data.ranges import from_image_range, to_image_range
from ..evaluation.features import choose_features
from ..evaluation.likelihood import bits_per_dimension, has_likelihood
from ..evaluation.metrics import nearest_images
from ..evaluation.report import LOSS_IMAGES, REFERENCE, compare, evenly, losses_by_level, render
from ..files import write_atomically
from ..models.base import ScoreModel
from ..models.shipped import shipped_names
from ..plots import pictures
from ..sampling import auto, samplers
from ..training.live import machine
from ..training.log import LOG_NAME, read_log
from .options import CACHE, DIGITS, choose_device, load_image_network, open_data
from .output import PICTURE_SIDE
from .sample import STEPS, drawing_options

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

ROWS, NEIGHBOURS = 10, 5  # of the picture
LIKELIHOOD_IMAGES = 32  # a minute or so on two cores for 28x28 pixels
HELDOUT, OTHER_HALF = "held-out images", "real images"


def evaluate_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, a checkpoint file, a save_pretrained folder, or a network of the package: "
            f"{', '.join(shipped_names())}."
        ),
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
    sampler: Annotated[
        Literal[auto.CHOICES] | None,
        typer.Option(help="As of sample.", show_default="as of sample"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps at each noise level; not of samplers for few passes.",
            show_default=f"that of the run's preset, or {STEPS}",
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
    likelihood: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Images of each set whose log-likelihood is found; 0: none.",
            show_default=f"{LIKELIHOOD_IMAGES} of networks of any sigma",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> None:
    """Say how good a network is: distances of its samples to the data, its loss at each level, its likelihood.

    Writes report.json, report.txt and nearest.png (samples and real images, each with its nearest training images).
    """
    where = choose_device(device)
    pictures.require()
    asked = {"step_lr": step_lr, "passes": passes}
    if sampler not in (None, auto.AUTO):
        samplers.check_options(sampler, asked)
    model, size = load_image_network(source, where, weights)
    if size is None or size[0] != size[1]:
        raise ValueError(f"{source} must be of square images of a known size, got {size}")
    if likelihood and not has_likelihood(model):
        raise ValueError(
            f"--likelihood takes a network of any sigma, {type(model).__name__} knows the levels of its ladder only"
        )
    _, options = drawing_options(source, model, sampler, asked, steps, None, clip=False)
    out = _own_folder(source) / "evaluation" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    shape = (model.sample_shape[0], *size)
    sets = _sets(data, heldout, shape, source, out)
    if len(sets.real) < n:
        n = len(sets.real)
        typer.echo(f"{n} samples are drawn: as many as there are {sets.real_name}")
    some = sets.real[:: len(sets.real) // n][:n]
    network = choose_features(features, evenly(sets.compared, REFERENCE), where)
    begin = time.perf_counter()
    drawn = [
        model.sample(min(batch, n - i), size, seed=seed, sample_offset=i, **options)
        for i in range(0, n, batch)
    ]
    seconds = time.perf_counter() - begin
    samples = to_image_range(torch.cat(drawn), model.data_range).cpu()
    report = compare(samples, sets.compared, some, network, real_name=sets.real_name, seed=seed)
    losses = {name: evenly(images, LOSS_IMAGES) for name, images in sets.measured.items()}
    report["loss_by_level"] = {"sigmas": model.sigmas.tolist()} | {
        name: losses_by_level(model, from_image_range(seen, model.data_range), seed=seed)
        for name, seen in losses.items()
    }
    report["bits_per_dim"] = _bits(model, sets.measured, likelihood, seed)
    report["sampling"] = {**options, "seed": seed, "seconds": round(seconds, 1)}
    report |= {"data": data, "heldout": sets.heldout, "weights": weights}
    report["network"] = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    report["machine"] = machine(where)
    report["training"] = _training(source)
    text = render(report)
    write_atomically(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_atomically(out / "report.txt", (text + "\n").encode())
    _draw_nearest({"samples": samples, sets.real_name: some}, sets.compared, out / "nearest.png")
    typer.echo(text)
    typer.echo(f"report: {out}")


@dataclasses.dataclass(frozen=True)
class _Sets:
    """The images of an evaluation, and what those that are not trained on are called."""

    compared: ImageDataset  # with the samples
    real: ImageDataset
    real_name: str
    measured: dict[str, ImageDataset]  # their loss and likelihood, by name
    heldout: str | None


def _sets(data: str, heldout: str | None, shape: tuple[int, ...], source: Path, out: Path) -> _Sets:
    cache = (source if source.is_dir() else out) / CACHE

    def opened(name: str) -> ImageDataset:
        images = open_data(name, shape[1], shape[0], cache=cache, verbose=True)
        if images.shape[1:] != shape:
            raise ValueError(
                f"the images of {name} must be {shape}, as those that {source} was trained on, "
                f"got {tuple(images.shape[1:])}"
            )
        return images

    training = opened(data)
    if heldout is None and data == DIGITS:
        heldout = f"{DIGITS}:heldout"
    measured = {"training images": training}
    if heldout is None:
        others, half = training.part(slice(1, None, 2)), training.part(slice(0, None, 2))
        return _Sets(half, others, OTHER_HALF, measured, None)
    real = opened(heldout)
    return _Sets(training, real, HELDOUT, {**measured, HELDOUT: real}, heldout)


def _own_folder(source: Path) -> Path:
    """The folder of a run, of a file in it, or, for a network of the package, one in the working directory."""
    if not source.exists():
        return Path(f"ncsn_{source}")
    return source if source.is_dir() else source.parent


def _bits(
    model: ScoreModel, sets: dict[str, ImageDataset], n: int | None, seed: int
) -> dict[str, Any] | None:
    """Bits a dimension of some images of each set; ``None`` for a network that has no likelihood."""
    if not has_likelihood(model) or n == 0:
        return None
    found: dict[str, Any] = {}
    for name, images in sets.items():
        some = evenly(images, LIKELIHOOD_IMAGES if n is None else n)
        try:
            mean, error = bits_per_dimension(model, some, seed=seed)
        except ValueError as reason:  # images of more than 256 greys
            if n is not None:
                raise
            typer.echo(f"ncsn-fast: no likelihood of {name}: {reason}", err=True)
            return None
        found[name] = {"images": len(some), "mean": mean, "standard_error": error}
    return found


def _training(source: Path) -> dict[str, Any] | None:
    """How long a run was trained, and where, by its log; ``None`` if there is none."""
    records = read_log((source if source.is_dir() else source.parent) / LOG_NAME)
    machines = [record["machine"] for record in records if "machine" in record]
    if not machines:
        return None
    times = [datetime.datetime.fromisoformat(record["time"]) for record in records]
    # From each record to the next, but not over the time between a stop and the start after it.
    seconds = sum(
        (times[i] - times[i - 1]).total_seconds()
        for i in range(1, len(records))
        if "machine" not in records[i]
    )
    steps = max(record["step"] for record in records)
    return {"steps": steps, "seconds": round(seconds), "machine": machines[-1]}


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
