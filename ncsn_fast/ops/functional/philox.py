"""Random numbers of the noise stream: normals, uniforms and the words themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...streams import STREAM_OTHER
from .. import reference
from ..algorithms import names_of
from ..checks import FLOATING, check_integer, check_samples, check_seed
from ..dispatch import select
from ..schema import PHILOX_BITS, PHILOX_NORMAL, PHILOX_UNIFORM, operator


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
        raise TypeError(f"dtype must be one of {names_of(FLOATING)}, got {dtype}")
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
