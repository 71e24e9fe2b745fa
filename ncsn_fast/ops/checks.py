"""Checks of the operators' arguments: what a caller got wrong, in words, before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import integer
from .algorithms import names_of
from .schema import PADDINGS

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype], like: Tensor | None = None
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {names_of(dtypes)}, got {names_of([value.dtype])}")
    if like is not None and value.device != like.device:
        raise RuntimeError(f"{name} must be on {like.device}, where x is, got {value.device}")


def check_shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(value.shape)}")


def check_images(x: Tensor) -> None:
    """Of an operator over images."""
    check_tensor("x", x, FLOATING)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must have shape (N, C, H, W) with C, H and W >= 1, got {tuple(x.shape)}"
        )


def check_norm(x: Tensor, labels: Tensor, weight: Tensor, name: str = "weight") -> None:
    """Of the norm's arguments."""
    check_tensor("x", x, FLOATING)
    if x.dim() < 3 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must have shape (N, C, *spatial) with C and every spatial size >= 1, got {tuple(x.shape)}"
        )
    n, channels = x.shape[:2]
    check_tensor("labels", labels, INTEGERS, like=x)
    if tuple(labels.shape) not in ((n,), (1,)):
        raise ValueError(f"labels must have shape ({n},) or (1,), got {tuple(labels.shape)}")
    check_tensor(name, weight, FLOATING, like=x)
    if weight.dim() != 2 or weight.shape[1] not in (2 * channels, 3 * channels):
        raise ValueError(
            f"{name} must have shape (K, {2 * channels}), gamma | beta, or (K, {3 * channels}), "
            f"gamma | alpha | beta, for x with {channels} channels, got {tuple(weight.shape)}"
        )
    if channels == 1 and weight.shape[1] == 3:
        raise ValueError(f"InstanceNorm++ ({name} of 3 columns) needs at least 2 channels, x has 1")


def as_int64(labels: Tensor) -> Tensor:
    """Labels as the operators take them."""
    return labels if labels.dtype == torch.int64 else labels.long()


def check_number(name: str, value: float, minimum: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} must be finite and >= {minimum:g}, got {value}")
    return float(value)


def check_integer(name: str, value: int, limit: int) -> int:
    value = integer(name, value)
    if not 0 <= value < limit:
        bits = limit.bit_length() - 1
        last = f"2**{bits} - 1" if bits > 30 else str(limit - 1)
        raise ValueError(f"{name} must be in 0 .. {last}, got {value}")
    return value


def check_seed(seed: int) -> int:
    """The seed as the signed integer that an operator takes."""
    seed = check_integer("seed", seed, 2**64)
    return seed if seed < 2**63 else seed - 2**64


def check_padding(padding: str) -> None:
    if padding not in tuple(PADDINGS):
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may share memory (an expanded tensor, say)."""
    axes = sorted(
        (stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1
    )
    reach = 0
    for stride, size in axes:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_writable(name: str, x: Tensor) -> None:
    """Of a tensor that is written in place."""
    if overlaps_itself(x):
        raise RuntimeError(
            f"{name} must not overlap itself, as it is written in place; got strides {tuple(x.stride())} for "
            f"shape {tuple(x.shape)}: use {name}.clone()"
        )


def check_counter(
    name: str, value: int | Tensor, limit: int, like: Tensor
) -> tuple[int, Tensor | None]:
    """A number below the limit; or 0 and the tensor of one int64 that a kernel reads it from."""
    if not isinstance(value, Tensor):
        return check_integer(name, value, limit), None
    check_tensor(name, value, (torch.int64,), like=like)
    check_one_element(name, value)
    return 0, value


def check_one_element(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")


def check_samples(sample_offset: int, n: int) -> int:
    sample_offset = check_integer("sample_offset", sample_offset, 2**32)
    if sample_offset + n > 2**32:
        raise ValueError(
            f"sample_offset + the number of samples must be at most 2**32, got {sample_offset} + {n}"
        )
    return sample_offset
