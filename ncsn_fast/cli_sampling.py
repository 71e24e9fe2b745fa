"""The commands ``ncsn-fast sample`` and ``ncsn-fast schedule``.

Belongs here: their options, defaults and help. Does not belong here: the other commands and how errors are shown
(``cli.py``); anything a Python user would want too.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import pictures, plots, samplers, sharded
from .checkpoints import load_model, write_atomically
from .data import load_digits, load_images
from .ranges import DataRangeWarning
from .schedules import make_sigmas, suggest_num_scales, suggest_sigma_begin, suggest_step_lr

if TYPE_CHECKING:
    from PIL import Image

try:
    import typer
except ImportError:  # an extra; cli.main says so
    typer = None

DIGITS = "digits"
FILES = (".png", ".npy", ".npz")
# Endings of --out that mean a file, but none that is written. Any other name, such as samples_lr0.01, is a folder's.
OTHER_FILES = (
    *(".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pdf", ".svg"),
    *(".pt", ".pth", ".pkl", ".safetensors", ".csv", ".json", ".zip", ".tar", ".gz", ".h5"),
)
PICTURE_SIDE = 64  # pixels an image is enlarged to in a picture, by a whole factor
GRID, STRIP = 64, 8  # images in a grid or GIF, and rows of a strip


def sample_command(
    source: Annotated[
        Path,
        typer.Argument(help="Folder of a run, a checkpoint file, or a save_pretrained folder."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Picture (.png), arrays (.npy, .npz), or a folder, which resumes."),
    ] = Path("samples.png"),
    weights: Annotated[
        Literal["ema", "last"],
        typer.Option(help="Of a run: the moving average, or the weights of the last step."),
    ] = "ema",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Image i of a seed is always the same.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 256,
    sampler: Annotated[
        Literal["ald", "cas", "pc"],
        typer.Option(help="Annealed Langevin, consistent annealed, predictor-corrector."),
    ] = "ald",
    steps: Annotated[int, typer.Option(help="Steps at each noise level.")] = 20,
    step_lr: Annotated[
        float | None,
        typer.Option(
            help="Step size at the last level; not of pc.",
            show_default="its sigma squared, of ald 0.2 x that",
        ),
    ] = None,
    snr: Annotated[
        float | None,
        typer.Option(help="Signal-to-noise ratio of pc's corrector.", show_default="0.16"),
    ] = None,
    predictor: Annotated[
        Literal["reverse_diffusion", "ancestral"] | None,
        typer.Option(help="Of pc.", show_default="reverse_diffusion"),
    ] = None,
    denoise: Annotated[bool, typer.Option(help="End at the expected clean image.")] = True,
    clip: Annotated[
        bool, typer.Option(help="Clamp to [-1, 1] after every step of ald, not only at the end.")
    ] = False,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width.", show_default="that of the training images"),
    ] = None,
    file_format: Annotated[
        Literal["png", "npz"],
        typer.Option("--format", help="In a folder: a PNG an image, or an .npz a batch."),
    ] = "png",
    grid: Annotated[
        Path | None, typer.Option(help=f"Also a picture of the first {GRID} images.")
    ] = None,
    strip: Annotated[
        Path | None, typer.Option(help=f"Also a picture of {STRIP} images after each level.")
    ] = None,
    gif: Annotated[
        Path | None, typer.Option(help=f"Also a GIF of the first {GRID} images, level by level.")
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="The network in bfloat16 autocast; the state in float32.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="The network by torch.compile.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> None:
    """Draw images from a trained network. Into a folder: by all processes of torchrun, and where it was stopped.

    torchrun --nproc-per-node 4 -m ncsn_fast sample RUN -n 50000 --out FOLDER
    """
    from .cli import choose_device

    with sharded.processes() as (rank, world):
        where = choose_device(device)
        if world > 1 and where == torch.device("cuda"):
            local = int(os.environ["LOCAL_RANK"])
            where = torch.device("cuda", local % torch.cuda.device_count())
        one_file = out.suffix.lower() in FILES
        if world > 1 and one_file:
            raise ValueError(f"several processes draw into a folder, but --out is {out}")
        given = {"step_lr": step_lr, "snr": snr, "predictor": predictor}
        samplers.check_options(sampler, given)
        if clip and not samplers.SAMPLERS[sampler].clips_every_step:
            raise ValueError(f"sampler {sampler!r} clamps at the end only: it takes no --clip")
        write = _writer(out, file_format)
        _check_pictures({"--out": out, "--grid": grid, "--strip": strip, "--gif": gif})
        model, size = load_model(source, where, weights=weights)
        if image_size is None and size is None:
            raise ValueError(f"{source} does not say how large its images are: give --image-size")
        shape = size if image_size is None else image_size
        model = model.to(memory_format=torch.channels_last)
        options: dict[str, Any] = {"n_steps_each": steps, "clip": clip, "denoise": denoise}
        options |= {"seed": seed}
        sigmas = model.sigmas.tolist()
        if not all(sigma > 0 for sigma in sigmas):
            raise ValueError(f"{source} has no noise levels: set_sigmas before it is saved")
        options |= {"sampler": sampler, **samplers.own_options(sampler, sigmas, given)}
        settings = {
            "weights": "" if one_file else sharded.fingerprint(model),
            "image_size": shape,
            "bf16": bf16,
            **options,
        }
        if compiled:
            model.compile()
        autocast = torch.autocast(where.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

        def draw(begin: int, count: int, **more: Any) -> Tensor:
            with autocast:
                images = model.sample(count, shape, sample_offset=begin, **options, **more)
            return images.clamp(-1, 1).cpu()

        frames: list[Tensor] = []

        def keep(level: int, x: Tensor) -> None:
            frames.append(x[:GRID].cpu())

        watch = {} if strip is None and gif is None else {"callback": keep}
        if one_file:
            first = draw(0, min(batch, n), **watch)
            rest = [draw(begin, min(batch, n - begin)) for begin in range(batch, n, batch)]
            images = torch.cat([first, *rest])
            write(images)
        else:
            sharded.sample_to_folder(
                lambda begin, count: draw(begin, count, verbose=False),
                out,
                n,
                batch,
                settings,
                file_format=file_format,
                rank=rank,
                world=world,
                say=functools.partial(typer.echo, err=True),
            )
            if rank > 0:
                return
            # Anew: another process may have drawn them, or this one long ago.
            wanted = grid is not None or watch
            images = draw(0, min(n, batch, GRID), **watch) if wanted else None
        _write_pictures(images, frames, [*sigmas, 0.0], grid, strip, gif)
        typer.echo(f"{n} images: {out}")


def schedule_command(
    data: Annotated[
        str,
        typer.Argument(help='Folder of images, .npy or .npz file, or "digits" (scikit-learn\'s).'),
    ] = DIGITS,
    image_size: Annotated[int, typer.Option(help="Height and width; digits are 8.")] = 32,
    channels: Annotated[int, typer.Option(help="1 for grey, 3 for RGB; digits have 1.")] = 3,
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
    from .cli import choose_device

    where = choose_device(device)
    _check_pictures({"--plot": plot})
    if plot is not None:
        plots.require()
    images = read_data(data, image_size, channels)
    dim = images[0].numel()
    begin = suggest_sigma_begin(images.to(where))
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


def read_data(data: str, image_size: int, channels: int) -> Tensor:
    """The images of an option; what was skipped in a folder, and what is odd about the values, is told on stderr."""
    if data == DIGITS:
        return load_digits()

    def report(line: str) -> None:
        typer.echo(f"ncsn-fast: {line}", err=True)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataRangeWarning)
        images = load_images(data, image_size, channels, report=report)
    for warning in caught:
        report(str(warning.message))
    return images


def _write_pictures(
    images: Tensor | None,
    frames: list[Tensor],
    sigmas: list[float],
    grid: Path | None,
    strip: Path | None,
    gif: Path | None,
) -> None:
    if images is None:
        return
    shown = images[:GRID]
    scale = max(1, PICTURE_SIDE // max(images.shape[2:]))
    if grid is not None:
        _save(plots.image_grid(shown, scale=scale, gap=max(1, scale // 4)), grid)
    films = [*frames, *([shown[: len(frames[0])]] if frames else [])]
    if strip is not None:
        columns = [frame[:STRIP] for frame in films]
        _save(plots.annealing_strip(columns, sigmas, scale=scale), strip)
    if gif is not None:
        plots.save_gif([plots.image_grid(f, scale=scale) for f in films], gif)


def _save(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _check_pictures(paths: dict[str, Path | None]) -> None:
    """Every path that will be written, before any work: each another one, a picture of its kind, and writable."""
    asked = {option: path for option, path in paths.items() if path is not None}
    seen: dict[Path, str] = {}
    for option, path in asked.items():
        other = seen.setdefault(path.absolute(), option)
        if other != option:
            raise ValueError(f"{other} and {option} name the same file, {path}")
        if option == "--out":
            continue
        kind = ".gif" if option == "--gif" else ".png"
        if path.suffix.lower() != kind and path.suffix.lower() in (*FILES, *OTHER_FILES):
            raise ValueError(f"{option} makes a {kind} file, got {path}")
        _check_file(path)
        pictures.require()


def _check_file(path: Path) -> None:
    """Makes the folder of a file, and sees that the file can be written there."""
    _make_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(None, "is a folder", str(path))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(None, "cannot write there", str(folder))


def _writer(out: Path, file_format: str) -> Callable[[Tensor], None]:
    """How images go to ``out``, by its suffix. Makes the folder, so that a bad path fails before any work."""
    suffix = out.suffix.lower()
    if suffix in FILES:
        _check_file(out)
    elif suffix in OTHER_FILES and not out.is_dir():
        raise ValueError(f"--out must end in .png, .npy or .npz, or be a folder, got {out}")
    else:
        _make_folder(out)
    if suffix == ".png" or (suffix not in FILES and file_format == "png"):
        pictures.require()

    def write(images: Tensor) -> None:
        buffer = io.BytesIO()
        if suffix == ".npy":
            np.save(buffer, images.numpy())
        elif suffix == ".npz":
            np.savez_compressed(buffer, images=images.numpy())
        else:
            scale = max(1, PICTURE_SIDE // max(images.shape[2:]))
            plots.image_grid(images, scale=scale, gap=max(1, scale // 4)).save(buffer, "PNG")
        write_atomically(out, buffer.getvalue())

    return write
