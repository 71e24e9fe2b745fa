"""Where a chain starts: its seed, and its first state from the noise stream or from the caller.

Belongs here: distributions to start from, checks of a given start. Does not belong here: what comes after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops

INIT_DISTS = ("uniform", "normal")


def draw_seed() -> int:
    """A seed from torch's default CPU generator: ``torch.manual_seed`` governs, no device waits."""
    return int(torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu"))


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
