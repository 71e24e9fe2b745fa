"""Samplers of the authors' programs where they do something else than this project's.

Belongs here: what the 2019 program leaves out at the end, its inpainting, the interpolation of the 2020 program. Does
not belong here: their annealed Langevin dynamics itself, which is :func:`~ncsn_fast.sampling.annealed_langevin` with
the same ``step_lr`` and without ``clip``; their inpainting of 2020, which is the same with ``known`` and ``mask``.

All take a score of data in the network's own units, [0, 1] for the published networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..checks import positive_int, positive_number
from ..schedules import check_sigmas
from ..streams import KNOWN_NOISE_STEPS, STREAM_LANGEVIN, STREAM_ROTATION
from .defaults import N_STEPS_EACH, STEP_LR
from .engine import ScoreError
from .langevin import annealed_langevin
from .start import draw_seed

Score = Callable[[Tensor, int], Tensor]


def annealed_langevin_2019(
    score: Score,
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int = N_STEPS_EACH,
    step_lr: float = STEP_LR,
    seed: int | None = None,
    sample_offset: int = 0,
    verbose: bool = False,
    callback: Callable[[int, Tensor], object] | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """What the 2019 program returns: the state before its last update, clamped to [0, 1].

    That program records each state before it is updated, and so never shows the result of the last update. The chain
    is that of :func:`~ncsn_fast.sampling.annealed_langevin`, which returns that result.

    Args:
        score, sigmas, n_steps_each, step_lr, seed, sample_offset, verbose, callback, cuda_graph: as in
            :func:`~ncsn_fast.sampling.annealed_langevin`.
        init: where the chains start, ``(N, ...)``; U(0, 1) in that program.

    Returns:
        As :func:`~ncsn_fast.sampling.annealed_langevin`.

    Raises:
        Those of :func:`~ncsn_fast.sampling.annealed_langevin`.

    Reference: Song & Ermon, 2019, `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_, algorithm 1.
    """
    updates = positive_int("n_steps_each", n_steps_each) * len(sigmas)
    _, states = annealed_langevin(
        score,
        init,
        sigmas,
        n_steps_each=n_steps_each,
        step_lr=step_lr,
        seed=seed,
        sample_offset=sample_offset,
        verbose=verbose,
        callback=callback,
        return_intermediates=max(1, updates - 1),
        cuda_graph=cuda_graph,
    )
    last = states[0] if updates > 1 else init.detach().float()
    return last.clamp(0, 1)


@torch.no_grad()
def inpaint_2019(
    score: Score,
    init: Tensor,
    known: Tensor,
    mask: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int = N_STEPS_EACH,
    step_lr: float = STEP_LR,
    seed: int | None = None,
    sample_offset: int = 0,
    verbose: bool = False,
) -> Tensor:
    """Inpainting as in the 2019 program: the known region has one noise at each level, not one at each step.

    Like that program it leaves out the last update, clamps to [0, 1], and leaves the last level's noise in the known
    region. :func:`~ncsn_fast.sampling.annealed_langevin` with ``known`` and ``mask``, which draws the noise anew
    before every step, ends with all updates and the known values themselves.

    Args:
        score, sigmas, n_steps_each, step_lr, seed, sample_offset, verbose: as in
            :func:`~ncsn_fast.sampling.annealed_langevin`.
        init: where the chains start, ``(N, ...)``; to draw several for one image, ``known.repeat_interleave(k, 0)``.
        known: values of the known region, of the shape of ``init``, or one that broadcasts to it.
        mask: bool, True where ``known`` is known; broadcasts too. In that program, the left half.

    Returns:
        float32 tensor of the shape and on the device of ``init``.

    Raises:
        TypeError: ``mask`` is not bool.
        Those of :func:`~ncsn_fast.sampling.annealed_langevin`.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where the values are known, got {mask.dtype}")
    seed = draw_seed() if seed is None else seed

    def with_known(x: Tensor, level: int) -> Tensor:
        z = ops.philox_normal(
            x.shape,
            seed=seed,
            sample_offset=sample_offset,
            stream=STREAM_LANGEVIN,
            step=KNOWN_NOISE_STEPS + level * n_steps_each,
            device=x.device,
        )
        return torch.where(mask, known + float(sigmas[level]) * z, x)

    # What the chain itself does in the known region does not matter: the score never sees it.
    x = annealed_langevin_2019(
        lambda x, level: score(with_known(x, level), level),
        init,
        sigmas,
        n_steps_each=n_steps_each,
        step_lr=step_lr,
        seed=seed,
        sample_offset=sample_offset,
        verbose=verbose,
    )
    return with_known(x, len(sigmas) - 1).clamp(0, 1)


@torch.no_grad()
def interpolate(
    score: Score,
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_interpolations: int,
    n_steps_each: int = 5,
    step_lr: float,
    seed: int | None = None,
    sample_offset: int = 0,
) -> Tensor:
    r"""Annealed Langevin dynamics along an arc from one noise to another, as in the 2020 program.

    Row r of the result starts n times from the same image. At every step two noises p and q are drawn for the row, and
    its image i gets

    .. math:: z_i = \cos(\varphi_i)\, p + \sin(\varphi_i)\, q, \qquad \varphi_i = \frac{\pi}{2} \frac{i}{n - 1}

    which is standard normal too. The first image of row r is sample r of :func:`~ncsn_fast.sampling.annealed_langevin`
    with the same seed. There is no denoising step.

    Args:
        score, sigmas, n_steps_each, step_lr, seed: as in :func:`~ncsn_fast.sampling.annealed_langevin`.
        init: where the chains start, ``(R, ...)``, one for each row.
        n_interpolations: images in a row, n.
        sample_offset: number of the first row in the noise stream.

    Returns:
        float32 tensor ``(R * n, ...)`` on the device of ``init``, row after row.

    Raises:
        ValueError: ``n_interpolations`` or ``n_steps_each`` below 1, ``step_lr`` not positive and finite, a ladder
            that does not descend.
        ScoreError: the score was NaN or infinite; looked at once, at the end.

    Reference: Song & Ermon, 2020, `arXiv:2006.09011 <https://arxiv.org/abs/2006.09011>`_, appendix B.
    """
    n = positive_int("n_interpolations", n_interpolations)
    steps = positive_int("n_steps_each", n_steps_each)
    step_lr = positive_number("step_lr", step_lr)
    check_sigmas(sigmas, len(sigmas))
    noise = {
        "seed": draw_seed() if seed is None else seed,
        "sample_offset": sample_offset,
        "device": init.device,
    }
    angles = torch.linspace(0, math.pi / 2, n, device=init.device).view(n, *(1,) * (init.dim() - 1))
    cos, sin = angles.cos(), angles.sin()
    x = init.detach().to(torch.float32).repeat_interleave(n, dim=0)
    for level, sigma in enumerate(sigmas):
        eta = step_lr * (float(sigma) / float(sigmas[-1])) ** 2
        for step in range(level * steps, (level + 1) * steps):
            s = score(x, level)
            p = ops.philox_normal(init.shape, stream=STREAM_LANGEVIN, step=step, **noise)
            q = ops.philox_normal(init.shape, stream=STREAM_ROTATION, step=step, **noise)
            z = cos * p.unsqueeze(1) + sin * q.unsqueeze(1)
            ops.langevin_step_(x, s, eta, noise=z.flatten(0, 1))
    if not bool(x.isfinite().all()):
        raise ScoreError("the interpolation led to NaN or infinity: the score is broken")
    return x
