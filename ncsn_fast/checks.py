"""Checks of plain numbers, shared by every function that takes some.

Belongs here: a check used in several modules, with an error that names the argument. Does not
belong here: checks of tensors, which stand where the tensors are used.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence


def positive_int(name: str, value: object) -> int:
    """``value`` as an int >= 1: TypeError if it is no int (a bool is none), ValueError if below."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int >= 1, got {value!r} of type {type(value).__name__}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be an int >= 1, got {number}")
    return number


def positive_number(name: str, value: object) -> float:
    """``value`` as a positive, finite float: TypeError if it is no number, ValueError otherwise."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {number:g}")
    return number


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """``image_size``, an int or a pair of ints, as a height and a width."""
    if not isinstance(image_size, Sequence):
        size = positive_int("image_size", image_size)
        return size, size
    if len(image_size) != 2:
        raise ValueError(f"image_size must be an int or (height, width), got {image_size!r}")
    height, width = (positive_int("image_size", side) for side in image_size)
    return height, width
