"""The 5x5 max pool and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def max_pool5(x: Tensor, padding: str = "neg_inf") -> Tensor:
    """5x5 max pool, stride 1, same size; the border counts as minus infinity or as zero.

    Rows, then columns: a tenth of the work of 5x5 windows, and the same first maximum in row-major order.
    """
    border = 2
    if padding == "zero":
        x, border = F.pad(x, (2, 2, 2, 2)), 0
    rows = F.max_pool2d(x, (1, 5), stride=1, padding=(0, border))
    return F.max_pool2d(rows, (5, 1), stride=1, padding=(border, 0))


def max_pool5_backward(grad_y: Tensor, x: Tensor, padding: str = "neg_inf") -> Tensor:
    """Each output's gradient goes to the first maximum of its window, in row-major order."""
    border = 2 if padding == "zero" else 0
    padded = F.pad(x, (border,) * 4)
    window = ([5, 5], [1, 1], [2 - border] * 2, [1, 1], False)  # kernel, stride, padding, dilation
    _, indices = torch.ops.aten.max_pool2d_with_indices(padded, *window)
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad_y, padded, *window, indices)
    return grad if border == 0 else grad[..., border:-border, border:-border].clone()
