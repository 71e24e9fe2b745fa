"""Checks of plain numbers, shared by every function that takes some.

Belongs here: a check used in several modules, with an error that names the argument. Does not
belong here: checks of tensors, which stand where the tensors are used.
"""

from __future__ import annotations

import math
import operator


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
