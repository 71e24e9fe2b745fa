"""Checks of plain values, shared by every function and every configuration that takes some.

Belongs here: what counts as an integer, a number, a flag or a choice, with an error that names the argument. Does not
belong here: checks of tensors, which stand where the tensors are used.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """``value`` as a Python int, ``low <= value <= high`` where they are given.

    An integer is whatever ``operator.index`` takes, integers of NumPy and PyTorch too, but for booleans.

    Raises:
        TypeError: no integer.
        ValueError: out of the range.
    """
    span = "" if low is None else f" >= {low}" if high is None else f" in {low}..{high}"
    expected = f"{name} must be an int{span}"
    if type(value) is not int:
        if _is_bool(value):
            raise TypeError(f"{expected}, got {_shown(value)}")
        try:
            value = operator.index(value)
        except TypeError as error:
            raise TypeError(f"{expected}, got {_shown(value)}") from error
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{expected}, got {value}")
    return value


def positive_int(name: str, value: object) -> int:
    """``value`` as an int >= 1, see :func:`integer`."""
    return integer(name, value, 1)


def number(name: str, value: object) -> float:
    """``value`` as a finite float: TypeError if it is no number (a string or a bool is none), ValueError otherwise."""
    result = _float(name, value)
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, got {result:g}")
    return result


def positive_number(name: str, value: object) -> float:
    """``value`` as a positive, finite float, see :func:`number`."""
    result = _float(name, value)
    if not (math.isfinite(result) and result > 0):
        raise ValueError(f"{name} must be positive and finite, got {result:g}")
    return result


def boolean(name: str, value: object) -> bool:
    """``value`` as a bool, one of NumPy's too; TypeError otherwise: a string such as ``"false"`` would be true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {_shown(value)}")
    return bool(value)


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """``value``, one of the names that are known; ValueError otherwise."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {tuple(known)}, got {value!r}")
    return str(value)


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """``image_size``, an int or a pair of ints, as a height and a width."""
    if not isinstance(image_size, Sequence):
        size = positive_int("image_size", image_size)
        return size, size
    if len(image_size) != 2:
        raise ValueError(f"image_size must be an int or (height, width), got {image_size!r}")
    height, width = (positive_int("image_size", side) for side in image_size)
    return height, width


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two sets of named values, for an error message; empty if nothing does."""
    return "; ".join(
        f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    )


def _short(value: object) -> str:
    if (
        isinstance(value, tuple) and len(value) > 2 and isinstance(value[0], float)
    ):  # a ladder of sigmas
        return f"({value[0]:.4g}, ..., {value[-1]:.4g})"
    return repr(value)


def _float(name: str, value: object) -> float:
    """``value`` as a float, which may be infinite or NaN; TypeError if it is no number."""
    if isinstance(value, str):
        raise TypeError(
            f"{name} must be a number, got {_shown(value)} (YAML takes 1e-4 for a string, 1.0e-4 for a number)"
        )
    if _is_bool(value) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError) as error:  # an array of several, a complex number
        raise TypeError(f"{name} must be a number, got {_shown(value)}") from error


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"the string {value!r}"
    return f"{value!r} of type {type(value).__name__}"
