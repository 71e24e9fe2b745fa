"""Autograd around the operators, to second order and beyond.

An operator's first gradient is its ``_backward`` operator. Differentiating that gradient goes through the reference
with its statistics recomputed: saved statistics taken as constants would make second derivatives wrong without a word.
A second ``Function`` records that, where a graph of the gradient is wanted; else its cost a call is saved.
A gradient that is itself asked for within a transform (a batch of gradients, a tangent of one) goes the reference's way
too. The Functions raise in forward mode, as those without a ``jvp`` do; the dispatcher keeps calls there from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from . import reference
from .schema import PADDINGS, operator
from .transforms import transform


def _transformed(grad_y: Tensor) -> bool:
    """Whether a gradient is asked for within a transform, or for a batch of them at once (``is_grads_batched``)."""
    if transform() is not None:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_y)


def reference_vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` by autograd, differentiable again; None for inputs without a gradient."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: the same tensor given twice still has one gradient for each place.
        aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        outputs = function(*aliases)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [
            (y, g)
            for y, g in zip(outputs, grad_outputs, strict=True)
            if y is not None and g is not None and y.requires_grad
        ]
        if not pairs or not wanted:
            return (None,) * len(inputs)
        grads = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return tuple(next(grads) if t is not None and t.requires_grad else None for t in aliases)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call must be recorded; also in forward mode, where an operator would drop the tangents in silence."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class CondInstanceNormELU(Function):
    """``cond_instance_norm_elu`` by the operator of a backend; saves x, mean and rstd, neither y nor xhat."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        labels: Tensor,
        weight: Tensor,
        eps: float,
        elu: bool,
        backend: str,
    ) -> Tensor:
        y, mean, rstd = operator("cond_instance_norm_elu", backend)(x, labels, weight, eps, elu)
        ctx.save_for_backward(x, labels, weight, mean, rstd)
        ctx.settings = (eps, elu, backend)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if _transformed(grad_y):
            x, labels, weight, *_ = ctx.saved_tensors
            forward = _norm_of(labels, *ctx.settings[:2])
            grads = reference_vjp(forward, (x, weight), (grad_y,))
        elif torch.is_grad_enabled():
            grads = CondInstanceNormELUBackward.apply(grad_y, *ctx.saved_tensors, *ctx.settings)
        else:
            _, elu, backend = ctx.settings
            backward = operator("cond_instance_norm_elu_backward", backend)
            grads = backward(grad_y, *ctx.saved_tensors, elu)
        return (grads[0], None, grads[1], None, None, None)


class CondInstanceNormELUBackward(Function):
    """The first gradient as a function of its own, so that it can be differentiated."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        grad_y: Tensor,
        x: Tensor,
        labels: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        elu: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad_y, x, labels, weight)
        ctx.settings = (eps, elu)
        backward = operator("cond_instance_norm_elu_backward", backend)
        return backward(grad_y, x, labels, weight, mean, rstd, elu)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, x, labels, weight = ctx.saved_tensors
        forward = _norm_of(labels, *ctx.settings)

        def first_gradient(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
            return reference_vjp(forward, (x, weight), (grad_y,))

        seconds = reference_vjp(first_gradient, (grad_y, x, weight), grads)
        return (seconds[0], seconds[1], None, seconds[2], None, None, None, None, None)


def _norm_of(labels: Tensor, eps: float, elu: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The reference as a function of what has a gradient."""
    return lambda x, weight: reference.cond_instance_norm_elu(x, labels, weight, eps, elu)


class MaxPool5(Function):
    """``max_pool5`` by the operator of a backend; saves x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, padding: str, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = (padding, backend)
        return operator("max_pool5", backend)(x, PADDINGS[padding])

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if _transformed(grad_y):
            pool = partial(reference.max_pool5, padding=ctx.settings[0])
            (grad_x,) = reference_vjp(pool, ctx.saved_tensors, (grad_y,))
        elif torch.is_grad_enabled():
            grad_x = MaxPool5Backward.apply(grad_y, *ctx.saved_tensors, *ctx.settings)
        else:
            padding, backend = ctx.settings
            backward = operator("max_pool5_backward", backend)
            grad_x = backward(grad_y, *ctx.saved_tensors, PADDINGS[padding])
        return grad_x, None, None


class MaxPool5Backward(Function):
    """The gradient of the pool: linear in ``grad_y``, piecewise constant in ``x``."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad_y: Tensor, x: Tensor, padding: str, backend: str) -> Tensor:
        ctx.save_for_backward(grad_y, x)
        ctx.padding = padding
        return operator("max_pool5_backward", backend)(grad_y, x, PADDINGS[padding])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, x = ctx.saved_tensors

        def first_gradient(grad_y: Tensor, x: Tensor) -> Tensor | None:
            return reference_vjp(partial(reference.max_pool5, padding=ctx.padding), (x,), (grad_y,))

        return (*reference_vjp(first_gradient, (grad_y, x), (grad,)), None, None)


