"""Annealed Langevin dynamics: from noise to samples, given only a score function.

Belongs here: samplers as short functions over ``score(x, level)``, and the random numbers they
start from. Does not belong here: networks (any function will do), and the arithmetic of one step
(``ops.langevin_step_``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from . import ops
from .checks import positive_int, positive_number

INIT_DISTS = ("uniform", "normal")


@torch.no_grad()
def annealed_langevin(
    score: Callable[[Tensor, int], Tensor],
    init: Tensor,
    sigmas: Sequence[float],
    *,
    n_steps_each: int = 100,
    step_lr: float = 2e-5,
    clip: float | None = None,
    denoise: bool = False,
    seed: int | None = None,
    sample_offset: int = 0,
    verbose: bool = False,
    callback: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    r"""Annealed Langevin dynamics (Song & Ermon, 2019, algorithm 1).

    For each level :math:`i`, ``n_steps_each`` times, with :math:`z \sim N(0, I)`:

    .. math::
        \eta_i = \text{step\_lr} \cdot (\sigma_i / \sigma_K)^2, \qquad
        x \leftarrow x + \eta_i\, s(x, i) + \sqrt{2 \eta_i}\, z

    The paper writes :math:`\alpha_i / 2` and :math:`\sqrt{\alpha_i}`: its step size is twice this
    :math:`\eta_i`.

    Args:
        score: ``score(x, level)`` gives the score at ``x`` (float32) for level ``0 <= level < K``,
            in the shape of ``x`` and any floating dtype.
        init: where the chains start, ``(N, ...)``; it is not modified.
        sigmas: the ladder, K positive Python floats, largest first.
        n_steps_each: steps at each level.
        step_lr: step size at the last level, in squared units of the data.
        clip: clamp to ``[-clip, clip]`` after every step; ``None`` for no clamping.
        denoise: end with :math:`x \leftarrow x + \sigma_K^2\, s(x, K-1)` without noise (and clamp,
            with ``clip``): by Tweedie's formula, the expected clean image.
        seed: of the noise, ``0 <= seed < 2**64``. ``None``: drawn from torch's default CPU
            generator, so that ``torch.manual_seed`` governs.
        sample_offset: number of the first sample in the noise stream. Sample ``i`` of a seed has
            the same noise whatever the batch, so ``sample_offset`` continues a set of samples, here
            or in another process.
        verbose: show a progress bar with the level's sigma.
        callback: called as ``callback(level, x)`` after each level, with a copy of the state.

    Returns:
        float32 tensor of the shape and on the device of ``init``, contiguous, without gradient.

    Raises:
        ValueError: ``n_steps_each < 1``, or ``step_lr`` not positive and finite.

    Reference: `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_.
    """
    n_steps_each = positive_int("n_steps_each", n_steps_each)
    step_lr = positive_number("step_lr", step_lr)
    seed = draw_seed() if seed is None else seed
    noise = {"seed": seed, "sample_offset": sample_offset}
    # Plain numbers, known before the first step: nothing in the loop waits for the device.
    step_sizes = [step_lr * (sigma / sigmas[-1]) ** 2 for sigma in sigmas]

    x = init.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    step = 0
    n_steps = len(sigmas) * n_steps_each
    with tqdm(total=n_steps, desc="sampling", unit="step", disable=not verbose) as bar:
        for level, step_size in enumerate(step_sizes):
            bar.set_postfix(sigma=f"{sigmas[level]:.4g}")
            for _ in range(n_steps_each):
                ops.langevin_step_(x, score(x, level), step_size, step=step, clip=clip, **noise)
                step += 1
                bar.update()
            if callback is not None:
                callback(level, x.clone())
    if denoise:
        x.add_(score(x, len(sigmas) - 1), alpha=sigmas[-1] ** 2)
        if clip is not None:
            x.clamp_(-clip, clip)
    return x


def initial_state(
    shape: Sequence[int],
    init_dist: str = "uniform",
    *,
    seed: int,
    sample_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Where chains start, from the noise stream: float32, U(-1, 1) or N(0, 1).

    Args:
        shape: of the state, the sample first.
        init_dist: ``"uniform"`` or ``"normal"``.
        seed: ``0 <= seed < 2**64``.
        sample_offset: number of the first sample in the noise stream.
        device: where to make it.

    Raises:
        ValueError: an unknown ``init_dist``.
    """
    if init_dist not in INIT_DISTS:
        raise ValueError(f"init_dist must be one of {INIT_DISTS}, got {init_dist!r}")
    draw = ops.philox_uniform if init_dist == "uniform" else ops.philox_normal
    x = draw(shape, seed=seed, sample_offset=sample_offset, stream=ops.STREAM_INIT, device=device)
    return 2 * x - 1 if init_dist == "uniform" else x


def check_init(init: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A start that a caller gave, of the right shape and kind."""
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a tensor, got {type(init).__name__}")
    if not init.is_floating_point():
        raise TypeError(f"init must be floating point, got {init.dtype}")
    if tuple(init.shape) != shape:
        raise ValueError(f"init must have shape {shape}, got {tuple(init.shape)}")
    return init


def draw_seed() -> int:
    """A seed from torch's default CPU generator: ``torch.manual_seed`` governs, no device waits."""
    return int(torch.randint(2**63 - 1, (1,), device="cpu"))
