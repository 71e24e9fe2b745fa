"""The command ``ncsn-fast tune``."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from ..evaluation.tuning import Distances, Measured, tune
from ..files import write_atomically
from ..models.sampling_settings import SAMPLING_NAME, save_tuned
from ..sampling.auto import PASSES, in_words
from ..training.checkpoints import MODEL_NAME
from .options import CACHE, DIGITS, choose_device, load_image_network, open_data

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

REPORT_NAME = "tuning.json"


def tune_command(
    source: Annotated[
        Path,
        typer.Argument(help="Folder of a run, a checkpoint file, or a save_pretrained folder."),
    ],
    data: Annotated[
        str, typer.Option(help="Images that the choice is made by, as of train.")
    ] = DIGITS,
    heldout: Annotated[
        str | None,
        typer.Option(
            help="Other images, to report how good the choice is.",
            show_default="of the digits theirs; otherwise every other image of DATA",
        ),
    ] = None,
    passes: Annotated[
        int, typer.Option(min=1, help="Evaluations of the network, at most.")
    ] = PASSES,
    n: Annotated[
        int, typer.Option("--n", "-n", min=2, help="Images drawn with a candidate and seed.")
    ] = 500,
    seeds: Annotated[
        int, typer.Option(min=1, help="Of the best candidates; the others have one.")
    ] = 3,
    weights: Annotated[
        Literal["ema", "last"],
        typer.Option(help="Of a run: the moving average, or the weights of the last step."),
    ] = "ema",
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> None:
    """Find the best sampler for few passes of a network, and keep it in the network's folder, where sample finds it.

    Samples are compared with DATA by the Frechet distance of their principal components. Nothing is chosen by the
    images that the result is reported on.
    """
    where = choose_device(device)
    model, size = load_image_network(source, where, weights)
    if size is None or size[0] != size[1]:
        raise ValueError(f"{source} must be of square images of a known size, got {size}")
    folder = source if source.is_dir() else source.parent
    if heldout is None and data == DIGITS:
        heldout = f"{DIGITS}:heldout"
    names = {"tuned on": data, "reported on": heldout}
    opened = [
        open_data(name, size[0], model.sample_shape[0], cache=folder / CACHE, verbose=True)[:]
        for name in (data, heldout)
        if name is not None
    ]
    if heldout is None:
        opened = [opened[0][::2], opened[0][1::2]]
        names = {"tuned on": f"even images of {data}", "reported on": f"odd images of {data}"}
    distances = Distances(*opened)
    found = tune(model, distances, size, passes, n=n, seeds=range(seeds), batch=batch, verbose=True)
    choice = found[0].options
    kept_in = [folder, folder / MODEL_NAME] if (folder / MODEL_NAME).is_dir() else [folder]
    for place in kept_in:
        save_tuned(place, choice)
    report = {
        **names,
        "passes": passes,
        "samples": n,
        "real": distances.real,
        "noise": distances.noise,
        "candidates": [dataclasses.asdict(one) for one in found],
    }
    write_atomically(folder / REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())
    typer.echo(_table(found, names, distances, n))
    typer.echo(
        f"sample takes {in_words(choice['sampler'], {**choice, 'sampler': None})}: "
        f"{folder / SAMPLING_NAME}; all of it: {folder / REPORT_NAME}"
    )


def _table(found: Sequence[Measured], names: dict[str, str], distances: Distances, n: int) -> str:
    """The candidates as lines, the chosen one first."""
    lines = [
        f"Frechet distances (principal components) of {n} samples; tuned on {names['tuned on']}, "
        f"reported on {names['reported on']}",
        f"{'tuned on':>8}  {'reported':>8}  seeds",
    ]
    for one in found:
        options: dict[str, Any] = {k: v for k, v in one.options.items() if k != "sampler"}
        lines.append(
            f"{one.mean:8.3f}  {statistics.mean(one.reported):8.3f}  {len(one.tuning):5d}  "
            f"{in_words(one.options['sampler'], options)}"
        )
    lines.append(f"real images: {distances.real:.3f}, noise: {distances.noise:.1f}, reported")
    return "\n".join(lines)
