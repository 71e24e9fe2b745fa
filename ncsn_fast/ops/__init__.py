"""The operators, for use in any network: checked arguments in, the chosen backend's result out.

This file holds the public functions. Their argument checks are in ``checks.py``, what an operator computes is in
``reference.py``, which backend runs in ``dispatch.py``, its gradients in ``autograd.py``, its schema in ``schema.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import integer
from ..streams import STREAM_INIT, STREAM_LANGEVIN, STREAM_OTHER, STREAM_TRAINING
from . import autograd, reference
from .autograd import needs_gradient
from .checks import (
    FLOATING,
    check_integer,
    check_norm,
    check_number,
    check_one_element,
    check_padding,
    check_samples,
    check_seed,
    check_shape,
    check_tensor,
    names,
    overlaps_itself,
)
from .dispatch import layout_of, select, select_convolution, set_backend, transform, use_backend
from .functional._convolution import check_convolution, convolve
from .functional.avg_pool5 import avg_pool5
from .functional.conv3x3_mean_pool import conv3x3_mean_pool
from .functional.elu_conv3x3 import elu_conv3x3
from .schema import PADDINGS, PHILOX_BITS, PHILOX_NORMAL, PHILOX_UNIFORM, operator

__all__ = [
    "STREAM_INIT",
    "STREAM_LANGEVIN",
    "STREAM_OTHER",
    "STREAM_TRAINING",
    "avg_pool5",
    "cond_instance_norm_elu",
    "conv3x3",
    "conv3x3_mean_pool",
    "elu_conv3x3",
    "langevin_step_",
    "max_pool5",
    "norm_elu_conv3x3",
    "philox_bits",
    "philox_normal",
    "philox_uniform",
    "set_backend",
    "use_backend",
]


def _note_change(x: Tensor) -> None:
    """Lets autograd see that x was written: a graph that saved it must refuse, not use the new values."""
    if not torch.compiler.is_compiling() and not x.is_inference():
        torch.autograd.graph.increment_version(x)


# --- the network's operators ----------------------------------------------------------------------


def cond_instance_norm_elu(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    elu: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Conditional instance normalisation, then ELU with alpha 1.

    Every plane is normalised by its own mean and biased variance, in training and in evaluation,
    then scaled and shifted by the row of ``weight`` that its sample's label chooses:
    :math:`u = \gamma_{y} (x - \mu) / \sqrt{\mathrm{var} + eps} + \beta_{y}`. With three columns a
    channel it is InstanceNorm++: :math:`u = \gamma (\hat x + \alpha m) + \beta`, where m is the
    plane's mean, normalised over the channels.

    Args:
        x: ``(N, C, *spatial)``; float32, bfloat16, float16 or float64; contiguous or channels_last,
            which the output keeps.
        labels: ``(N,)`` integers in 0 .. K-1, or of length 1 for the whole batch.
        weight: ``(K, 2C)``, columns gamma | beta, or ``(K, 3C)``, columns gamma | alpha | beta; floating.
        eps: added to the variance.
        elu: False leaves out the activation.
        backend: ``"native"``, ``"triton"``, ``"reference"``, ``"auto"``; None for the policy of :func:`set_backend`.

    Returns:
        A tensor of the shape, dtype and layout of ``x``. Differentiable for ``x`` and ``weight``, to any order.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype or shape.
        RuntimeError: tensors on different devices; a backend asked for that cannot serve the call.
        IndexError: a label out of range, on the CPU (on CUDA: a device-side assertion).

    Source: Song & Ermon 2019 (arXiv:1907.05600), appendix A, after Dumoulin et al. 2017 (arXiv:1610.07629).
    """
    labels = check_norm(x, labels, weight)
    eps = check_number("eps", eps, 0.0)
    chosen = select("cond_instance_norm_elu", backend, x, labels, weight)
    if chosen == "reference":
        return reference.cond_instance_norm_elu(x, labels, weight, eps, elu)
    if needs_gradient(x, weight):
        return autograd.CondInstanceNormELU.apply(x, labels, weight, eps, elu, chosen)
    return operator("cond_instance_norm_elu", chosen)(x, labels, weight, eps, elu)[0]


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
    check_tensor("x", x, FLOATING)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must have shape (N, C, H, W) with C, H and W >= 1, got {tuple(x.shape)}"
        )
    check_padding(padding)
    chosen = select("max_pool5", backend, x)
    if chosen == "reference":
        return reference.max_pool5(x, padding)
    if needs_gradient(x):
        return autograd.MaxPool5.apply(x, padding, chosen)
    return operator("max_pool5", chosen)(x, PADDINGS[padding])


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
        conv_algo: on a CPU, in float32: ``"winograd"``, the fused engine, F(4x4, 3x3); ``"direct"``, PyTorch's
            convolution; ``"auto"``, the faster one by the size of the image and the channels.
        backend: as in :func:`cond_instance_norm_elu`; where the unit is composed, it holds for its parts.

    Returns:
        ``(N, O, H, W)``. Winograd's relative error is about 1e-6, twice that of a direct convolution. Inf in ``x``
        may become NaN; what is not finite stays in its sample.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as the parts do.

    Source: Winograd 1980; Lavin & Gray 2015 (arXiv:1509.09308).
    """
    labels = check_norm(x, labels, norm_weight, "norm_weight")
    dilation = integer("dilation", dilation, 1)
    check_convolution(x, weight, bias, residual)
    if pool is not None:
        check_padding(pool)
    eps = check_number("eps", eps, 0.0)

    tensors = (x, labels, norm_weight, weight, bias, residual)
    chosen = select_convolution("norm_elu_conv3x3", backend, conv_algo, dilation, *tensors)
    if chosen == "reference":
        h = cond_instance_norm_elu(x, labels, norm_weight, eps, elu, backend=backend)
        if pool is not None:
            h = max_pool5(h, padding=pool, backend=backend)
        h = F.conv2d(h, weight, bias, padding=dilation, dilation=dilation)
        return h if residual is None else h + residual
    norm = (labels, norm_weight)
    if pool is not None:
        x = x.contiguous(memory_format=torch.channels_last)
        h = cond_instance_norm_elu(x, labels, norm_weight, eps, elu, backend=chosen)
        x, norm, elu = max_pool5(h, padding=pool, backend=chosen), (None, None), False
    return convolve(x, *norm, weight, bias, residual, dilation, eps, elu, chosen)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dilation: int = 1,
    residual: Tensor | None = None,
    conv_algo: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """The convolution of :func:`norm_elu_conv3x3` alone; arguments, result and errors as there."""
    dilation = integer("dilation", dilation, 1)
    tensors = check_convolution(x, weight, bias, residual)
    chosen = select_convolution("conv3x3", backend, conv_algo, dilation, *tensors)
    if chosen == "reference":
        h = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
        return h if residual is None else h + residual
    return convolve(x, None, None, weight, bias, residual, dilation, 0.0, False, chosen)


def wants_channels_last(x: Tensor) -> bool:
    """Whether the convolutions of a network would convert ``x`` to channels_last, each of them, and its result back.

    A network asks once, and converts its input and its output instead. On a CPU our convolution engine wants it; on a
    GPU the tensor cores do, in half precision. float32 stays as it is there: cuDNN computes it in either layout.
    """
    if transform() is not None:
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.device.type == "cuda":
        # Autocast leaves float64 alone.
        cast = torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cuda") if cast else x.dtype
        return dtype in (torch.float16, torch.bfloat16)
    return x.device.type == "cpu" and select("norm_elu_conv3x3", None, x) == "native"


# --- noise and the Langevin update ----------------------------------------------------------------


def langevin_step_(
    x: Tensor,
    score: Tensor,
    step_size: float | Tensor,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    clip: float | None = None,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One step of Langevin dynamics, in place: :math:`x \leftarrow x + \eta s + \sqrt{2 \eta}\, z`, then a clamp.

    Args:
        x: the state, float32, first axis the samples; changed in place. Contiguous or channels_last is fastest.
        score: of the shape of ``x``; float32, bfloat16, float16 or float64; any layout.
        step_size: :math:`\eta`, a number >= 0, or a tensor of one element on the device of ``x`` (read there, without a
            synchronisation). Papers that write :math:`x + \frac{\alpha}{2} s + \sqrt{\alpha} z` mean
            :math:`\eta = \alpha / 2`.
        seed: of the noise, 0 .. 2**64 - 1. Needed unless ``noise`` is given.
        step: counts the steps of a whole run from 0; an int, or an int64 tensor of one element on
            the device of ``x``, so that one captured CUDA graph serves every step.
        sample_offset: index of the first sample, so that a batch can be drawn in parts.
        clip: clamps the result to [-clip, clip]; None does not.
        noise: z itself, of the shape of ``x``, in place of the stream.
        backend: as in :func:`cond_instance_norm_elu`.

    Returns:
        ``x``.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype, shape or range; neither or both of ``seed`` and ``noise``.
        RuntimeError: tensors on different devices; ``x`` with overlapping memory; a gradient asked for; a backend asked
            for that cannot serve the call.

    Source: Song & Ermon 2019 (arXiv:1907.05600), algorithm 1. Noise: Philox4x32-10 (Salmon et al. 2011), stream 1.
    """
    check_tensor("x", x, (torch.float32,))
    if x.dim() == 0:
        raise ValueError("x must have at least one axis, the samples, got a 0-d tensor")
    for name, value in (("score", score), ("noise", noise)):
        if name == "score" or value is not None:
            check_tensor(name, value, FLOATING, like=x)
            check_shape(name, value, x.shape)
    if layout_of(x) is None and overlaps_itself(x):
        raise RuntimeError(
            f"x must not overlap itself, as it is written in place; got strides {tuple(x.stride())}"
            f" for shape {tuple(x.shape)}: use x.clone()"
        )
    if needs_gradient(x, score, noise):
        raise RuntimeError("langevin_step_ has no gradient: call it under torch.no_grad()")
    if (seed is None) == (noise is None):
        given = "neither" if seed is None else "both"
        raise ValueError(f"exactly one of seed and noise must be given, got {given}")

    step_size_tensor = step_tensor = None
    if isinstance(step_size, Tensor):
        check_tensor("step_size", step_size, FLOATING, like=x)
        check_one_element("step_size", step_size)
        step_size_tensor, step_size = step_size.float(), 0.0
    else:
        step_size = check_number("step_size", step_size, 0.0)
    if isinstance(step, Tensor):
        check_tensor("step", step, (torch.int64,), like=x)
        check_one_element("step", step)
        step_tensor, step = step, 0
    else:
        step = check_integer("step", step, 2**32)
    signed_seed = 0 if seed is None else check_seed(seed)
    sample_offset = check_samples(sample_offset, x.shape[0])
    clip = None if clip is None else check_number("clip", clip, 0.0)

    chosen = select("langevin_step_", backend, x, score, noise)
    if chosen == "reference":
        return reference.langevin_step_(
            x,
            score,
            noise,
            step_size if step_size_tensor is None else step_size_tensor,
            seed=signed_seed,
            step=step if step_tensor is None else step_tensor,
            sample_offset=sample_offset,
            clip=clip,
        )
    operator("langevin_step_", chosen)(
        x,
        score,
        noise,
        step_size,
        step_size_tensor,
        signed_seed,
        step,
        step_tensor,
        sample_offset,
        clip,
    )
    _note_change(x)
    return x


