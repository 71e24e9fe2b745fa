"""The demo: train on handwritten digits, draw new ones, and measure how far they are from the data.

Belongs here: how samples are drawn, and the report of the run. Does not belong here: the settings of the training
(``presets/digits.toml``); training, sampling, pictures and metrics themselves.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, info, plots
from ..data import load_digits
from ..evaluation.metrics import PCAFeatures, frechet_distance, nearest_distances
from ..files import write_atomically
from ..training.checkpoints import CHECKPOINT_NAME, MODEL_NAME, load_checkpoint
from ..training.config import merge_config
from ..training.log import LOSSES_NAME, read_losses
from ..training.trainer import train

PRESET = "digits"  # ncsn_fast/presets/digits.toml: the network and its training
STEPS_EACH_LEVEL = 20
STEP_LR = 0.2  # of the variance of the last level's noise, a step
GRID = 100  # images in a picture
STRIP = 8  # images whose annealing is shown
SCALE, GAP = 5, 12  # the digits fill their 8x8 pixels: without a gap, neighbours run together


def run(
    out: str | Path,
    *,
    seed: int = 0,
    iterations: int | None = None,
    n_samples: int = GRID,
    verbose: bool = True,
) -> dict[str, float | str]:
    """Train, sample, draw and measure; a run that was interrupted goes on where it was.

    Args:
        out: folder for the checkpoint, ``model/``, ``samples.png``, ``annealing.png``, ``annealing.gif``, ``loss.png``,
            ``samples.npz`` and ``metrics.json``.
        seed: of the weights, the training and the samples.
        iterations: training steps; None for the demo's own.
        n_samples: how many digits to draw, at least 2.
        verbose: show progress and the numbers.

    Returns:
        The numbers of ``metrics.json``.

    Raises:
        ValueError: fewer than 2 samples.
        Those of :func:`~ncsn_fast.training.train`.
    """
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, got {n_samples}")
    out = Path(out)
    images, heldout = load_digits("train"), load_digits("heldout")
    config = merge_config(preset=PRESET, seed=seed, iterations=iterations)
    model, settings = config.new_network(images), config.settings
    begin = time.perf_counter()
    resume = (out / CHECKPOINT_NAME).exists()
    model = train(model, images, settings, out, resume=resume, verbose=verbose, config=config)
    training_seconds = time.perf_counter() - begin

    frames: list[Tensor] = []
    begin = time.perf_counter()
    samples = model.sample(
        n_samples,
        8,
        n_steps_each=STEPS_EACH_LEVEL,
        step_lr=STEP_LR * float(model.sigmas[-1]) ** 2,
        clip=False,  # the states of the wide levels lie far outside [-1, 1]
        denoise=True,
        init_dist="normal",
        seed=seed,
        verbose=verbose,
        callback=lambda level, x: frames.append(x),
    ).clamp(-1, 1)
    sampling_seconds = time.perf_counter() - begin
    numbers = measure(samples, images, heldout)
    numbers |= {
        "samples": n_samples,
        "iterations": load_checkpoint(out / CHECKPOINT_NAME).step,
        "training_seconds": round(training_seconds, 1),
        "sampling_seconds": round(sampling_seconds, 1),
        "resumed": resume,  # then the seconds are not of the whole training
        "device": info.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ncsn_fast": __version__,
    }
    # The last frame is the denoised end.
    draw(out, samples, heldout, [*frames, samples], [*model.sigmas.tolist(), 0.0])
    write_atomically(out / "metrics.json", (json.dumps(numbers, indent=2) + "\n").encode())
    if verbose:
        print(render(numbers))
        print(f"pictures: {out / 'samples.png'}, annealing.png, annealing.gif, loss.png")
        print(f"network:  {out / MODEL_NAME}")
    return numbers


def measure(samples: Tensor, images: Tensor, heldout: Tensor) -> dict[str, float]:
    """How far the samples are from held-out data, with what noise and real images of the same number give."""
    n = len(samples)
    features = PCAFeatures(images)
    target = features(heldout)
    generator = torch.Generator("cpu").manual_seed(0)
    real = images[torch.randperm(len(images), generator=generator, device="cpu")[:n]]
    plain = {"dtype": torch.float32, "device": "cpu"}
    noise = torch.rand(samples.shape, generator=generator, **plain) * 2 - 1
    distances = {
        "frechet_samples": frechet_distance(features(samples), target),
        "frechet_training": frechet_distance(features(real), target),
        "frechet_noise": frechet_distance(features(noise), target),
        "nearest_samples": float(nearest_distances(samples, images).median()),
        "nearest_heldout": float(nearest_distances(heldout, images).median()),
        "nearest_samples_smallest": float(nearest_distances(samples, images).min()),
    }
    return {name: round(value, 3) for name, value in distances.items()}


def render(numbers: dict[str, float | str]) -> str:
    """The numbers in three lines."""
    return (
        "Frechet distance to held-out digits (PCA features): "
        f"samples {numbers['frechet_samples']:.2f}, real training digits "
        f"{numbers['frechet_training']:.2f}, noise {numbers['frechet_noise']:.1f}\n"
        "distance to the nearest training digit (median): "
        f"samples {numbers['nearest_samples']:.2f} (smallest "
        f"{numbers['nearest_samples_smallest']:.2f}), held-out digits "
        f"{numbers['nearest_heldout']:.2f}: near 0 would be copies\n"
        f"trained in {numbers['training_seconds']:.0f} s, sampled in "
        f"{numbers['sampling_seconds']:.0f} s"
    )


def draw(
    out: Path, samples: Tensor, heldout: Tensor, frames: list[Tensor], sigmas: list[float]
) -> None:
    """The pictures of the run. ``frames`` is the state after each level, whose sigmas are given, and the end."""
    shown = {"samples": samples, "held-out data": heldout}
    grids = {name: plots.image_grid(x[:GRID], scale=SCALE, gap=GAP) for name, x in shown.items()}
    plots.side_by_side(grids).save(out / "samples.png")
    strip = [frame[:STRIP] for frame in frames]
    plots.annealing_strip(strip, sigmas, scale=SCALE).save(out / "annealing.png")
    film = [plots.image_grid(frame[:GRID], scale=SCALE, gap=GAP) for frame in frames]
    plots.save_gif(film, out / "annealing.gif", ms=400)
    plots.loss_curve(read_losses(out / LOSSES_NAME)[1], out / "loss.png")
