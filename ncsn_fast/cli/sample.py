"""The command ``ncsn-fast sample``."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..data.ranges import to_image_range
from ..models.base import ScoreModel
from ..models.sampling_settings import load_sampling, load_tuned
from ..models.shipped import shipped_names
from ..sampling import auto, samplers
from ..sampling import to_folder as sharded
from ..sampling.run import callback_sigmas
from .options import choose_device, load_image_network
from .output import FILES, GRID, STRIP, check_pictures, write_pictures, writer

try:
    import typer
except ImportError:  # an extra; main says so
    typer = None

STEPS = 20  # at each level, where neither the user nor the run's preset says


def sample_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, a checkpoint file, a save_pretrained folder, or a network of the package: "
            f"{', '.join(shipped_names())}."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Picture (.png), arrays (.npy, .npz), or a folder, which resumes."),
    ] = Path("samples.png"),
    weights: Annotated[
        str,
        typer.Option(
            help="Of a run: ema, the moving average; ema:0.99, that of another decay; or last, those of the last step."
        ),
    ] = "ema",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Image i of a seed is always the same.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 256,
    sampler: Annotated[
        Literal[auto.CHOICES] | None,
        typer.Option(
            help=f"auto: one of those for few passes; {samplers.sampler_help()}",
            show_default="auto with --passes, or after tune; else that of the run's preset, or ald",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps at each noise level; not of samplers for few passes.",
            show_default=f"that of the run's preset, or {STEPS}",
        ),
    ] = None,
    step_lr: Annotated[
        float | None,
        typer.Option(
            help=samplers.option_help("step_lr"), show_default=samplers.option_default("step_lr")
        ),
    ] = None,
    snr: Annotated[
        float | None,
        typer.Option(help=samplers.option_help("snr"), show_default=samplers.option_default("snr")),
    ] = None,
    predictor: Annotated[
        Literal[samplers.OPTIONS["predictor"].choices] | None,
        typer.Option(
            help=samplers.option_help("predictor"),
            show_default=samplers.option_default("predictor"),
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            help=samplers.option_help("passes"), show_default=samplers.option_default("passes")
        ),
    ] = None,
    levels: Annotated[
        Literal[samplers.OPTIONS["levels"].choices] | None,
        typer.Option(
            help=samplers.option_help("levels"), show_default=samplers.option_default("levels")
        ),
    ] = None,
    churn: Annotated[
        float | None,
        typer.Option(
            help=samplers.option_help("churn"), show_default=samplers.option_default("churn")
        ),
    ] = None,
    churn_min: Annotated[
        float | None,
        typer.Option(
            help=samplers.option_help("churn_min"),
            show_default=samplers.option_default("churn_min"),
        ),
    ] = None,
    churn_max: Annotated[
        float | None,
        typer.Option(
            help=samplers.option_help("churn_max"),
            show_default=samplers.option_default("churn_max"),
        ),
    ] = None,
    churn_noise: Annotated[
        float | None,
        typer.Option(
            help=samplers.option_help("churn_noise"),
            show_default=samplers.option_default("churn_noise"),
        ),
    ] = None,
    corrector_steps: Annotated[
        int | None,
        typer.Option(
            help=samplers.option_help("corrector_steps"),
            show_default=samplers.option_default("corrector_steps"),
        ),
    ] = None,
    denoise: Annotated[
        bool | None,
        typer.Option(
            help="End at the expected clean image.", show_default="that of the run's preset, or yes"
        ),
    ] = None,
    clip: Annotated[
        bool,
        typer.Option(
            help="Clamp to the data's range after every step of ald, not only at the end."
        ),
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
    with sharded.processes() as (rank, world):
        where = choose_device(device)
        if world > 1 and where == torch.device("cuda"):
            local = int(os.environ["LOCAL_RANK"])
            where = torch.device("cuda", local % torch.cuda.device_count())
        one_file = out.suffix.lower() in FILES
        if world > 1 and one_file:
            raise ValueError(f"several processes draw into a folder, but --out is {out}")
        given = {"step_lr": step_lr, "snr": snr, "predictor": predictor, "passes": passes}
        given |= {"levels": levels, "corrector_steps": corrector_steps, "churn": churn}
        given |= {"churn_min": churn_min, "churn_max": churn_max, "churn_noise": churn_noise}
        named = _sampler_of(source, sampler, given, steps)
        if named != auto.AUTO:
            samplers.check_options(named, given)
            _check_clip(named, clip)
        write = writer(out, file_format)
        check_pictures({"--out": out, "--grid": grid, "--strip": strip, "--gif": gif})
        model, size = load_image_network(source, where, weights)
        expected = model.data_range
        if image_size is None and size is None:
            raise ValueError(f"{source} does not say how large its images are: give --image-size")
        shape = size if image_size is None else image_size
        model = model.to(memory_format=torch.channels_last)
        sampler, options = drawing_options(source, model, sampler, given, steps, denoise, clip=clip)
        options["seed"] = seed
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
            return to_image_range(images, expected).cpu()

        frames: list[Tensor] = []
        # Without noise it is the result, which the pictures end with in any case.
        own = {name: options[name] for name in samplers.SAMPLERS[sampler].defaults}
        named = callback_sigmas(sampler, tuple(model.scores()), model.sigmas.tolist(), own)
        named = [sigma for sigma in named if sigma > 0]

        def keep(level: int, x: Tensor) -> None:
            if level < len(named):
                frames.append(to_image_range(x[:GRID].cpu(), expected))

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
        write_pictures(images, frames, [*named, 0.0], grid, strip, gif)
        typer.echo(f"{n} images: {out}")


def drawing_options(
    source: Path,
    model: ScoreModel,
    sampler: str | None,
    given: dict[str, Any],
    steps: int | None,
    denoise: bool | None,
    *,
    clip: bool,
) -> tuple[str, dict[str, Any]]:
    """The sampler, and the options of ``model.sample``: as given, else as saved, else the defaults."""
    sampler = _sampler_of(source, sampler, given, steps)
    if sampler == auto.AUTO:
        n_levels = None if "sigma" in model.scores() else len(model.sigmas)
        sampler, given = auto.resolve(sampler, given, n_levels, model.tuned)
        typer.echo(f"sampler auto: {auto.in_words(sampler, given)}", err=True)
    _check_clip(sampler, clip)
    held = load_sampling(source)
    if held.pop("sampler", "ald") != sampler:
        held = {}  # of another sampler
    few = sampler in samplers.FEW_PASSES
    options: dict[str, Any] = {"n_steps_each": None if few else STEPS, "denoise": True, **held}
    saved_step_lr = options.pop("step_lr", None)
    if given["step_lr"] is None:
        given = {**given, "step_lr": saved_step_lr}
    options["clip"] = clip or options.get("clip", False)
    for name, value in (("n_steps_each", steps), ("denoise", denoise)):
        options[name] = options[name] if value is None else value
    own = samplers.own_options(sampler, model.sigmas.tolist(), given)
    return sampler, {**options, "sampler": sampler, **own}


def _sampler_of(source: Path, sampler: str | None, given: dict[str, Any], steps: int | None) -> str:
    """The sampler that was asked for; without one, "auto" where a few passes are wanted, else the saved one."""
    if sampler is not None:
        return sampler
    if given["passes"] is not None or (load_tuned(source) and not _asks_for_steps(given, steps)):
        return auto.AUTO
    return load_sampling(source).get("sampler", "ald")


def _check_clip(sampler: str, clip: bool) -> None:
    if clip and not samplers.SAMPLERS[sampler].clips_every_step:
        raise ValueError(f"sampler {sampler!r} clamps at the end only: it takes no --clip")


def _asks_for_steps(given: dict[str, Any], steps: int | None) -> bool:
    """Whether an option was given that only samplers of many steps take."""
    return steps is not None or any(
        value is not None and not set(samplers.takers(name)) & set(samplers.FEW_PASSES)
        for name, value in given.items()
    )
