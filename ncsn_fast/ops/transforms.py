"""What is around a call that kernels know nothing of: transforms, and recorders that carry a graph elsewhere.

Belongs here: the questions, from facts of PyTorch alone. Does not belong here: which backend serves then
(``dispatch.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .extension import constant

TENSORS = (Tensor, torch.nn.Parameter)  # subclasses may compute in a way of their own


@constant  # torch.compile guards on the transforms around a call by itself
def _in_functorch() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


@constant
def being_written_down() -> bool:
    """Whether the calls are recorded into a graph for elsewhere: torch.export, ONNX, torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def transform() -> str | None:
    """Why only the reference serves now: a transform around the call, which kernels know nothing of; None without one.

    A kernel would drop tangents in silence, and cannot see through batched tensors.
    """
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation goes through the reference alone"
    if _in_functorch():
        return (
            "a transform of torch.func (grad, vjp, jvp, vmap, ...) goes through the reference alone"
        )
    return None


def values_are_at_hand(x: Tensor) -> bool:
    """Whether Python can read the values of ``x`` without a wait: on the CPU, and neither traced nor transformed."""
    return x.device.type == "cpu" and values_are_real(x)


def values_are_real(x: Tensor) -> bool:
    """Whether Python can read the values of ``x``, if need be after a wait: it is neither traced nor transformed."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in TENSORS
        and transform() is None
        and not being_written_down()
        and torch._C._len_torch_dispatch_stack() == 0
    )
