"""The operators as layers, for networks of your own and for those of other people.

Belongs here: the names that users import. Does not belong here: the layers (``layers.py``), how those of an existing
model are exchanged (``replacing.py``). docs/operators.md shows their use.
"""

from __future__ import annotations

from .layers import (
    ConditionalInstanceNormELU,
    Conv3x3,
    InstanceNorm2d,
    MaxPool5,
    NormELUConv3x3,
)
from .replacing import replace_layers

__all__ = [
    "ConditionalInstanceNormELU",
    "Conv3x3",
    "InstanceNorm2d",
    "MaxPool5",
    "NormELUConv3x3",
    "replace_layers",
]