class AvgPool5(Function):
    """``avg_pool5`` by the operator of a backend: linear and self-adjoint, so that its gradient is itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.channels_last = not x.is_contiguous()
        return operator("avg_pool5", backend)(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor, None]:
        if _transformed(grad_y):
            return reference.avg_pool5(grad_y), None
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        return AvgPool5.apply(grad_y.contiguous(memory_format=layout), ctx.backend), None


class NormELUConv3x3(Function):
    """``norm_elu_conv3x3`` without a pool by the operators of a backend; with labels None, ``conv3x3`` of x.

    Saves x, weights, mean and rstd: norm and ELU are computed again.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        labels: Tensor | None,
        norm_weight: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        dilation: int,
        eps: float,
        elu: bool,
        backend: str,
    ) -> Tensor:
        if labels is None:
            mean = rstd = None
            y = operator("conv3x3", backend)(x, weight, bias, residual, dilation, False, elu)
        else:
            fused = operator("norm_elu_conv3x3", backend)
            y, mean, rstd = fused(
                x, labels, norm_weight, weight, bias, residual, dilation, eps, elu
            )
        ctx.save_for_backward(x, labels, norm_weight, weight, mean, rstd)
        ctx.settings = (dilation, eps, elu, backend)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, _, norm_weight, weight, bias, residual = ctx.needs_input_grad[:6]
        needed = (x, norm_weight, weight, bias)
        if _transformed(grad_y):
            x, labels, norm_weight, weight, *_ = ctx.saved_tensors
            no_bias = weight.new_zeros(weight.shape[0], requires_grad=bias)
            forward = _unit_of(labels, *ctx.settings[:3])
            grads = reference_vjp(forward, (x, norm_weight, weight, no_bias), (grad_y,))
        else:
            grads = NormELUConv3x3Backward.apply(grad_y, *ctx.saved_tensors, needed, *ctx.settings)
        return (grads[0], None, *grads[1:], grad_y if residual else None, *[None] * 4)


class NormELUConv3x3Backward(Function):
    """The first gradient: for x, the norm's weight, the convolution's weight and its bias, each if it is needed."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        grad_y: Tensor,
        x: Tensor,
        labels: Tensor | None,
        norm_weight: Tensor | None,
        weight: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        needed: tuple[bool, bool, bool, bool],
        dilation: int,
        eps: float,
        elu: bool,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad_y, x, labels, norm_weight, weight)
        ctx.settings = (needed, dilation, eps, elu)
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        grad_x = grad_norm_weight = grad_weight = grad_bias = None
        norm = (labels, norm_weight, mean, rstd)
        if needed[0] or needed[1]:
            grad_x = operator("conv3x3", backend)(grad_y, weight, None, None, dilation, True, False)
            if labels is not None:
                grad_x, grad_norm_weight = operator("cond_instance_norm_elu_backward", backend)(
                    grad_x, x, *norm, elu
                )
            elif elu:
                grad_x = torch.ops.aten.elu_backward(grad_x, 1.0, 1.0, 1.0, False, x)
        if needed[2] or needed[3]:
            grad_weight, grad_bias = operator("conv3x3_weight_gradient", backend)(
                grad_y, x, *norm, dilation, elu
            )
            # They come together; autograd refuses a gradient for what is None, such as a bias that is not there.
            grad_weight = grad_weight if needed[2] else None
            grad_bias = grad_bias if needed[3] else None
        return grad_x, grad_norm_weight, grad_weight, grad_bias

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, x, labels, norm_weight, weight = ctx.saved_tensors
        needed, dilation, eps, elu = ctx.settings

        forward = _unit_of(labels, dilation, eps, elu)

        def first_gradient(
            grad_y: Tensor, x: Tensor, norm_weight: Tensor | None, weight: Tensor
        ) -> tuple[Tensor | None, ...]:
            bias = weight.new_zeros(weight.shape[0], requires_grad=needed[3])
            return reference_vjp(forward, (x, norm_weight, weight, bias), (grad_y,))

        inputs = (grad_y, x, norm_weight, weight)
        seconds = reference_vjp(first_gradient, inputs, grads)
        return (*seconds[:2], None, *seconds[2:], *[None] * 7)


class DirectConv(Function):
    """``conv_direct`` by a backend's operator; its gradients are those of PyTorch's convolution. Saves x and weight."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        dilation: int,
        elu: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = (dilation, elu)
        return operator("conv_direct", backend)(x, weight, bias, residual, dilation, elu)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dilation, elu = ctx.settings
        sizes = ([weight.shape[0]], [1, 1], [dilation * (weight.shape[2] // 2)] * 2, [dilation] * 2)
        needed = ctx.needs_input_grad[:3]
        h = F.elu(x) if elu else x
        # Differentiable again, by PyTorch's own rules.
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_y, h, weight, *sizes, False, [0, 0], 1, needed
        )
        if elu and needed[0]:
            grad_x = torch.ops.aten.elu_backward(grad_x, 1.0, 1.0, 1.0, False, x)
        residual = grad_y if ctx.needs_input_grad[3] else None
        return grad_x, grad_weight, grad_bias, residual, None, None, None


def _unit_of(labels: Tensor | None, dilation: int, eps: float, elu: bool) -> Callable[..., Tensor]:
    """The reference as a function of what has a gradient; without labels, of the convolution alone."""

    def forward(x: Tensor, norm_weight: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        if labels is None:
            # Not reference.conv3x3, whose channels_last result is not to be had within vmap.
            x = F.elu(x) if elu else x
            return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
        return reference.norm_elu_conv3x3(
            x, labels, norm_weight, weight, bias, None, dilation, None, eps, elu
        )

    return forward