def _philox(
    shape: Sequence[int],
    kind: int,
    dtype: torch.dtype,
    *,
    seed: int,
    step: int,
    sample_offset: int,
    stream: int,
    device: torch.device | str,
    memory_format: torch.memory_format,
    backend: str | None,
) -> Tensor:
    shape = tuple(shape)
    if not shape:
        raise ValueError("shape must have at least one axis, the samples, got ()")
    signed_seed = check_seed(seed)
    step = check_integer("step", step, 2**32)
    sample_offset = check_samples(sample_offset, shape[0])
    stream = check_integer("stream", stream, 2**32)
    if kind != PHILOX_BITS and dtype not in FLOATING:
        raise TypeError(f"dtype must be one of {names(FLOATING)}, got {dtype}")
    # Half precision is the float32 number, rounded; float64 is evaluated in float64, by the reference alone.
    out_dtype = dtype if dtype in (torch.int32, torch.float64) else torch.float32
    out = torch.empty(shape, dtype=out_dtype, device=device, memory_format=memory_format)
    chosen = select("philox_", "reference" if dtype == torch.float64 else backend, out)
    if chosen != "reference":
        operator("philox_", chosen)(out, signed_seed, step, sample_offset, stream, kind)
        return out.to(dtype)
    counter = {
        "seed": signed_seed,
        "step": step,
        "sample_offset": sample_offset,
        "stream": stream,
        "device": out.device,
    }
    if kind == PHILOX_BITS:
        return out.copy_(reference.philox_bits(shape, **counter))
    draw = reference.philox_normal if kind == PHILOX_NORMAL else reference.philox_uniform
    return out.copy_(draw(shape, dtype=out_dtype, **counter)).to(dtype)


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int,
    step: int = 0,
    sample_offset: int = 0,
    stream: int = STREAM_OTHER,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
) -> Tensor:
    """Standard normal numbers of the project's noise stream.

    The number of an element depends on (seed, step, stream), on the sample's index and on the element's place in its
    sample in logical order; not on the batch, the layout, the device or the backend.

    Args:
        shape: of the result; the first axis is the samples.
        seed: 0 .. 2**64 - 1.
        step: the third word of the counter.
        sample_offset: index of the first sample.
        stream: separates uses: 0 initial state, 1 Langevin noise, 2 training perturbation, 3 anything else.
        dtype: float32, bfloat16 and float16 (the float32 numbers, rounded), or float64 (evaluated in float64).
        device: of the result.
        memory_format: of the result.
        backend: as in :func:`cond_instance_norm_elu`.

    Returns:
        A tensor of the shape, at most 5.77 in size. Backends agree within 2e-6.

    Raises:
        TypeError, ValueError: arguments of a wrong type or range.
        RuntimeError: a backend asked for that cannot serve the call.

    Source: Philox4x32-10 (Salmon et al. 2011); Box & Muller 1958.
    """
    return _philox(
        shape,
        PHILOX_NORMAL,
        dtype,
        seed=seed,
        step=step,
        sample_offset=sample_offset,
        stream=stream,
        device=device,
        memory_format=memory_format,
        backend=backend,
    )


def philox_uniform(
    shape: Sequence[int],
    *,
    seed: int,
    step: int = 0,
    sample_offset: int = 0,
    stream: int = STREAM_OTHER,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
) -> Tensor:
    """Uniform numbers of the noise stream, ``((w >> 9) + 0.5) * 2**-23``: in (0, 1), never 0 or 1 in float32.

    Arguments, errors and source as in :func:`philox_normal`.
    """
    return _philox(
        shape,
        PHILOX_UNIFORM,
        dtype,
        seed=seed,
        step=step,
        sample_offset=sample_offset,
        stream=stream,
        device=device,
        memory_format=memory_format,
        backend=backend,
    )


def philox_bits(
    shape: Sequence[int],
    *,
    seed: int,
    step: int = 0,
    sample_offset: int = 0,
    stream: int = STREAM_OTHER,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
) -> Tensor:
    """The 32-bit words of the noise stream, as int32 bit patterns; the same bits in every backend.

    Arguments, errors and source as in :func:`philox_normal`.
    """
    return _philox(
        shape,
        PHILOX_BITS,
        torch.int32,
        seed=seed,
        step=step,
        sample_offset=sample_offset,
        stream=stream,
        device=device,
        memory_format=memory_format,
        backend=backend,
    )
