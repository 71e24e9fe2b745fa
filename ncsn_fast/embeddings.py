"""How a network is told a noise level that is a number: sigma as a vector of sines and cosines.

Belongs here: embeddings without parameters. Does not belong here: what a network learns of them
(``models/small.py``), the tables of levels by label (``models/layers.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checks import positive_int

# Periods of log sigma, from well beyond any ladder (64: a factor of 10^28) down to a factor of 1.65 in sigma.
LONGEST, SHORTEST = 64.0, 0.5


class SigmaEmbedding(nn.Module):
    r"""Sines and cosines of :math:`\log \sigma`, with periods spaced geometrically from 64 to 0.5.

    Of the logarithm, as ladders are geometric: of sigma itself, all small levels would look the same.

    Args:
        width: of the vector, an even number of at least 4.
        device, dtype: as of PyTorch's layers.

    Shape:
        sigma ``(N,)``, positive -> ``(N, width)``.
    """

    def __init__(
        self,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if positive_int("width", width) < 4 or width % 2:
            raise ValueError(f"width must be an even number of at least 4, got {width}")
        ends = math.log2(LONGEST), math.log2(SHORTEST)
        # On the CPU, for equal numbers everywhere, in a type that they can be computed in.
        plain = {"dtype": torch.float32, "device": "cpu"}
        frequencies = 2 * math.pi / torch.logspace(*ends, width // 2, base=2.0, **plain)
        made = torch.get_default_device() if device is None else device
        frequencies = frequencies.to(made, dtype or torch.get_default_dtype())
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma.log().unsqueeze(1) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)
