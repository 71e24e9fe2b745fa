"""TF32, the matrix units' 19-bit floats: off for float32, or on, for as long as a block runs; which cases run in it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .suite import Case

# cuDNN takes TF32 for float32 convolutions unless it is told not to; matrix products do not.
_OPERATORS = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 in convolutions and matrix products on CUDA devices; afterwards all is as it was.

    PyTorch has two sets of settings, parts of it read one, parts the other, and some raise an error where they
    contradict each other: both are set.

    Args:
        allowed: whether float32 may be computed in TF32.
    """
    with _without_warnings():
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        precisions = [operator.fp32_precision for operator in _OPERATORS]
    _set((allowed, allowed), ["tf32" if allowed else "ieee"] * len(_OPERATORS))
    try:
        yield
    finally:
        _set(flags, precisions)


def _set(flags: tuple[bool, bool], precisions: list[str]) -> None:
    with _without_warnings():
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags
        for operator, precision in zip(_OPERATORS, precisions, strict=True):
            operator.fp32_precision = precision


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The older settings are deprecated from PyTorch 2.9 on, but still read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# TF32 keeps as many digits as float16. The factor is the one between a network's tolerances for float32 and float16;
# gradients, whose tolerance is wider, stay far below the 1 of a mistake.
FACTOR, MOST = 200, 0.2


def in_tf32(case: Case, device: torch.device) -> tuple[Case, ...]:
    """On a CUDA device, the case in TF32 if it is one of float32 whose limit is arithmetic; else none."""
    if device.type != "cuda" or case.dtype != torch.float32 or not case.flops:
        return ()
    tolerance = max(case.tolerance, min(FACTOR * case.tolerance, MOST))
    return (dataclasses.replace(case, tf32=True, tolerance=tolerance),)
