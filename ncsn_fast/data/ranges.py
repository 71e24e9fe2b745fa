"""The range of data: what a network expects, and what is said about data in another.

Belongs here: the look at the values of data before they are trained on. Does not belong here: scaling them, which is
the reader's business (``data/images.py``) or the user's.

A network says what it expects by an attribute ``data_range``, ``(lowest, highest)``; ``None``, or no such attribute:
any values, such as those of points.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..ops.transforms import values_are_real

IMAGE_RANGE = (-1.0, 1.0)
# Standard normal data, with which a network may be tried, never come near it; bytes do at once.
LARGE = 10.0
ROUNDING = 1e-4  # of the range's width
DARK = 1 / 8  # of the range: images whose brightest value lies below use a scale that is not theirs

Range = tuple[float, float]


class DataRangeWarning(UserWarning):
    """Data look as if they had another range than the network expects; the message says how to convert them."""


def check_range(
    data: Tensor, expected: Range | None, what: str = "the data", *, scaled: bool = False
) -> None:
    """Look at a whole data set: refuse what cannot be right, warn of what looks wrong. Waits for the device.

    Args:
        data: ``(N, ...)``, not empty.
        expected: the range of the values; ``None`` for any that are finite.
        what: the data, for the message.
        scaled: a reader has brought them into the range, so that bright ones are not taken for values in [0, 1].

    Raises:
        ValueError: not floating point, not finite, or outside the range by more than rounding.

    Warns:
        DataRangeWarning: all values are in [0, 1] where [-1, 1] is expected (as of masks, or of images that were
            divided by 255), or in the lowest eighth of the range (as of masks read as bytes, or of 12 bits as 16).
    """
    if not data.is_floating_point():
        raise ValueError(f"{what} must be floating point, got {data.dtype}{byte_hint(data.dtype)}")
    low, high = _ends(data)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} must be finite, got values from {low:g} to {high:g}")
    if expected is None:
        return
    bottom, top = expected
    width = top - bottom
    slack = width * max(ROUNDING, torch.finfo(data.dtype).eps)
    guess = _guess(low, high, expected)
    if low < bottom - slack or high > top + slack:
        raise ValueError(
            f"{what} must be in [{bottom:g}, {top:g}], got {low:g} to {high:g}"
            + (f"; {guess}" if guess else "")
        )
    if guess and not scaled:
        _warn(low, high, expected, guess)
    elif high < bottom + DARK * width:
        _warn(low, high, expected, "were they scaled as if they had more bits than they have?")


def hint_range(model: torch.nn.Module, x: Tensor) -> None:
    """Look at the first batch that a network gets: warn of what looks like another range.

    Only once for each network, so that no step but the first waits for a GPU; and never where a look is not possible:
    in a compiled or exported graph, inside a ``torch.func`` transform, while a CUDA graph is captured.

    Warns:
        DataRangeWarning: all values in [0, 1] where [-1, 1] is expected, or one above 10 in magnitude.
    """
    if torch.compiler.is_compiling() or getattr(model, "_data_seen", False):
        return
    expected = getattr(model, "data_range", None)
    if expected is None or not x.numel() or not _can_look(x):
        return
    no_more_hints(model)
    low, high = _ends(x)
    guess = _guess(low, high, expected)
    if guess:
        _warn(low, high, expected, guess)


def no_more_hints(model: torch.nn.Module) -> None:
    """For a network whose data have been looked at as a whole: a single batch of them would say less."""
    model._data_seen = True


def to_image_range(images: Tensor, given: Range) -> Tensor:
    """Images in another range as values in [-1, 1], clamped, as files and pictures are made of."""
    low, high = given
    images = images.clamp(low, high)
    if given == IMAGE_RANGE:
        return images
    return (images - low) * (2 / (high - low)) - 1


def from_image_range(images: Tensor, wanted: Range) -> Tensor:
    """Images in [-1, 1], as files give them, in the range of a network's data."""
    if wanted == IMAGE_RANGE:
        return images
    low, high = wanted
    return (images + 1) * ((high - low) / 2) + low


def byte_hint(dtype: torch.dtype, expected: Range | None = IMAGE_RANGE) -> str:
    """How bytes become what a network expects, as the end of a message; empty for other dtypes."""
    if dtype != torch.uint8 or expected is None:
        return ""
    return f"; bytes become data in [{expected[0]:g}, {expected[1]:g}] by {_convert((0, 255), expected, 'x.float()')}"


def _ends(data: Tensor) -> Range:
    low, high = data.detach().aminmax()
    return low.item(), high.item()


def _guess(low: float, high: float, expected: Range) -> str:
    """Which range the values seem to have instead, and how they are converted; empty if they may be right."""
    if max(-low, high) > LARGE:
        other = (0.0, 255.0)
    elif expected[0] < 0 <= low < high <= 1:
        other = (0.0, 1.0)
    elif expected[0] >= 0 and -1 <= low < 0 <= high <= 1:
        other = (-1.0, 1.0)
    else:
        return ""
    return f"if they are in [{other[0]:g}, {other[1]:g}], convert them: {_convert(other, expected)}"


def _convert(given: Range, wanted: Range, x: str = "x") -> str:
    scale = (wanted[1] - wanted[0]) / (given[1] - given[0])
    shift = wanted[0] - given[0] * scale
    scaled = f"{x} * {scale:g}" if scale > 1 else f"{x} / {1 / scale:g}"
    return scaled if shift == 0 else f"{scaled} {'-' if shift < 0 else '+'} {abs(shift):g}"


def _can_look(x: Tensor) -> bool:
    if x.device.type not in ("cpu", "cuda") or not values_are_real(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _warn(low: float, high: float, expected: Range, hint: str) -> None:
    warnings.warn(
        f"the network expects data in [{expected[0]:g}, {expected[1]:g}], and these are all in "
        f"[{low:g}, {high:g}]: {hint}",
        DataRangeWarning,
        stacklevel=4,  # the caller of load_images, train or get_loss
    )
