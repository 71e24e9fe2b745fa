"""The command ``ncsn-fast train``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from .. import plots
from ..data import ImageDataset
from ..data.ranges import DataRangeWarning
from ..distributed import process_rank
from ..evaluation import losses_by_level
from ..models.config import NCSNConfig
from ..plots import pictures
from ..training import config, dry_run, presets, settings, train
from ..training.boards import boards_of
from ..training.checkpoints import CHECKPOINT_NAME
from ..training.watch_settings import split_held_out
from ..training.watching import HeldOut, Samples, Watch
from .options import CACHE, assignments, choose_device, integers, numbers, open_data
from .output import PICTURE_SIDE

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None


def _option(name: str, text: str, *flags: str, shown: str | None = None) -> Any:
    """An option that sets a value of the run, ``None`` if it is not given; its help shows the default."""
    defaults = config.RunConfig().values() | {"network": "ncsn"}
    default = defaults.get(name, getattr(NCSNConfig(), name, None))
    return typer.Option(*flags, help=text, show_default=str(default) if shown is None else shown)


def train_command(
    context: typer.Context,
    preset: Annotated[
        str | None, typer.Option(help=f"Values to start from: {', '.join(presets.preset_names())}.")
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file with values by these names, over the preset's."),
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "data", 'Folder of images, .zip, IDX, .npy or .npz file, or "digits" (scikit-learn\'s).'
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint, model/, losses and config.toml.")
    ] = Path("ncsn_run"),
    image_size: Annotated[
        int | None, _option("image_size", "Height and width.", shown="32, of the digits 8")
    ] = None,
    channels: Annotated[
        int | None, _option("channels", "1 for grey, 3 for RGB.", shown="3, of the digits 1")
    ] = None,
    flips: Annotated[
        bool | None, _option("flips", "Mirror images at random.", "--flips/--no-flips")
    ] = None,
    dequantise: Annotated[
        bool | None,
        _option("dequantise", "Add noise of one step of 256.", "--dequantise/--no-dequantise"),
    ] = None,
    iterations: Annotated[int | None, _option("iterations", "Training steps in all.")] = None,
    batch_size: Annotated[
        int | None, _option("batch_size", "Images a step.", "--batch-size", "--batch")
    ] = None,
    lr: Annotated[float | None, _option("lr", "Learning rate of Adam.")] = None,
    lr_schedule: Annotated[
        Literal[settings.SCHEDULES] | None,
        _option("lr_schedule", "Down to zero at the end, or not."),
    ] = None,
    optimizer: Annotated[
        Literal[settings.OPTIMIZERS] | None, _option("optimizer", "Which optimiser.")
    ] = None,
    weight_decay: Annotated[float | None, _option("weight_decay", "Of adamw.")] = None,
    accumulate: Annotated[
        int | None,
        _option("accumulate", "Parts of a batch, one after the other, for less memory."),
    ] = None,
    bf16: Annotated[
        bool | None, _option("bf16", "The network in bfloat16 autocast.", "--bf16/--no-bf16")
    ] = None,
    compiled: Annotated[
        bool | None,
        _option("compile", "The network by torch.compile.", "--compile/--no-compile"),
    ] = None,
    warmup: Annotated[
        int | None, _option("warmup", "Steps over which the learning rate rises.")
    ] = None,
    ema_decay: Annotated[
        float | None,
        _option("ema_decay", "Decay of the moving average of weights.", "--ema-decay", "--ema"),
    ] = None,
    ema_decays: Annotated[
        str | None,
        _option("ema_decays", "Of further averages, with commas: 0.99,0.9999.", shown="none"),
    ] = None,
    grad_clip: Annotated[
        float | None, _option("grad_clip", "Largest gradient norm; 0: any.")
    ] = None,
    weighting: Annotated[
        Literal[settings.WEIGHTING_NAMES] | None,
        _option("weighting", "Of the noise levels in the loss."),
    ] = None,
    objective: Annotated[
        Literal[settings.OBJECTIVES] | None,
        _option("objective", "Denoising or sliced score matching."),
    ] = None,
    directions: Annotated[
        int | None, _option("directions", "Of sliced score matching, for each image.")
    ] = None,
    levels: Annotated[
        Literal[settings.LEVELS] | None,
        _option("levels", "Those of the ladder, or any between its ends (not of ncsn)."),
    ] = None,
    network: Annotated[
        str | None, _option("network", f"One of {', '.join(config.network_names())}.")
    ] = None,
    nf: Annotated[int | None, _option("nf", "Width of the network.")] = None,
    num_classes: Annotated[int | None, _option("num_classes", "Noise levels.")] = None,
    dilations: Annotated[
        str | None, _option("dilations", "Of the four stages of ncsn.", shown="1,2,4,8")
    ] = None,
    norm: Annotated[
        Literal["instance", "instance++"] | None, _option("norm", "Which normalisation, of ncsn.")
    ] = None,
    sigma_begin: Annotated[
        float | None,
        _option(
            "sigma_begin",
            "Largest noise level.",
            shown="largest distance between two of the images",
        ),
    ] = None,
    sigma_end: Annotated[float | None, _option("sigma_end", "Smallest noise level.")] = None,
    seed: Annotated[int | None, _option("seed", "Of weights, order, levels and noise.")] = None,
    checkpoint_every: Annotated[
        int | None, _option("checkpoint_every", "Steps between checkpoints.")
    ] = None,
    keep_last: Annotated[
        int | None, _option("keep_last", "How many of the last checkpoints stay.")
    ] = None,
    held_out: Annotated[
        str | None,
        _option("held_out", "Not trained on but measured: a share, such as 0.05, or as --data."),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        _option(
            "evaluate_every", "Steps between held-out losses.", shown="those between checkpoints"
        ),
    ] = None,
    samples_every: Annotated[
        int | None,
        _option("samples_every", "Steps between pictures of samples, in samples/.", shown="none"),
    ] = None,
    tensorboard: Annotated[
        bool | None,
        _option("tensorboard", "Write for TensorBoard.", "--tensorboard/--no-tensorboard"),
    ] = None,
    wandb: Annotated[
        str | None, _option("wandb", "Project of Weights & Biases to write to.", shown="none")
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, any other value, such as embedding=32; again."),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would happen, and train and write nothing."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT, with its settings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in OUT, if there is one.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> None:
    """Train a network on images. Ctrl-C or SIGTERM stops after a checkpoint; --resume goes on exactly.

    What is not given is as --config says, or --preset, or the run that is resumed, or the default. When resuming, only
    --iterations, --checkpoint-every and --keep-last may differ from the run. On several GPUs, or in several processes:

    torchrun --nproc-per-node 4 -m ncsn_fast train --data FOLDER
    """
    where = choose_device(device)
    given = {name: context.params[name] for name in config.run_names() if name in context.params}
    if dilations is not None:
        given["dilations"] = integers("dilations", dilations)
    if ema_decays is not None:
        given["ema_decays"] = numbers("ema_decays", ema_decays)
    given["compile"] = compiled
    writes = process_rank() == 0
    say = typer.echo if writes else lambda line: None
    run = config.merge_config(
        preset=preset,
        file=config_file,
        run=out if resume else None,
        **given | assignments(more or []),
    )
    # Images that are decoded once and stay in a file; a dry run writes none.
    reading = {
        "data_range": run.data_range,
        "cache": None if dry else out / CACHE,
        "verbose": writes,
    }
    augmented = {"flips": run.flips, "dequantise": run.dequantise}
    images = open_data(run.data, run.image_size, run.channels, **reading, **augmented)
    images, held_out_images = _split(images, run, reading)
    watch = _watch(run, held_out_images)
    run = run.resolved(images, where)
    torch.manual_seed(run.settings.seed)  # of what a network draws from torch itself, as of dropout
    model = run.new_network(images)
    sigmas = model.sigmas.tolist()
    say(
        f"{len(images)} images of {tuple(images.shape[1:])}; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{len(sigmas)} sigmas from {sigmas[0]:.4g} to {sigmas[-1]:.4g}; on {where}"
    )
    how = {"resume": resume, "overwrite": overwrite, "device": where}
    if dry:
        _show(run, dry_run.estimate(model, images, run.settings, out, **how), out)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataRangeWarning)  # open_data has told it
        train(model, images, run.settings, out, config=run, observers=[watch], **how)
    say(f"trained: {out / CHECKPOINT_NAME}; draw with: ncsn-fast sample {out}")


def _split(
    images: ImageDataset, run: config.RunConfig, reading: dict[str, Any]
) -> tuple[ImageDataset, ImageDataset | None]:
    """The images to train on, and those that are held out, if any are."""
    watching = run.watching
    if watching.held_out is None:
        return images, None
    if watching.share is not None:
        return split_held_out(images, watching.share)
    channels, size = images.shape[1:3]
    return images, open_data(watching.held_out, size, channels, **reading)


def _watch(run: config.RunConfig, held_out_images: ImageDataset | None) -> Watch:
    """What is asked for; before any work, so that a missing package is told."""
    watching, held_out, samples = run.watching, None, None
    if held_out_images is not None:
        every = watching.evaluate_every or run.settings.checkpoint_every
        held_out = HeldOut(held_out_images, losses_by_level, every)
    if watching.samples_every is not None:
        pictures.require()
        samples = Samples(_grid, watching.samples_every)
    return Watch(held_out, samples, boards_of(watching))


def _grid(images: Tensor) -> Any:
    scale = max(1, PICTURE_SIDE // max(images.shape[2:]))
    return plots.image_grid(images, scale=scale, gap=max(1, scale // 4))


def _show(run: config.RunConfig, estimate: dry_run.Estimate, out: Path) -> None:
    values = ", ".join(f"{name} {value}" for name, value in run.values().items())
    typer.echo(
        f"run      {values}\n"
        f"memory   {_megabytes(estimate.state_bytes)} for weights, gradients, average and optimiser; "
        f"{_megabytes(estimate.batch_bytes)} for a batch; {_megabytes(estimate.data_bytes)} of data\n"
        f"time     {estimate.seconds_per_step:.3g} s a step, "
        f"about {_duration(estimate.seconds)} for {estimate.steps - estimate.steps_done} steps\n"
        f"folder   {out}: nothing was written, this was a dry run"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
