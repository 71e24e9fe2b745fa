"""The settings with which the authors drew samples, for a preset or a network.

Belongs here: from a network to the preset whose ladder it has. Does not belong here: the presets (``presets/``), how
they are read (``config.py``).
"""

from __future__ import annotations

from typing import Any

import torch

from ..models.base import ScoreModel
from ..schedules import make_sigmas
from .presets import preset_names, read_preset

SAME_SIGMA = 1e-5  # relative; ladders computed with other rounding are the same ladder


def official_settings(source: str | ScoreModel) -> dict[str, Any]:
    """The options of ``sample`` that the papers' configurations have.

    Args:
        source: name of a preset; or a network of the authors' with a published ladder.

    Returns:
        ``n_steps_each``, ``step_lr``, ``denoise``, ``init_dist`` and ``clip``.

    Raises:
        ValueError: no such preset, or one without settings for sampling; a network with another ladder.

    Example::

        >>> official_settings("ncsnv2-cifar10")["step_lr"]
        6.2e-06
    """
    if isinstance(source, str):
        sampling = read_preset(source).get("sampling")
        if sampling is None:
            raise ValueError(f"preset {source!r} has no settings for sampling")
        return dict(sampling)
    for name in preset_names():
        preset = read_preset(name)
        if "sampling" in preset and _is_of(preset, source):
            return dict(preset["sampling"])
    raise ValueError(
        f"the {len(source.sigmas)} noise levels of this {type(source).__name__} are of no published settings: give "
        "n_steps_each, step_lr and denoise yourself"
    )


def _is_of(preset: dict[str, Any], model: ScoreModel) -> bool:
    sigmas = model.sigmas.detach().cpu()
    if preset["network"] != type(model).__name__.lower() or preset["num_classes"] != len(sigmas):
        return False
    ladder = make_sigmas(preset["sigma_begin"], preset["sigma_end"], preset["num_classes"])
    return torch.allclose(ladder, sigmas, rtol=SAME_SIGMA, atol=0)
