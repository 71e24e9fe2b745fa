"""``python -m ncsn_fast.kernels.tune``: measures this GPU, for the table of ``tuned.py``.

Tile sizes of the norm and of the convolution, and for which images the latter beats PyTorch's.

Optional: without it the heuristics of ``planes.py`` hold. It changes speed alone; results stay within their tolerances.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from . import planes, tuned
from .cond_instance_norm_elu import cond_instance_norm_elu
from .cond_instance_norm_elu_backward import cond_instance_norm_elu_backward
from .conv3x3 import LARGE, SMALL, ConvTile, conv_direct
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


class Convolution(NamedTuple):
    """The fastest tile of the convolution, and the seconds of it and of PyTorch's by batch."""

    best: ConvTile
    seconds: dict[int, tuple[float, float]]


def tune_convolution(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dilation: int,
    *,
    batches: tuple[int, ...] = (1, BATCH),
    clock: Callable[[Callable[[], object]], float] = on_gpu,
    device: str = "cuda",
) -> Convolution:
    """Times tiles of ``conv3x3`` for images ``(C, H, W)``, and the best beside PyTorch's; saves both answers.

    It has won if it is the faster one at every batch: the choice must not depend on it.
    """
    channels, spatial = shape[0], shape[1] * shape[2]
    weight = torch.empty(channels, channels, 3, 3, dtype=dtype, device=device)
    weight = weight.normal_().contiguous(memory_format=torch.channels_last)
    entry = tuned.key(f"conv to {channels}", channels, spatial, True, dtype)
    inputs = {
        n: torch.empty(n, *shape, dtype=dtype, device=device)
        .normal_()
        .contiguous(memory_format=torch.channels_last)
        for n in batches
    }

    def ours(n: int) -> float:
        return clock(lambda: conv_direct(inputs[n], weight, None, None, dilation, False))

    totals = {}
    for tile in (SMALL, ConvTile(128, 64, 64, 4, 4), ConvTile(64, 128, 64, 4, 4), LARGE):
        if tile.outputs <= max(64, channels) and tile.positions <= max(64, spatial):
            with tuned.trial(entry, list(tile)):
                totals[tile] = {n: ours(n) for n in batches}
    best = min(totals, key=lambda tile: sum(totals[tile][n] / n for n in batches))
    pad = {"padding": dilation, "dilation": dilation}
    theirs = {n: clock(lambda n=n: F.conv2d(inputs[n], weight, **pad)) for n in batches}
    won = all(totals[best][n] < theirs[n] for n in batches)
    answer = tuned.conv_key(channels, spatial, dilation, dtype)
    tuned.save({entry: list(best), answer: [int(won)]})
    return Convolution(best, {n: (totals[best][n], theirs[n]) for n in batches})


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
    for size, dilation in product(SIZES[quick], (1, 2, 4, 8)):
        for channels, dtype in product(CHANNELS, (torch.bfloat16, torch.float16)):
            timed = tune_convolution((channels, size, size), dtype, dilation)
            for n, (ours, theirs) in timed.seconds.items():
                case = f"conv {n}x{channels}x{size}x{size} dilation {dilation} {dtype}"
                print(f"{case}: {tuple(timed.best)}, {theirs / ours:.2f}x of PyTorch's", flush=True)
    print(f"kept in {tuned.path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
