"""The command ``ncsn-fast train``."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Literal

import torch

from ..data.ranges import DataRangeWarning
from ..models.config import NCSNConfig
from ..models.ncsn import NCSN
from ..schedules import make_sigmas, suggest_sigma_begin
from ..training import TrainingSettings, train
from ..training.checkpoints import CHECKPOINT_NAME, load_checkpoint
from .options import DIGITS, choose_device, given_options, integers, read_data

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None


def train_command(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(help='Folder of images, .npy or .npz file, or "digits" (scikit-learn\'s).'),
    ] = DIGITS,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, model/ and losses.")] = Path(
        "ncsn_run"
    ),
    image_size: Annotated[int, typer.Option(help="Height and width; digits are 8.")] = 32,
    channels: Annotated[int, typer.Option(help="1 for grey, 3 for RGB; digits have 1.")] = 3,
    iterations: Annotated[int, typer.Option(help="Training steps in all.")] = 10_000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    lr_schedule: Annotated[
        Literal["cosine", "constant"], typer.Option(help="Down to zero at the end, or not.")
    ] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 50,
    ema: Annotated[float, typer.Option(help="Decay of the moving average of weights.")] = 0.999,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: any.")] = 10.0,
    nf: Annotated[int, typer.Option(help="Width of the network.")] = 128,
    num_classes: Annotated[int, typer.Option(help="Noise levels.")] = 10,
    dilations: Annotated[str, typer.Option(help="Of the four stages.")] = "1,2,4,8",
    norm: Annotated[
        Literal["instance", "instance++"], typer.Option(help="Which normalisation.")
    ] = "instance",
    sigma_begin: Annotated[
        float | None,
        typer.Option(
            help="Largest noise level.",
            show_default="largest distance between two of the images",
        ),
    ] = None,
    sigma_end: Annotated[float, typer.Option(help="Smallest noise level.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of weights, order, levels and noise.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT, with its settings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in OUT, if there is one.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> None:
    """Train a network on images. Ctrl-C stops after a checkpoint; --resume goes on exactly.

    When resuming, options that are not given are those of the run; only --iterations and
    --checkpoint-every may differ.
    """
    where = choose_device(device)
    given = given_options(context)
    settings = {
        "iterations": iterations,
        "batch_size": batch,
        "lr": lr,
        "lr_schedule": lr_schedule,
        "warmup": warmup,
        "ema_decay": ema,
        "grad_clip": grad_clip,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
    }
    shape = {
        "nf": nf,
        "num_classes": num_classes,
        "dilations": integers("dilations", dilations),
        "norm": norm,
    }
    sigmas, begin = None, sigma_begin
    if resume:
        held = load_checkpoint(out / CHECKPOINT_NAME)
        option_of = {"batch_size": "batch", "ema_decay": "ema"}
        settings = held.settings | {
            name: value for name, value in settings.items() if option_of.get(name, name) in given
        }
        held_shape = dataclasses.asdict(held.config)
        shape = {
            name: value if name in given else held_shape[name] for name, value in shape.items()
        }
        if not given & {"num_classes", "sigma_begin", "sigma_end"}:
            sigmas = held.config.sigmas
        else:  # rounded: the ladder is kept in float32, and was made from these numbers before
            ends = [float(f"{held.config.sigmas[i]:.6g}") for i in (0, -1)]
            begin = ends[0] if begin is None else begin
            sigma_end = sigma_end if "sigma_end" in given else ends[1]
        channels = channels if "channels" in given else held.config.in_channels
        image_size = image_size if "image_size" in given else held.image_size[0]
    checked_settings = TrainingSettings(**settings)

    images = read_data(data, image_size, channels)
    if sigmas is None:
        begin = suggest_sigma_begin(images.to(where)) if begin is None else begin
        sigmas = make_sigmas(begin, sigma_end, shape["num_classes"])
    config = NCSNConfig(in_channels=images.shape[1], sigmas=sigmas, **shape)
    torch.manual_seed(checked_settings.seed)
    model = NCSN(config).to(memory_format=torch.channels_last)
    typer.echo(
        f"{len(images)} images of {tuple(images.shape[1:])}; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{config.num_classes} sigmas from {sigmas[0]:.4g} to {sigmas[-1]:.4g}; on {where}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataRangeWarning)  # read_data has told it
        train(
            model, images, checked_settings, out, resume=resume, overwrite=overwrite, device=where
        )
    typer.echo(f"trained: {out / CHECKPOINT_NAME}; draw with: ncsn-fast sample {out}")
