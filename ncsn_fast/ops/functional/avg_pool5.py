"""The 5x5 average pool."""

from __future__ import annotations

from torch import Tensor

from .. import autograd, reference
from ..autograd import needs_gradient
from ..checks import check_images
from ..dispatch import recall, select
from ..schema import operator


def avg_pool5(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The 5x5 average pool with stride 1 and padding 2 of NCSN's chained residual pooling.

    The border counts as zeros: every sum is divided by 25, also where a part of the window lies outside.

    Args:
        x: ``(N, C, H, W)``, any floating dtype, contiguous or channels_last, which the output keeps.
        backend: ``"native"``, ``"triton"``, ``"reference"``, ``"auto"``; None for the policy of
            :func:`ncsn_fast.set_backend`.

    Returns:
        A tensor of the shape, dtype and layout of ``x``. Differentiable to any order.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype or shape.
        RuntimeError: a backend asked for that cannot serve the call.

    Source: Song & Ermon 2019 (arXiv:1907.05600), appendix A; Lin et al. 2017 (arXiv:1611.06612).
    """
    memory, key = recall("avg_pool5", backend, (x,))
    chosen = memory.get(key)
    if chosen is None:
        check_images(x)
        chosen = memory[key] = select("avg_pool5", backend, x)
    if chosen == "reference":
        return reference.avg_pool5(x)
    if needs_gradient(x):
        return autograd.AvgPool5.apply(x, chosen)
    return operator("avg_pool5", chosen)(x)
