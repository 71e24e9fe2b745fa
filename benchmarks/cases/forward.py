"""The network's forward pass, and how its cost grows with batch, resolution and width."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ncsn_fast.models.ncsn import NCSN

from .. import engines, plain_torch
from ..peers import Module
from ..suite import Case, Settings, tolerance_of

CHANNELS, CLASSES = 3, 10


def networks(nf: int) -> tuple[plain_torch.Network, NCSN]:
    """The documented network and ours, with the same weights."""
    torch.manual_seed(0)
    model = NCSN(in_channels=CHANNELS, nf=nf, num_classes=CLASSES)
    model.set_sigmas(NCSN.make_sigmas(50.0, 0.01, CLASSES))
    return plain_torch.network_like(model), model


def images(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, CHANNELS, size, size, generator=generator), torch.arange(n) % CLASSES


def forward_flops(n: int, nf: int, size: int) -> int:
    """Twice the multiplications of a pass."""
    return n * _flops_of_an_image(nf, size)


@functools.cache
def _flops_of_an_image(nf: int, size: int) -> int:
    """Counted by PyTorch, on tensors without data."""
    with torch.device("meta"):
        network = plain_torch.Network(CHANNELS, nf, CLASSES)
        image, label = torch.empty(1, CHANNELS, size, size), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, label)
    return counter.get_total_flops()


def case(settings: Settings, dtype: torch.dtype, n: int, nf: int, size: int, **peers) -> Case:
    work = Module(inputs=lambda: images(n, size), make=lambda: networks(nf))
    return Case(
        suite="model",
        group="network",
        name="forward",
        shape=(n, CHANNELS, size, size),
        dtype=dtype,
        setting=f"nf={nf}",
        peers=(
            *work.peers(settings, dtype, backward=False, **peers),
            *engines.peers(work, settings, dtype),
        ),
        expected=work.expected(dtype, backward=False, device=settings.device),
        tolerance=tolerance_of(dtype, network=True),
        flops=forward_flops(n, nf, size),
    )


def cases(settings: Settings) -> Iterator[Case]:
    on_cpu = settings.device.type == "cpu"
    batches = settings.batch_sizes(
        full=(1, 16) if on_cpu else (1, 16, 64, 256), quick=(1,) if on_cpu else (1, 64)
    )
    works = dict.fromkeys(
        (dtype, n, 128, 32) for dtype, n in product(settings.network_dtypes, batches)
    )
    # Compiling the whole network takes a minute: in one layout, which inductor is free to change.
    compiled = {work: ("channels_last",) for work in works}
    if not settings.quick:
        works |= dict.fromkeys((settings.dtypes[0], *size) for size in growth(settings))
    for work in works:
        yield case(settings, *work, compiled_layouts=compiled.get(work, ()))


def growth(settings: Settings) -> Iterator[tuple[int, int, int]]:
    """Batch, width and resolution, one at a time, from a network whose largest case ends in time."""
    nf = 32 if settings.device.type == "cpu" else 128
    for n in settings.batches or (1, 4, 16, 64, 256):
        yield n, nf, 16
    for size in (32, 64, 128):
        yield 1, nf, size
    for width in (32, 64, 128, 256):
        yield 1, width, 16
