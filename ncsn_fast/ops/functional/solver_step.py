"""One step of a solver of the reverse process."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..autograd import needs_gradient
from ..checks import (
    FLOATING,
    check_counter,
    check_samples,
    check_seed,
    check_shape,
    check_tensor,
    check_writable,
)
from ..dispatch import layout_of, select
from ..schema import operator
from .langevin_step import note_change

STATES = (torch.float32, torch.float64)
COLUMNS = 5


def solver_step_(
    x: Tensor,
    score: Tensor,
    table: Tensor,
    level: int | Tensor,
    *,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""One step of a solver, in place, with the numbers of the level's row of a table.

    .. math:: x \leftarrow a\, x + b\, s + e\, p + c\, z, \qquad p \leftarrow x + d\, s

    where the x of the second is that before the step: with :math:`d = \sigma^2` the memory p is the last expected clean
    sample, as multistep solvers take it.

    Args:
        x: the state, first axis the samples; changed in place. float32; float64 goes through the reference.
        score: of the shape of ``x``; float32, bfloat16, float16 or float64; any layout.
        table: ``(K, 5)``, a row (a, b, c, d, e) for each level, floating point, on the device of ``x``.
        level: the row; an int, or an int64 tensor of one element on the device of ``x``, so that one captured CUDA
            graph serves every level. Of a tensor beyond the table, the nearest row is taken.
        previous: p, as ``x`` and with its strides; changed in place. Without it d and e are not used.
        noise: z itself, of the shape of ``x``, in place of the stream; goes through the reference.
        seed: of the noise, 0 .. 2**64 - 1; with neither, c is not used.
        step: counts the steps of a whole run from 0, an int or an int64 tensor of one element as ``level``.
        sample_offset: index of the first sample, so that a batch can be drawn in parts.
        backend: as in :func:`cond_instance_norm_elu`.

    Returns:
        ``x``.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype, shape or range; both ``seed`` and ``noise``.
        RuntimeError: tensors on different devices; ``x`` or ``previous`` with overlapping memory; a gradient asked for;
            a backend asked for that cannot serve the call.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and section 5, for the multistep solvers; Song et al. 2021
    (arXiv:2011.13456), appendix F, for ancestral sampling. Noise: Philox4x32-10 (Salmon et al. 2011), stream 1.
    """
    check_tensor("x", x, STATES)
    if x.dim() == 0:
        raise ValueError("x must have at least one axis, the samples, got a 0-d tensor")
    for name, value in (("score", score), ("noise", noise), ("previous", previous)):
        if name == "score" or value is not None:
            check_tensor(name, value, (x.dtype,) if name == "previous" else FLOATING, like=x)
            check_shape(name, value, x.shape)
    for name, value in (("x", x), ("previous", previous)):
        if value is not None and layout_of(value) is None:
            check_writable(name, value)
    check_tensor("table", table, FLOATING, like=x)
    if table.dim() != 2 or table.shape[1] != COLUMNS or not len(table):
        raise ValueError(f"table must have shape (K, {COLUMNS}), got {tuple(table.shape)}")
    if needs_gradient(x, score, noise, previous, table):
        raise RuntimeError("solver_step_ has no gradient: call it under torch.no_grad()")
    if seed is not None and noise is not None:
        raise ValueError("at most one of seed and noise must be given, got both")
    level, level_tensor = check_counter("level", level, len(table), x)
    step, step_tensor = check_counter("step", step, 2**32, x)
    signed_seed = None if seed is None else check_seed(seed)
    sample_offset = check_samples(sample_offset, x.shape[0])

    chosen = select("solver_step_", backend, x, score, previous, noise)
    if chosen == "reference":
        return reference.solver_step_(
            x,
            score,
            table,
            level if level_tensor is None else level_tensor,
            previous=previous,
            noise=noise,
            seed=signed_seed,
            step=step if step_tensor is None else step_tensor,
            sample_offset=sample_offset,
        )
    operator("solver_step_", chosen)(
        x,
        score,
        previous,
        table.float().contiguous(),
        level,
        level_tensor,
        seed is not None,
        signed_seed or 0,
        step,
        step_tensor,
        sample_offset,
    )
    note_change(x)
    if previous is not None:
        note_change(previous)
    return x
