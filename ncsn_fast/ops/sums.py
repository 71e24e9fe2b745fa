"""Autograd around sums that a norm reads: ``add_norm_elu``, and biases that cancel.

The first gradient of ``add_norm_elu`` is that of the norm at ``z``, so that this adds no backward operator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from . import reference
from .autograd import CondInstanceNormELUBackward, _transformed, reference_vjp
from .schema import operator


class AddNormELU(Function):
    """``add_norm_elu`` by the operator of a backend: ``z`` and ``y``; saves z, mean and rstd."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        labels: Tensor,
        weight: Tensor,
        eps: float,
        elu: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        tensors = (x, bias, residual, labels, weight)
        z, y, mean, rstd = operator("add_norm_elu", backend)(*tensors, eps, elu)
        ctx.save_for_backward(z, labels, weight, mean, rstd)
        ctx.settings = (eps, elu, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return z, y

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_z: Tensor | None, grad_y: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_weight = None
        if grad_y is not None:
            grad, grad_weight = _norm_gradient(grad_y, *ctx.saved_tensors, *ctx.settings)
            grad_z = grad if grad_z is None else grad_z + grad
        if grad_z is None:
            return (None,) * 8
        _, bias, residual = ctx.needs_input_grad[:3]
        axes = (0, *range(2, grad_z.dim()))
        grad_bias = grad_z.sum(axes).to(ctx.bias_dtype) if bias else None
        return grad_z, grad_bias, grad_z if residual else None, None, grad_weight, None, None, None


def _norm_gradient(
    grad_y: Tensor,
    z: Tensor,
    labels: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    elu: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Of ``elu(norm(z))`` for z and weight, differentiable again where a graph is wanted."""
    if _transformed(grad_y):

        def forward(z: Tensor, weight: Tensor) -> Tensor:
            return reference.cond_instance_norm_elu(z, labels, weight, eps, elu)

        return reference_vjp(forward, (z, weight), (grad_y,))
    saved = (z, labels, weight, mean, rstd)
    if torch.is_grad_enabled():
        return CondInstanceNormELUBackward.apply(grad_y, *saved, eps, elu, backend)
    return operator("cond_instance_norm_elu_backward", backend)(grad_y, *saved, elu)


class Unused(Function):
    """The first argument; the second one's gradient is zero and not None, so that optimisers see the parameter."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (parameter,) = ctx.saved_tensors
        return grad, torch.zeros_like(parameter)
