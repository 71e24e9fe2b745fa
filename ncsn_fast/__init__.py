"""Noise Conditional Score Networks (Song & Ermon 2019) at the speed of the hardware."""

from __future__ import annotations

from . import ops
from .config import NCSNConfig
from .model import NCSN
from .networks import ScoreCNN, ScoreMLP
from .ops import set_backend, use_backend

__version__ = "0.1.0"

__all__ = [
    "NCSN",
    "NCSNConfig",
    "ScoreCNN",
    "ScoreMLP",
    "__version__",
    "ops",
    "set_backend",
    "use_backend",
]
