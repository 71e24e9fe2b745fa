"""Where an element lies and on which device a kernel runs: what the operators' files share."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl


@triton.jit
def offset_of(sample, channel, position, channels, spatial, CHANNELS_LAST: tl.constexpr):
    """An element's offset in a contiguous or in a channels_last tensor."""
    if CHANNELS_LAST:
        return (sample * spatial + position) * channels + channel
    return (sample * channels + channel) * spatial + position


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of x the current one: Triton launches on that, whatever its arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def in_layout_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` with the layout of ``like``, which is contiguous or channels_last; itself if it has it."""
    if like.is_contiguous():
        return x.contiguous()
    last = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last)
