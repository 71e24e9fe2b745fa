"""Samplers as short functions over a score, the loop they share, and the way from a network to samples by any of them.

Belongs here: the names that users import. Does not belong here: the loop (``engine.py``), the update rules
(``langevin.py``, ``solvers.py``), the probability-flow ODE (``ode.py``), which levels a solver takes (``levels.py``),
records of the samplers (``samplers.py``), the front door (``run.py``), samples as numbered files (``to_folder.py``);
networks, which call :func:`~ncsn_fast.sampling.run.draw`.
"""

from __future__ import annotations

from .engine import ScoreError
from .langevin import PREDICTORS, annealed_langevin, consistent_annealed, predictor_corrector
from .solvers import ancestral, dpmpp_2m, dpmpp_2m_sde, euler, heun
from .start import INIT_DISTS, check_init, draw_seed, initial_state

__all__ = [
    "INIT_DISTS",
    "PREDICTORS",
    "ScoreError",
    "ancestral",
    "annealed_langevin",
    "check_init",
    "consistent_annealed",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "draw_seed",
    "euler",
    "heun",
    "initial_state",
    "predictor_corrector",
]
