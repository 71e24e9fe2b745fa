"""How good samples are: features, and distances between sets of them; how good a score is where it is known.

Belongs here: the names that users import. Does not belong here: pictures (``plots``).
"""

from __future__ import annotations

from .features import EfficientNetFeatures, InceptionFeatures, choose_features
from .likelihood import bits_per_dimension, has_likelihood
from .metrics import (
    PCAFeatures,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    nearest_images,
    precision_recall,
    score_errors,
)
from .report import compare, losses_by_level, render

__all__ = [
    "EfficientNetFeatures",
    "InceptionFeatures",
    "PCAFeatures",
    "bits_per_dimension",
    "choose_features",
    "compare",
    "frechet_distance",
    "has_likelihood",
    "kernel_distance",
    "losses_by_level",
    "nearest_distances",
    "nearest_images",
    "precision_recall",
    "render",
    "score_errors",
]
