"""Layers of an existing model, exchanged for those of ``layers.py`` where they are.

Belongs here: which layers are exchanged. Does not belong here: what the new ones do (``layers.py``).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..models.plain import why_not_plain
from .layers import Conv3x3, InstanceNorm2d, MaxPool5, norm_elu_conv, why_not_unit


class Sequential(nn.Sequential):
    """``torch.nn.Sequential`` that computes an instance norm, an ELU or none, and a 3x3 convolution as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """Call the layers in their order."""
        layers = list(self)
        while layers:
            length = _unit_length(layers)
            if length:
                x = norm_elu_conv(layers[0], layers[length - 1], x, None, elu=length == 3)
            else:
                x, length = layers[0](x), 1
            del layers[:length]
        return x


def _unit_length(layers: list[nn.Module]) -> int:
    """How many of the first layers are one operator: norm and convolution, or with an ELU between them; 0 if none."""
    if type(layers[0]) is not InstanceNorm2d:
        return 0
    has_elu = len(layers) > 2 and why_not_plain(layers[1], nn.ELU) is None and layers[1].alpha == 1
    length = 3 if has_elu else 2
    if len(layers) < length or type(layers[length - 1]) is not Conv3x3:
        return 0
    return length if why_not_unit(layers[0], layers[length - 1]) is None else 0


def _counterpart(layer: nn.Module) -> type[nn.Module] | None:
    """The class that computes the same by an operator; None if there is none."""
    if type(layer) is nn.Sequential:
        return Sequential
    if type(layer) is nn.InstanceNorm2d:
        return None if layer.track_running_stats else InstanceNorm2d
    if type(layer) is nn.Conv2d:
        served = (layer.kernel_size, layer.stride, layer.groups) == ((3, 3), (1, 1), 1)
        return Conv3x3 if served and len(set(layer.dilation)) == 1 else None
    if type(layer) is nn.MaxPool2d:
        facts = [
            _pair(value)
            for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        ]
        plain = facts == [(5, 5), (1, 1), (2, 2), (1, 1)]
        return MaxPool5 if plain and not (layer.return_indices or layer.ceil_mode) else None
    return None


def replace_layers(model: nn.Module) -> dict[str, str]:
    """Let the operators compute the layers of a model that they can; its outputs stay what they were, but rounding.

    Layers stay where they are, with their parameters, hooks and names in the state dict: only their class changes, to
    that of the same layer in ``ncsn_fast.nn``. An optimizer, a checkpoint and ``model.forward`` need no change. In a
    ``torch.nn.Sequential`` an instance norm, an ELU (or none) and a 3x3 convolution that follow each other become one
    operator.

    Args:
        model: any module; it is changed. Subclasses of PyTorch's layers are left as they are, and so are layers that
            the operators do not serve: other kernels, strides, groups, norms with running statistics.

    Returns:
        The names of the layers that changed, and their new classes.
    """
    changed = {}
    for name, layer in model.named_modules():
        new = _counterpart(layer)
        if new is not None:
            layer.__class__ = new
            if new is not Sequential:
                changed[name] = new.__name__
    return changed
