"""Training data: images from scikit-learn's digits, a folder or an array file, and points in the plane.

Belongs here: the names that users import. Does not belong here: one image (``images.py``), many of them
(``folders.py``), the digits (``digits.py``), points (``points.py``); batching and its order (``training.py``), the
noise added to data (``losses.py``), the range that a network expects (``ranges.py`` of the package above).
"""

from __future__ import annotations

from .digits import load_digits
from .folders import load_images
from .images import to_uint8
from .points import (
    Checkerboard,
    GaussianMixture,
    eight_gaussians,
    spirals,
    swiss_roll,
    two_gaussians,
    two_moons,
)

__all__ = [
    "Checkerboard",
    "GaussianMixture",
    "eight_gaussians",
    "load_digits",
    "load_images",
    "spirals",
    "swiss_roll",
    "to_uint8",
    "two_gaussians",
    "two_moons",
]
