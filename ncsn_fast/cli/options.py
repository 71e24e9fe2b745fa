"""What options of several commands have in common: the data, the device, lists of numbers.

Belongs here: from the text of an option to what a Python user would pass. Does not belong here: the commands.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from ..data import ImageDataset, open_images
from ..data.opening import DIGITS as DIGITS  # for the commands
from ..data.opening import usual_size
from ..data.ranges import DataRangeWarning
from ..models.base import ScoreModel
from ..training.checkpoints import load_model

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

CACHE = "data_cache"  # the folder of decoded images, in that of a run


def open_data(
    data: str, image_size: int | None, channels: int | None, **options: Any
) -> ImageDataset:
    """The images of an option, by :func:`~ncsn_fast.data.open_images`; what is said of them goes to stderr.

    ``None`` for a size or channels: the usual ones, of the digits their own.
    """
    usual = usual_size(data)
    image_size = usual[0] if image_size is None else image_size
    channels = usual[1] if channels is None else channels

    def report(line: str) -> None:
        typer.echo(f"ncsn-fast: {line}", err=True)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataRangeWarning)
        images = open_images(data, image_size, channels, report=report, **options)
    for warning in caught:
        report(str(warning.message))
    return images


def load_image_network(
    source: Path, device: torch.device, weights: str
) -> tuple[ScoreModel, tuple[int, ...] | None]:
    """A network of images with its noise levels, and the size of those it was trained on."""
    model, size = load_model(source, device, weights=weights)
    if len(model.sample_shape) != 3 or model.data_range is None:
        what = "logits" if len(model.sample_shape) == 3 else "points"
        raise ValueError(
            f"{source} is of a {type(model).__name__} of {what}, and this command is for images: in Python, "
            "load_model(path)[0].sample(n)"
        )
    if not (len(model.sigmas) and bool((model.sigmas > 0).all())):
        raise ValueError(f"{source} has no noise levels: set_sigmas before it is saved")
    return model, size


def choose_device(name: str) -> torch.device:
    """The device of an option; ValueError if there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}'
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return device


def integers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of an option such as ``1,2,4``; ValueError if they are none."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} must be integers with commas, got {text!r}") from error


def numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers of an option such as ``0.9,0.99``; ValueError if they are none."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas, got {text!r}") from error


def assignments(texts: list[str]) -> dict[str, Any]:
    """The values of options such as ``embedding=32``: as JSON says, or a string; ValueError if there is no ``=``."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value.strip()
    return values
