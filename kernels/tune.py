"""``python -m ncsn_fast.kernels.tune``: measures tile sizes of the norm on this GPU, for the table of ``tuned.py``.

Optional: without it the heuristics of ``planes.py`` hold. It changes speed alone; results stay within their tolerances.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton

from . import planes, tuned
from .cond_instance_norm_elu import cond_instance_norm_elu
from .cond_instance_norm_elu_backward import cond_instance_norm_elu_backward
from .planes import Tile

BATCH = 256
CHANNELS = (128,)
SIZES = {True: (32, 64), False: (8, 16, 32, 64, 128)}  # of images: quick, or all
DTYPES = (torch.bfloat16, torch.float32)


class Tuned(NamedTuple):
    """The seconds of all tiles that were tried, and the best."""

    best: Tile
    seconds: dict[Tile, float]


def candidates(
    kernel: str, channels: int, spatial: int, last: bool, dtype: torch.dtype
) -> Iterator[Tile]:
    """The heuristic's tile, and those that are half and twice as large in any way."""
    base = planes.tile_by_aim(kernel, channels, spatial, last)
    most, length = triton.next_power_of_2(channels), triton.next_power_of_2(spatial)
    fewest = min(most, planes.AIMS[kernel, last].fewest_planes)
    for p in (base.planes // 2, base.planes, base.planes * 2):
        for s in (base.positions // 2, base.positions, base.positions * 2):
            for w in (base.warps // 2, base.warps, base.warps * 2):
                elements_of_thread = p * s / (32 * w) if w else 0
                if (
                    fewest <= p <= most
                    and 1 <= s <= length
                    and w <= 32
                    and 4 <= elements_of_thread <= 64
                ):
                    yield Tile(p, s, w)


def calls(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str
) -> dict[str, Callable[[], object]]:
    """What is timed for each kernel of ``planes.AIMS`` that has tiles of its own."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=layout).normal_()
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    weight = torch.randn(1, 2 * shape[1], device=device)
    mean, rstd = (torch.ones(shape[:2], device=device) for _ in range(2))
    return {
        "norm": lambda: cond_instance_norm_elu(x, labels, weight, 1e-5, True),
        "gradient": lambda: cond_instance_norm_elu_backward(x, x, labels, weight, mean, rstd, True),
    }


def on_gpu(call: Callable[[], object]) -> float:
    """Median seconds of a call, the caches flushed."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1e3


def tune(
    kernel: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    last: bool,
    clock: Callable[[Callable[[], object]], float] = on_gpu,
    device: str = "cuda",
) -> Tuned:
    """Times the tiles of ``"norm"`` or ``"gradient"`` for a shape, and saves the fastest."""
    channels, spatial = shape[1], shape[2] * shape[3]
    call = calls(shape, dtype, last, device)[kernel]
    entry = tuned.key(kernel, channels, spatial, last, dtype)
    seconds = {}
    for tile in candidates(kernel, channels, spatial, last, dtype):
        with tuned.trial(entry, list(tile)):
            seconds[tile] = clock(call)
    best = min(seconds, key=seconds.__getitem__)
    tuned.save({entry: list(best)})
    return Tuned(best, seconds)


def main(arguments: list[str] | None = None) -> int:
    """Tunes the shapes of the network, prints what it found, and says where it is kept."""
    parser = argparse.ArgumentParser(prog="python -m ncsn_fast.kernels.tune", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the default network's shapes alone")
    quick = parser.parse_args(arguments).quick
    if not torch.cuda.is_available():
        print("tuning needs a GPU that torch can see", file=sys.stderr)
        return 1
    for size in SIZES[quick]:
        for channels in CHANNELS:
            for dtype in DTYPES:
                for last in (False, True):
                    for kernel in ("norm", "gradient"):
                        shape = (BATCH, channels, size, size)
                        found = tune(kernel, shape, dtype, last=last)
                        base = planes.tile_by_aim(kernel, channels, size * size, last)
                        gain = found.seconds[base] / found.seconds[found.best]
                        entry = tuned.key(kernel, channels, size * size, last, dtype)
                        print(
                            f"{entry}: {tuple(found.best)}, {gain:.2f}x of {tuple(base)}",
                            flush=True,
                        )
    print(f"kept in {tuned.path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
