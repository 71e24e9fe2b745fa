"""One step of Langevin dynamics."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..autograd import needs_gradient
from ..checks import (
    FLOATING,
    check_counter,
    check_number,
    check_one_element,
    check_samples,
    check_seed,
    check_shape,
    check_tensor,
    check_writable,
)
from ..dispatch import layout_of, select
from ..schema import operator


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
    if layout_of(x) is None:
        check_writable("x", x)
    if needs_gradient(x, score, noise):
        raise RuntimeError("langevin_step_ has no gradient: call it under torch.no_grad()")
    if (seed is None) == (noise is None):
        given = "neither" if seed is None else "both"
        raise ValueError(f"exactly one of seed and noise must be given, got {given}")

    step_size_tensor = None
    if isinstance(step_size, Tensor):
        check_tensor("step_size", step_size, FLOATING, like=x)
        check_one_element("step_size", step_size)
        step_size_tensor, step_size = step_size.float(), 0.0
    else:
        step_size = check_number("step_size", step_size, 0.0)
    step, step_tensor = check_counter("step", step, 2**32, x)
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
    note_change(x)
    return x


def note_change(x: Tensor) -> None:
    """Lets autograd see that x was written: a graph that saved it must refuse, not use the new values."""
    if not torch.compiler.is_compiling() and not x.is_inference():
        torch.autograd.graph.increment_version(x)
