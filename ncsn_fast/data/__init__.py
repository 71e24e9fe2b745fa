"""Training data: images from a folder, an archive, an array file, IDX or the Hub, the digits, and points in the plane.

Belongs here: the names that users import. Does not belong here: from a name to a data set (``opening.py``), what
training takes (``dataset.py``), where images come from (``sources.py``, ``folders.py``, ``digits.py``), decoding
(``images.py``) and keeping what was decoded (``cache.py``), points (``points.py``), the range that a network expects
(``ranges.py``); the order of batches (``training``), the noise added to data (``losses.py``).
"""

from __future__ import annotations

from .dataset import ImageDataset, as_dataset
from .digits import load_digits
from .folders import load_images
from .images import to_uint8
from .opening import open_images
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
    "ImageDataset",
    "as_dataset",
    "eight_gaussians",
    "load_digits",
    "load_images",
    "open_images",
    "spirals",
    "swiss_roll",
    "to_uint8",
    "two_gaussians",
    "two_moons",
]
