"""The demos on points in the plane: two Gaussians, whose score is known, and the checkerboard.

Belongs here: their settings, their numbers, their figures. Does not belong here: the digits' demo (``digits.py``),
training, sampling, plots and exact scores themselves.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from .. import plots
from ..data import Checkerboard, two_gaussians
from ..evaluation import score_errors
from ..files import write_atomically
from ..models.small import ScoreMLP
from ..sampling.start import initial_state
from ..schedules import make_sigmas
from ..training.checkpoints import CHECKPOINT_NAME
from ..training.log import LOSSES_NAME, read_losses
from ..training.settings import TrainingSettings
from ..training.trainer import train

N_DATA = 50_000
STEPS_EACH_LEVEL = 100
N_TEST = 5000  # points, not those of the training, at which the learned score is compared with the exact one
Numbers = dict[str, object]


def run_two_gaussians(
    out: str | Path,
    *,
    seed: int = 0,
    iterations: int | None = None,
    n_samples: int = 2000,
    verbose: bool = True,
) -> Numbers:
    """Learn the score of two Gaussians, compare it with the exact one, sample, and draw all of it.

    Args:
        out: folder for the checkpoint, ``model/``, ``ladder.png``, ``perturbed.png``, ``loss.png``,
            ``score_fields.png``, ``errors.png``, ``samples.png``, ``trajectories.png`` and
            ``metrics.json``. A run that is there already goes on.
        seed: of weights, data, training and samples.
        iterations: training steps; None for the demo's own.
        n_samples: how many points to draw.
        verbose: show progress and the numbers.

    Returns:
        The numbers of ``metrics.json``: the relative error of the score at each level, and the share of the samples
        that is nearest to each Gaussian.
    """
    out, points = Path(out), two_gaussians()
    sigmas = make_sigmas(10.0, 0.01, 10)
    torch.manual_seed(seed)
    model = ScoreMLP(conditioning="concat", sigmas=sigmas)
    data = points.sample(N_DATA, seed=seed)
    settings = _settings(seed, iterations or 4000)
    model, seconds = _trained(model, data, settings, out, verbose)
    samples, states, sampling_seconds = _sampled(model, n_samples, seed)
    numbers: Numbers = {
        "sigmas": [round(sigma, 5) for sigma in sigmas.tolist()],
        "relative_error_by_level": score_errors(
            model, points.sample(N_TEST, seed=seed + 1), points.score
        ),
        "mode_weights": _rounded(points.mode_weights(samples)),
        "mode_weights_of_data": _rounded(points.mode_weights(data[:n_samples])),
        "sample_mean": _rounded(samples.mean(0).tolist()),
        "sample_std_within": _within(samples),
        "samples": n_samples,
        "training_seconds": seconds,
        "sampling_seconds": sampling_seconds,
    }
    plots.ladder(sigmas, path=out / "ladder.png")
    plots.perturbed(data, sigmas, path=out / "perturbed.png")
    plots.loss_curve(read_losses(out / LOSSES_NAME)[1], out / "loss.png")
    plots.score_fields(model.score, sigmas, data, path=out / "score_fields.png", exact=points.score)
    plots.errors(sigmas, numbers["relative_error_by_level"], out / "errors.png")
    plots.compare(data, samples, out / "samples.png")
    plots.trajectories(states, data, out / "trajectories.png")
    _finish(out, numbers, verbose)
    return numbers


def run_checkerboard(
    out: str | Path,
    *,
    seed: int = 0,
    iterations: int | None = None,
    n_samples: int = 2000,
    verbose: bool = True,
) -> Numbers:
    """Learn the checkerboard, sample, and count the samples in the dark squares.

    Args:
        out: folder for the checkpoint, ``model/``, ``samples.png``, ``loss.png``, ``score_fields.png``,
            ``trajectories.png``, ``metrics.json``. A run that is there already goes on.
        seed, iterations, n_samples, verbose: as of :func:`run_two_gaussians`.

    Returns:
        The numbers of ``metrics.json``: the share in the dark squares, of samples and of data, and the relative error
        of the score at each level.
    """
    out, points = Path(out), Checkerboard()
    sigmas = make_sigmas(5.0, 0.02, 10)
    torch.manual_seed(seed)
    model = ScoreMLP(conditioning="sinusoidal", sigmas=sigmas)
    data = points.sample(N_DATA, seed=seed)
    settings = _settings(seed, iterations or 5000)
    model, seconds = _trained(model, data, settings, out, verbose)
    samples, states, sampling_seconds = _sampled(model, n_samples, seed)
    test = points.sample(N_TEST, seed=seed + 1)
    numbers: Numbers = {
        "sigmas": [round(sigma, 5) for sigma in sigmas.tolist()],
        "share_in_dark_squares": round(float(points.is_dark(samples).float().mean()), 4),
        "share_in_dark_squares_of_data": round(float(points.is_dark(data).float().mean()), 4),
        "relative_error_by_level": score_errors(model, test, points.score),
        "samples": n_samples,
        "training_seconds": seconds,
        "sampling_seconds": sampling_seconds,
    }
    plots.compare(data, samples, out / "samples.png")
    plots.loss_curve(read_losses(out / LOSSES_NAME)[1], out / "loss.png")
    plots.score_fields(model.score, sigmas, data, path=out / "score_fields.png", exact=points.score)
    plots.trajectories(states, data, out / "trajectories.png")
    _finish(out, numbers, verbose)
    return numbers


def _settings(seed: int, iterations: int) -> TrainingSettings:
    return TrainingSettings(
        iterations=iterations, batch_size=512, lr=1e-3, ema_decay=0.998, seed=seed
    )


def _trained(
    model: ScoreMLP, data: Tensor, settings: TrainingSettings, out: Path, verbose: bool
) -> tuple[ScoreMLP, float]:
    begin = time.perf_counter()
    resume = (out / CHECKPOINT_NAME).exists()
    model = train(model, data, settings, out, resume=resume, verbose=verbose)
    return model, round(time.perf_counter() - begin, 1)


def _sampled(model: ScoreMLP, n: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Samples, the start and the state after each level, and seconds."""
    begin = time.perf_counter()
    sigma = float(model.sigmas[0])
    start = sigma * initial_state((n, *model.sample_shape), "normal", seed=seed)
    samples, states = model.sample(
        n,
        n_steps_each=STEPS_EACH_LEVEL,
        init=start,
        seed=seed,
        return_intermediates=STEPS_EACH_LEVEL,
    )
    seconds = round(time.perf_counter() - begin, 2)
    return samples, torch.cat([start.unsqueeze(0), states]), seconds


def _within(samples: Tensor) -> list[float]:
    """Standard deviations around each sample's Gaussian; of the data they are 0.5."""
    centred = samples - torch.sign(samples[:, :1]) * samples.new_tensor([[3.0, 0.0]])
    return _rounded(centred.std(0).tolist())


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _finish(out: Path, numbers: Numbers, verbose: bool) -> None:
    write_atomically(out / "metrics.json", (json.dumps(numbers, indent=2) + "\n").encode())
    if verbose:
        for name, value in numbers.items():
            print(f"{name.replace('_', ' ')}: {value}")
        print(f"figures: {', '.join(sorted(file.name for file in out.glob('*.png')))} in {out}")
