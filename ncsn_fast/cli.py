"""The command ``ncsn-fast``: train, demo, info; and how every command shows errors.

Belongs here: options, their defaults and help, and errors as one line. Does not belong here: the commands sample and
schedule (``cli_sampling.py``) and bench; anything a Python user would want too.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from . import __version__, info
from .checkpoints import CHECKPOINT_NAME, CheckpointError, load_checkpoint
from .cli_sampling import DIGITS, read_data, sample_command, schedule_command
from .config import NCSNConfig
from .engine import ScoreError
from .model import NCSN
from .ops.dispatch import BackendError
from .ranges import DataRangeWarning
from .schedules import make_sigmas, suggest_sigma_begin
from .sharded import ShardError
from .training import TrainingError, TrainingInterrupted, TrainingSettings, train

try:
    import typer
except ImportError:  # an extra; main() says so
    typer = None

USER_ERROR = 2
FAULT = 1  # of ours: anything that is not expected, shown with its traceback
DEBUG = "NCSN_FAST_DEBUG"  # an environment variable: expected errors with their traceback too
INTERRUPTED = 128 + 2  # as a shell reports SIGINT

EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    BackendError,
    CheckpointError,
    TrainingError,
    ScoreError,
    ShardError,
    torch.OutOfMemoryError,
)


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
    given = _given(context)
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


def demo_command(
    name: Annotated[
        Literal["digits", "two-gaussians", "checkerboard"], typer.Argument(help="Which demo.")
    ] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for everything.", show_default="ncsn_demo, or ncsn_demo_NAME"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, training and samples.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(help="Training steps.", show_default="the demo's own")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="How many to draw.", show_default="100 digits, or 2000 points"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew, even if OUT holds a demo's network.")
    ] = False,
) -> None:
    """Train a small network on small data, draw from it, measure and draw figures.

    digits: scikit-learn's handwritten ones, with an NCSN, a few minutes. two-gaussians: points whose score is known, to
    compare with. checkerboard: points again. About a minute each. A network that is in OUT already is trained to its
    end, or used as it is.
    """
    from . import demo, toy_demos

    run = {
        "digits": demo.run,
        "two-gaussians": toy_demos.run_two_gaussians,
        "checkerboard": toy_demos.run_checkerboard,
    }[name]
    if out is None:
        out = Path("ncsn_demo" if name == "digits" else f"ncsn_demo_{name.replace('-', '_')}")
    if fresh:
        (out / CHECKPOINT_NAME).unlink(missing_ok=True)
    given = {} if samples is None else {"n_samples": samples}
    run(out, seed=seed, iterations=iterations, **given)


def info_command(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Versions, devices, the build, and which backend serves which operator, or why not."""
    typer.echo(info.as_json() if as_json else info.render(info.collect()))


def bench_command(context: typer.Context) -> None:
    """Measure operators, layers, network, training and sampling beside PyTorch; its own --help tells more."""
    from .benchmarks import command  # which no other command may need

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command.bench_command)
    own = typer.main.get_command(app)
    # Not app(...): it would take Ctrl-C for itself.
    with own.make_context("ncsn-fast bench", context.args) as inner:
        own.invoke(inner)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``ncsn-fast``: runs a command and exits.

    Exit status: 0; 2 for a mistake of the user, with one line on stderr (and the traceback before it, with --debug or
    NCSN_FAST_DEBUG=1); 1 for any other error, always with its traceback; 130 after Ctrl-C.
    """
    if typer is None:
        sys.exit(_complain('the command line takes typer: pip install "ncsn_fast[cli]"'))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage_error = typer.BadParameter.__base__  # click's, or the copy of it that typer has
    try:
        status = _build_app()(arguments or ["--help"], prog_name="ncsn-fast", standalone_mode=False)
    except usage_error as error:
        status = _complain(f"{error.format_message()} (try --help)")
    sys.exit(status or 0)


def _build_app() -> typer.Typer:
    app = typer.Typer(
        help="Noise Conditional Score Networks: train on images, draw new ones.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def version(
        show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
        debug: Annotated[
            bool,
            typer.Option("--debug", help=f"Show the traceback of any error; as {DEBUG}=1 does."),
        ] = False,
    ) -> None:
        if debug:
            os.environ[DEBUG] = "1"  # for the processes that a command starts too
        if show:
            typer.echo(f"ncsn_fast {__version__}")
            raise typer.Exit

    for command in (
        train_command,
        sample_command,
        schedule_command,
        demo_command,
        info_command,
    ):
        app.command(command.__name__.removesuffix("_command"))(_with_clean_errors(command))
    hand_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("bench", context_settings=hand_on)(_with_clean_errors(bench_command))
    return app


def _with_clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with expected errors and Ctrl-C as one line on stderr and an exit status."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EXPECTED_ERRORS as error:
            if os.environ.get(DEBUG, "") not in ("", "0"):
                traceback.print_exc()
            raise typer.Exit(_complain(_one_line(error))) from error
        except TrainingInterrupted as stop:
            how = "the same command" + ("" if command is demo_command else " with --resume")
            _complain(f"{stop}; {how} goes on")
            raise typer.Exit(INTERRUPTED) from stop
        except KeyboardInterrupt as stop:
            _complain("interrupted")
            raise typer.Exit(INTERRUPTED) from stop
        except Exception as error:
            if isinstance(error, (typer.Exit, typer.Abort, typer.BadParameter.__base__)):
                raise
            traceback.print_exc()
            _complain(
                f"unexpected {type(error).__name__}, a fault of ncsn_fast: {_one_line(error)}"
            )
            raise typer.Exit(FAULT) from error

    return guarded


def _complain(message: str) -> int:
    print(f"ncsn-fast: {message}", file=sys.stderr)
    return USER_ERROR


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _given(context: typer.Context) -> set[str]:
    """The options that were on the command line."""
    return {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


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
