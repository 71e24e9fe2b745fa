"""The 5x5 max pool."""

from __future__ import annotations

from torch import Tensor

from .. import autograd, reference
from ..autograd import needs_gradient
from ..checks import check_images, check_padding
from ..dispatch import recall, select
from ..schema import PADDINGS, operator


def max_pool5(x: Tensor, *, padding: str = "neg_inf", backend: str | None = None) -> Tensor:
    """The 5x5 max pool with stride 1 and padding 2 of chained residual pooling.

    Args:
        x: ``(N, C, H, W)``, any floating dtype, contiguous or channels_last, which the output keeps.
        padding: what surrounds the image: ``"neg_inf"`` (PyTorch's pool) or ``"zero"``.
        backend: as in :func:`cond_instance_norm_elu`.

    Returns:
        A tensor of the shape, dtype and layout of ``x``. The gradient of a tie goes to the first
        maximum of the window in row-major order.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype or shape; an unknown padding.
        RuntimeError: a backend asked for that cannot serve the call.
    """
    check_padding(padding)
    memory, key = recall("max_pool5", backend, (x,))
    chosen = memory.get(key)
    if chosen is None:
        check_images(x)
        chosen = memory[key] = select("max_pool5", backend, x)
    if chosen == "reference":
        return reference.max_pool5(x, padding)
    if needs_gradient(x):
        return autograd.MaxPool5.apply(x, padding, chosen)
    return operator("max_pool5", chosen)(x, PADDINGS[padding])
