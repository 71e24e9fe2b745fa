"""Parameters of the GPU tests: a few telling combinations, and all others behind the mark ``matrix``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def matrix(names: str, *axes: Sequence[Any], telling: Sequence[tuple]) -> pytest.MarkDecorator:
    """``parametrize`` with the product of the axes; what is not telling is marked.

    Every combination is a compilation or several for Triton, which take longer than the tests themselves.

    Args:
        names: of the parameters.
        axes: their values.
        telling: the combinations that are not marked; they come first.
    """
    combinations = list(product(*axes))
    for values in telling:
        if values not in combinations:
            raise ValueError(f"{values} is no combination of {names}")
    rest = [values for values in combinations if all(values != other for other in telling)]
    parameters = [pytest.param(*values, id=name_of(values)) for values in telling]
    parameters += [pytest.param(*v, id=name_of(v), marks=pytest.mark.matrix) for v in rest]
    return pytest.mark.parametrize(names, parameters)


def name_of(values: tuple) -> str:
    """Such as ``"bfloat16-8x128x32x32-channels_last"``."""

    def name(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return "-".join(name(value).removeprefix("torch.") for value in values)
