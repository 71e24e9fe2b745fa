"""The settings with which the authors drew samples, for a preset or a network.

Belongs here: from a network to the preset whose ladder it has. Does not belong here: the presets (``presets/``), how
they are read (``config.py``).
"""

from __future__ import annotations

from typing import Any

import torch

from ..models.base import ScoreModel
from ..schedules import make_sigmas
from .presets import preset_names, read_few_passes, read_preset

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
    name = source if isinstance(source, str) else _preset_of(source)
    if name is None:
        raise ValueError(
            f"the {len(source.sigmas)} noise levels of this {type(source).__name__} are of no published settings: give "
            "n_steps_each, step_lr and denoise yourself"
        )
    sampling = read_preset(name).get("sampling")
    if sampling is None:
        raise ValueError(f"preset {name!r} has no settings for sampling")
    return dict(sampling)


def few_pass_settings(source: str | ScoreModel) -> dict[str, Any]:
    """Options of ``sample`` for few passes of a published network: not the authors' sampler.

    How good its samples are was not measured on these networks; ``ncsn-fast tune`` does where network and data are at
    hand.

    Args:
        source: name of a preset; or a network of the authors' with a published ladder.

    Returns:
        ``sampler``, ``passes`` and ``levels``.

    Raises:
        ValueError: no such preset, or one without such a setting; a network with another ladder.

    Example::

        >>> few_pass_settings("ncsnv2-cifar10")["passes"]
        50
    """
    name = source if isinstance(source, str) else _preset_of(source)
    found = {} if name is None else read_few_passes(name)
    if not found:
        what = f"preset {name!r}" if name else f"this {type(source).__name__}'s ladder"
        raise ValueError(f'{what} has no setting for few passes: sampler="auto" chooses one')
    return found


def _preset_of(model: ScoreModel) -> str | None:
    """The preset with settings for sampling whose ladder a network has."""
    for name in preset_names():
        preset = read_preset(name)
        if "sampling" in preset and _is_of(preset, model):
            return name
    return None


def _is_of(preset: dict[str, Any], model: ScoreModel) -> bool:
    sigmas = model.sigmas.detach().cpu()
    if preset["network"] != type(model).__name__.lower() or preset["num_classes"] != len(sigmas):
        return False
    ladder = make_sigmas(preset["sigma_begin"], preset["sigma_end"], preset["num_classes"])
    return torch.allclose(ladder, sigmas, rtol=SAME_SIGMA, atol=0)
