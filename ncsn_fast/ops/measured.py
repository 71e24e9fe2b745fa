"""What was measured on this machine and decides between algorithms; without measurements the default ones hold."""

from __future__ import annotations

import importlib

import torch

from . import extension


@extension.constant
def gemm_has_won(channels: int, spatial: int, dilation: int, dtype: torch.dtype) -> bool:
    """Whether the Triton convolution was the faster one at every batch that ``ncsn_fast.kernels.tune`` timed.

    Of one sample's shape, so that a sample's result does not depend on its batch.
    """
    if not torch.cuda.is_available() or extension.status("triton") is not None:
        return False
    tuned = importlib.import_module("ncsn_fast.kernels.tuned")
    return tuned.tile(tuned.conv_key(channels, spatial, dilation, dtype)) == [1]
