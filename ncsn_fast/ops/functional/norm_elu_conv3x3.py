"""Norm, ELU and a 3x3 convolution, the repeating unit of the networks with norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import integer
from ..algorithms import WINOGRAD
from ..checks import as_int64, check_norm, check_number, check_padding
from ..dispatch import recall, select_convolution
from ._convolution import by_engine, check_convolution, convolve
from .cond_instance_norm_elu import cond_instance_norm_elu
from .max_pool5 import max_pool5


def norm_elu_conv3x3(
    x: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dilation: int = 1,
    residual: Tensor | None = None,
    pool: str | None = None,
    eps: float = 1e-5,
    elu: bool = True,
    conv_algo: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """The repeating unit of the network: norm, ELU, pool if asked for, 3x3 convolution, bias, residual.

    A backend may fuse as much of it as it can; where none does, it is composed of :func:`cond_instance_norm_elu`,
    :func:`max_pool5` and PyTorch's convolution.

    Args:
        x: ``(N, C, H, W)``, floating, contiguous or channels_last.
        labels: ``(N,)`` integers in 0 .. K-1, or of length 1 for the whole batch.
        norm_weight: the norm's table, ``(K, 2C)`` or ``(K, 3C)``.
        weight: the convolution's ``(O, C, 3, 3)``.
        bias: ``(O,)`` or None.
        dilation: of the convolution; its zero padding is the same, so that the size stays.
        residual: ``(N, O, H, W)``, added to the result, or None.
        pool: None, ``"neg_inf"`` or ``"zero"``: a :func:`max_pool5` with that padding before the convolution.
        eps: added to the variance.
        elu: False leaves out the activation.
        conv_algo: on a CPU, in float32: ``"winograd"``, the fused engine, F(4x4, 3x3); ``"direct"``, a direct
            convolution; ``"auto"``, the faster one by the size of the image and the channels. Elsewhere ``"auto"`` and
            ``"direct"`` are PyTorch's convolution; ``"gemm"`` is the Triton one, of float16 and bfloat16 on a GPU,
            which ``"auto"`` takes only where ``python -m ncsn_fast.kernels.tune`` has measured it faster.
        backend: as in :func:`cond_instance_norm_elu`; of the convolution, and of its parts where they run one by one.

    Returns:
        ``(N, O, H, W)``, in the dtype of ``x``. On a CPU without matrix units (AMX) 16 bits, also of autocast, are
        computed in float32, which is faster there. On a CPU in float32 a sample's result has the same bits whatever the
        batch, the layout and the number of threads. Winograd's relative error is about 1e-6, twice that of a direct
        convolution. Inf in ``x`` may become NaN; what is not finite stays in its sample.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as the parts do; a backend or an algorithm asked for that
            cannot serve the call.

    Source: Winograd 1980; Lavin & Gray 2015 (arXiv:1509.09308).
    """
    dilation = integer("dilation", dilation, 1)
    if pool is not None:
        check_padding(pool)
    eps = check_number("eps", eps, 0.0)

    tensors = (x, labels, norm_weight, weight, bias, residual)
    memory, key = recall("norm_elu_conv3x3", backend, tensors, conv_algo, dilation)
    chosen = memory.get(key)
    if chosen is None:
        check_norm(x, labels, norm_weight, "norm_weight")
        check_convolution(x, weight, bias, residual)
        chosen = select_convolution("norm_elu_conv3x3", backend, conv_algo, dilation, *tensors)
        memory[key] = chosen
    labels = as_int64(labels)
    if chosen is not WINOGRAD:
        h = cond_instance_norm_elu(x, labels, norm_weight, eps, elu, backend=backend)
        if pool is not None:
            h = max_pool5(h, padding=pool, backend=backend)
        return convolve(h, weight, bias, residual, dilation, False, chosen)
    if pool is not None:
        x = x.contiguous(memory_format=torch.channels_last)
        h = cond_instance_norm_elu(x, labels, norm_weight, eps, elu, backend=chosen.backend)
        h = max_pool5(h, padding=pool, backend=chosen.backend)
        return convolve(h, weight, bias, residual, dilation, False, chosen)
    norm = (labels, norm_weight)
    return by_engine(x, *norm, weight, bias, residual, dilation, eps, elu, chosen)
