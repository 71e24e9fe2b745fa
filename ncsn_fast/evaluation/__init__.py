"""How good samples are: features, and distances between sets of them; how good a score is where it is known.

Belongs here: the names that users import. Does not belong here: pictures (``plots``).
"""

from __future__ import annotations

from .metrics import PCAFeatures, frechet_distance, nearest_distances, score_errors

__all__ = ["PCAFeatures", "frechet_distance", "nearest_distances", "score_errors"]
