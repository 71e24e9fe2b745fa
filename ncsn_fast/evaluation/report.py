"""How good a trained network is, in numbers, each beside what noise and real images get.

Belongs here: which sets are compared, of which sizes, and the text of the result. Does not belong here: the distances
(``metrics.py``), features (``features.py``), drawing samples, pictures and files (``cli/evaluate.py``).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..data import ImageDataset
from ..models.base import ScoreModel
from .features import FeatureNetwork
from .metrics import frechet_distance, kernel_distance, nearest_images, precision_recall

REFERENCE = 5_000  # training images, at most, that samples are compared with
BATCH = 64
LOSS_IMAGES = 256  # at most, for the loss of each level
NEAREST_IMAGES = 100  # of each set, at most, that are compared with every training image
SAMPLES, NOISE = "samples", "noise"

Images = Tensor | ImageDataset


def compare(
    samples: Tensor,
    training: Images,
    real: Tensor,
    features: FeatureNetwork,
    *,
    real_name: str = "held-out images",
    seed: int = 0,
) -> dict[str, Any]:
    """Samples, real images and noise against the training images, all three of one size.

    Args:
        samples: ``(N, C, H, W)`` in [-1, 1], whatever the network's range.
        training: the reference, of which at most 5,000, evenly spaced, are taken.
        real: ``(N, C, H, W)``, images that are not in ``training``: what a perfect network would get.
        features: what images are compared by.
        real_name: of those images, for the report.
        seed: of the noise, uniform in [-1, 1], and of the subsets of KID.

    Returns:
        Plain values: ``features``, ``n``, ``reference``, and under ``sets`` for each set ``frechet``, ``kid``,
        ``kid_std`` (absent without torchmetrics), ``precision``, ``recall``, and ``nearest``, the median distance in
        pixels to the nearest of all training images, of at most 100 images of the set.

    Raises:
        ValueError: fewer than 5 images in a set, or sets of different sizes.
    """
    if not len(samples) == len(real) >= 5:
        raise ValueError(
            f"samples and real images must be as many, at least 5, got {len(samples)} and {len(real)}"
        )
    reference = evenly(training, REFERENCE)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.rand(samples.shape, generator=generator, dtype=torch.float32, device="cpu")
    compute = functools.partial(in_batches, features)
    known = compute(reference)
    same_size = evenly(known, len(samples))
    sets: dict[str, dict[str, float]] = {}
    for name, images in ((SAMPLES, samples), (real_name, real), (NOISE, noise * 2 - 1)):
        found = compute(images)
        precision, recall = precision_recall(same_size, found)
        sets[name] = {"frechet": frechet_distance(known, found)}
        kid = kernel_distance(known, found, seed=seed)
        if kid is not None:
            sets[name] |= {"kid": kid[0], "kid_std": kid[1]}
        nearest = nearest_images(images[:NEAREST_IMAGES], training, 1)[0].median()
        sets[name] |= {"precision": precision, "recall": recall, "nearest": float(nearest)}
    return {
        "features": features.name,
        "n": len(samples),
        "reference": len(reference),
        "dims": known.shape[1],
        "sets": sets,
    }


@torch.no_grad()
def losses_by_level(model: ScoreModel, images: Images, *, seed: int = 0) -> list[float]:
    r"""The denoising score matching loss of each level of the ladder, weighted by :math:`\sigma^2`, a dimension.

    The score 0, which knows nothing, has 1. The noise is fixed by the seed, so that curves of two sets, networks or
    times compare. At most 256 images, evenly spaced, are taken.

    Args:
        model: with its ladder set; left in the mode it was in.
        images: ``(N, ...)`` in the network's range.
    """
    some, device, mode = evenly(images, LOSS_IMAGES), model.sigmas.device, model.training
    model.eval()
    result = []
    for level in range(len(model.sigmas)):
        total = 0.0
        for number, batch in enumerate(some.split(BATCH)):
            labels = torch.full((len(batch),), level, dtype=torch.int64, device=device)
            # A seed a batch; the same noise at every level.
            where = {"labels": labels, "seed": (seed << 32) + number}
            total += float(model.get_loss(batch.to(device), **where)[0]) * len(batch)
        result.append(total / (len(some) * some[0].numel()))
    model.train(mode)
    return result


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['n']} images of each set against {report['reference']} training images",
        f"features: {report['features']}; values of other features do not compare",
    ]
    if report["n"] <= report["dims"]:
        lines.append(
            f"fewer images than features ({report['dims']}): the Frechet distance is far above its value for many "
            "images, for every set"
        )
    columns = ["frechet", "kid", "precision", "recall", "nearest"]
    if "kid" not in report["sets"][SAMPLES]:
        columns.remove("kid")
        lines.append('KID takes torchmetrics: pip install "ncsn_fast[evaluation]"')
    width = max(map(len, report["sets"]))
    lines.append(" " * width + "".join(f"{column:>11}" for column in columns))
    for name, values in report["sets"].items():
        cells = (f"{values[column]:11.4g}" for column in columns)
        lines.append(f"{name:<{width}}" + "".join(cells))
    lines.append("(nearest: median distance to the nearest training image; near 0 would be copies)")
    bits = report.get("bits_per_dim")
    if bits:
        lines.append(
            "bits a dimension, of 8 for a network that takes all images for equally likely:"
        )
        for name, found in bits.items():
            lines.append(
                f"  {name}: {found['mean']:.3f}, standard error {found['standard_error']:.3f}, of {found['images']}"
            )
    losses = report.get("loss_by_level")
    if losses:
        names = [name for name in losses if name != "sigmas"]
        lines.append("loss by level, of 1 for a network that knows nothing: " + ", ".join(names))
        for level, sigma in enumerate(losses["sigmas"]):
            row = "".join(f"{losses[name][level]:10.4f}" for name in names)
            lines.append(f"  sigma {sigma:9.4g}{row}")
    return "\n".join(lines)


def evenly(data: Images, most: int) -> Tensor:
    """At most so many rows, evenly spaced, in memory."""
    return data[:: max(1, math.ceil(len(data) / most))]


def in_batches(features: FeatureNetwork, images: Tensor) -> Tensor:
    """The features of many images, a batch at a time."""
    return torch.cat([features(some) for some in images.split(BATCH)])
