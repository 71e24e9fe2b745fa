"""Figures and pictures: grids of images, films of a chain, score fields, losses, the page about a run.

Belongs here: the names that users import. Does not belong here: figures by matplotlib (``figures.py``), pictures by
pillow (``pictures.py``), the page (``report.py``), how figures look and are written (``style.py``).
"""

from __future__ import annotations

from .figures import (
    compare,
    errors,
    images,
    ladder,
    loss_curve,
    perturbed,
    running_mean,
    score_fields,
    trajectories,
)
from .pictures import annealing_strip, image_grid, save_gif, side_by_side
from .report import run_page

__all__ = [
    "annealing_strip",
    "compare",
    "errors",
    "image_grid",
    "images",
    "ladder",
    "loss_curve",
    "perturbed",
    "run_page",
    "running_mean",
    "save_gif",
    "score_fields",
    "side_by_side",
    "trajectories",
]
