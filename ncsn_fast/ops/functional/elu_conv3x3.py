"""ELU and a 3x3 convolution, the unit of networks without norms."""

from __future__ import annotations

from torch import Tensor

from ...checks import integer
from ..checks import check_padding
from ._convolution import choose, convolve
from .max_pool5 import max_pool5


def elu_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    elu: bool = True,
    pool: str | None = None,
    dilation: int = 1,
    residual: Tensor | None = None,
    conv_algo: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """ELU, 5x5 max pool if asked for, 3x3 convolution, bias, residual: NCSNv2's repeating unit, which has no norm.

    The engine of :func:`ncsn_fast.ops.norm_elu_conv3x3` applies the ELU while it reads. Its operator is ``conv3x3``,
    by which :func:`ncsn_fast.set_backend` governs it.

    Args:
        x: ``(N, C, H, W)``, floating, contiguous or channels_last.
        weight: the convolution's ``(O, C, 3, 3)``.
        bias: ``(O,)`` or None.
        elu: False leaves out the activation.
        pool: None, ``"neg_inf"`` or ``"zero"``: a :func:`ncsn_fast.ops.max_pool5` with that padding before the
            convolution. ELU is monotone and 0 at 0, so that it may come before or after.
        dilation: of the convolution; its zero padding is the same, so that the size stays.
        residual: ``(N, O, H, W)``, added to the result, or None.
        conv_algo: ``"winograd"``, ``"direct"``, ``"gemm"`` or ``"auto"``, as in :func:`ncsn_fast.ops.norm_elu_conv3x3`.
        backend: ``"native"``, ``"reference"``, ``"auto"``; None for the policy.

    Returns:
        ``(N, O, H, W)``. Differentiable to any order. Winograd's relative error is about 1e-6, twice that of a
        direct convolution. Inf in ``x`` may become NaN; what is not finite stays in its sample.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype or shape; an unknown pool.
        RuntimeError: tensors on different devices; a backend asked for that cannot serve the call.

    Source: Song & Ermon 2020 (arXiv:2006.09011), appendix A.
    """
    dilation = integer("dilation", dilation, 1)
    chosen = choose(x, weight, bias, residual, dilation, conv_algo, backend)
    if pool is not None:
        check_padding(pool)
    if pool is not None:
        x = max_pool5(x, padding=pool, backend=backend)
    return convolve(x, weight, bias, residual, dilation, elu, chosen)
