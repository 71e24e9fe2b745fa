"""The command ``ncsn-fast convert``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ..models.convert import load_official, save_official
from ..models.official import NCSNv2, OfficialNCSN, check_size
from ..models.official_config import (
    DATASETS,
    OfficialNetwork,
    config_of,
    image_size_of,
    read_config,
    sampling_of,
    save_config,
)
from ..models.sampling_settings import load_sampling, save_sampling
from ..schedules import make_sigmas
from ..training.checkpoints import (
    CHECKPOINT_NAME,
    Checkpoint,
    load_checkpoint,
    load_model,
    save_model,
)
from ..training.published import official_settings

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

CONFIG_NAME = "official.yml"  # the authors' configuration, in the folder of a converted model


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="The authors' checkpoint.pth; to official: a run, its checkpoint, or a model folder."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the model; to official: the file, such as checkpoint.pth."),
    ],
    to: Annotated[
        Literal["folder", "official"],
        typer.Option(help="A model folder, or a checkpoint that the authors' programs read."),
    ] = "folder",
    config: Annotated[
        Path | None, typer.Option(help="The authors' configuration of the checkpoint, a YAML file.")
    ] = None,
    weights: Annotated[
        Literal["ema", "last"],
        typer.Option(help="The moving average, or the weights of the last step."),
    ] = "ema",
    sigma_begin: Annotated[
        float | None,
        typer.Option(help="Largest noise level, for a 2019 checkpoint without --config."),
    ] = None,
    sigma_end: Annotated[float, typer.Option(help="Smallest noise level, likewise.")] = 0.01,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width.", show_default="that of the configuration or run"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
) -> None:
    """Turn a checkpoint of the NCSN papers' own code into a model of this project, or back.

    ncsn-fast convert checkpoint.pth --config cifar10.yml --out model && ncsn-fast sample model
    """
    present = out.is_file() or (out / "config.json").exists() or (to == "official" and out.exists())
    if present and not overwrite:
        raise ValueError(f"{out} is there already: give --overwrite to replace it")
    if to == "folder":
        _to_folder(source, out, config, weights, sigma_begin, sigma_end, image_size)
        return
    for name, value in (("--config", config), ("--sigma-begin", sigma_begin)):
        if value is not None:
            raise ValueError(
                f"{name} is of the authors' checkpoint: with --to official one is made"
            )
    _to_official(source, out, weights, image_size, overwrite)


def _to_folder(
    source: Path,
    out: Path,
    config: Path | None,
    weights: str,
    sigma_begin: float | None,
    sigma_end: float,
    image_size: int | None,
) -> None:
    settings = None if config is None else read_config(config)
    official = {"config": settings, "weights": "raw" if weights == "last" else weights}
    model = load_official(source, **official)
    if sigma_begin is not None:  # once more: it must agree with what the file or configuration say
        ladder = make_sigmas(sigma_begin, sigma_end, model.config.num_classes)
        model = load_official(source, sigmas=ladder, **official)
    if not bool((model.sigmas > 0).all()):
        raise ValueError(
            f"{source} holds no noise levels, as all checkpoints of 2019: give --config, or --sigma-begin 1 "
            "--sigma-end 0.01 for a published one"
        )
    size = None
    if image_size is not None:
        size = (image_size, image_size)
        check_size(type(model), image_size, image_size)
    elif settings is not None:
        size = image_size_of(settings)
    save_model(model, out, size)
    save_sampling(out, _sampling(model, settings))
    if settings is None:
        (out / CONFIG_NAME).unlink(missing_ok=True)
    else:
        save_config(settings, out / CONFIG_NAME)
    typer.echo(
        f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(model.sigmas)} noise levels from {float(model.sigmas[0]):.4g} to "
        f"{float(model.sigmas[-1]):.4g}: {out}"
    )


def _sampling(model: OfficialNetwork, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """How samples are drawn: as the configuration says, or as published for the network's ladder."""
    options = {} if settings is None else sampling_of(settings)
    if options:
        return options
    try:
        return official_settings(model)
    except ValueError:  # a network of one's own training, of which nothing is known
        return {}


def _to_official(
    source: Path, out: Path, weights: str, image_size: int | None, overwrite: bool
) -> None:
    run = source / CHECKPOINT_NAME if source.is_dir() else source
    model, size = load_model(source, weights=weights)
    if type(model) not in DATASETS:
        raise ValueError(
            f"{source} is of {type(model).__name__}, which the authors' programs do not have, only of "
            f"{', '.join(network.__name__ for network in DATASETS)}"
        )
    size = size if image_size is None else (image_size, image_size)
    config_file = out.with_suffix(".yml")
    if config_file.exists() and not overwrite:
        raise ValueError(f"{config_file} is there already: give --overwrite to replace it")
    kept = source / CONFIG_NAME
    settings = (
        read_config(kept) if kept.is_file() else config_of(model, size, load_sampling(source))
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    if run.is_file():
        _save_run(load_checkpoint(run), model, out, weights)
    else:
        save_official(model, out)
    save_config(settings, config_file, tagged=isinstance(model, OfficialNCSN))
    typer.echo(f"{type(model).__name__}: {out}, and its configuration {config_file}")


def _save_run(checkpoint: Checkpoint, model: OfficialNetwork, out: Path, weights: str) -> None:
    """Also the state of the optimiser, and of the 2020 program's files all that they hold."""
    more: dict[str, Any] = {}
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, NCSNv2):
        if weights != "ema":
            raise ValueError(f"--weights {weights}: a file of {type(model).__name__} holds both")
        model = checkpoint.last_model()
        samples = checkpoint.data["shape"][0]
        more = {
            "ema": {name: checkpoint.ema[name] for name in names},
            "epoch": checkpoint.step * checkpoint.settings["batch_size"] // samples,
            "step": checkpoint.step,
        }
    if len(checkpoint.optimizer["state"]) == len(names):
        more["optimizer"] = checkpoint.optimizer
    else:
        typer.echo(
            "ncsn-fast: the optimiser's state is left out: it is of more than the network's parameters",
            err=True,
        )
    save_official(model, out, **more)
