"""The network's layers: a block of residual units, chained residual pooling and fusion within a refine block."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn

from ncsn_fast.models import layers

from .. import plain_torch
from ..peers import Module
from ..suite import Case, Settings, tolerance_of

CLASSES = 10


class OneInput(nn.Module):
    """A refine block as a function of one image."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.block([x, x], y)


def pair(layer: str, channels: int) -> tuple[nn.Module, nn.Module]:
    """The layer in plain PyTorch and ours, with the same weights."""
    torch.manual_seed(0)
    if layer == "RCUBlock":
        plain = plain_torch.Units(channels, CLASSES)
        ours = layers.RCUBlock(channels, CLASSES)
    else:
        plain = OneInput(plain_torch.Refine(2, channels, CLASSES))
        ours = OneInput(layers.RefineBlock([channels, channels], channels, CLASSES))
    plain.load_state_dict(ours.state_dict())
    return plain, ours


def cases(settings: Settings) -> Iterator[Case]:
    channels, size = 128, 32
    batches = settings.batch_sizes(full=(8,), quick=(8,))
    names = ("RCUBlock",) if settings.quick else ("RCUBlock", "RefineBlock")
    for dtype, backward, layer, n in product(
        settings.network_dtypes, (False, True), names, batches
    ):
        work = Module(
            inputs=lambda n=n: (
                torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0)),
                torch.arange(n) % CLASSES,
            ),
            make=lambda layer=layer: pair(layer, channels),
        )
        convolutions = 4 if layer == "RCUBlock" else 18
        passes = 2 if backward else 1
        yield Case(
            suite="model",
            group=layer,
            name="backward" if backward else "forward",
            shape=(n, channels, size, size),
            dtype=dtype,
            peers=work.peers(settings, dtype, backward=backward),
            expected=work.expected(dtype, backward=backward, device=settings.device),
            tolerance=tolerance_of(dtype, backward=backward, network=True),
            flops=passes * convolutions * 2 * 9 * channels * channels * n * size * size,
        )
