"""The operators' schemas, fakes and reference kernels: the one place where operators are defined.

Every operator exists twice, with one schema: in the namespace ``ncsn_fast`` (implemented in C++ for the CPU
and in CUDA C++, with the reference below it wherever neither is loaded) and in ``ncsn_fast_triton`` (implemented in
Triton). Compiled code only implements; nothing else in the project may define.
"""

from __future__ import annotations

import hashlib

import torch

from . import reference

NATIVE, TRITON = "ncsn_fast", "ncsn_fast_triton"

# Kinds of `philox_`, and the dtype each writes.
PHILOX_BITS, PHILOX_UNIFORM, PHILOX_NORMAL = 0, 1, 2

# What surrounds a pool's image, as the operators take it. A string would leak at every call: the stable ABI hands C++ a
# copy of it that nobody owns. So no operator of this project takes a string.
PADDINGS = {"neg_inf": 0, "zero": 1}

SCHEMAS = {
    "cond_instance_norm_elu": (
        "(Tensor x, Tensor labels, Tensor weight, float eps, bool elu)"
        " -> (Tensor y, Tensor mean, Tensor rstd)"
    ),
    "cond_instance_norm_elu_backward": (
        "(Tensor grad_y, Tensor x, Tensor labels, Tensor weight, Tensor mean, Tensor rstd, bool elu)"
        " -> (Tensor grad_x, Tensor grad_weight)"
    ),
    "add_norm_elu": (
        "(Tensor x, Tensor? bias, Tensor? residual, Tensor labels, Tensor weight, float eps, bool elu)"
        " -> (Tensor z, Tensor y, Tensor mean, Tensor rstd)"
    ),
    "max_pool5": "(Tensor x, int padding) -> Tensor",
    "max_pool5_backward": "(Tensor grad_y, Tensor x, int padding) -> Tensor",
    "avg_pool5": "(Tensor x) -> Tensor",
    "norm_elu_conv3x3": (
        "(Tensor x, Tensor labels, Tensor norm_weight, Tensor weight, Tensor? bias,"
        " Tensor? residual, int dilation, float eps, bool elu, Tensor? packed=None)"
        " -> (Tensor y, Tensor mean, Tensor rstd)"
    ),
    "conv3x3": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int dilation, bool transposed,"
        " bool elu, Tensor? packed=None) -> Tensor"
    ),
    "conv3x3_pack": "(Tensor weight, int panel) -> Tensor",
    "conv_direct": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int dilation, bool elu) -> Tensor"
    ),
    "conv3x3_weight_gradient": (
        "(Tensor grad_y, Tensor x, Tensor? labels, Tensor? norm_weight, Tensor? mean, Tensor? rstd,"
        " int dilation, bool elu) -> (Tensor grad_weight, Tensor grad_bias)"
    ),
    "langevin_step_": (
        "(Tensor(a!) x, Tensor score, Tensor? noise, float step_size, Tensor? step_size_tensor,"
        " SymInt seed, SymInt step, Tensor? step_tensor, SymInt sample_offset, float? clip) -> ()"
    ),
    "philox_": (
        "(Tensor(a!) out, SymInt seed, SymInt step, SymInt sample_offset, int stream, int kind)"
        " -> ()"
    ),
    "solver_step_": (
        "(Tensor(a!) x, Tensor score, Tensor(b!)? previous, Tensor table, SymInt level, Tensor? level_tensor,"
        " bool noisy, SymInt seed, SymInt step, Tensor? step_tensor, SymInt sample_offset) -> ()"
    ),
}


def fingerprint() -> str:
    """Of the schemas; compiled kernels carry that of the schemas that they were built for (``setup.py``)."""
    return hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:16]


def _padding_name(number):
    for name, known in PADDINGS.items():
        if number == known:
            return name
    known = " or ".join(f"{known} ({name})" for name, known in PADDINGS.items())
    raise ValueError(f"padding must be {known}, got {number}")


def _max_pool5(x, padding):
    return reference.max_pool5(x, _padding_name(padding))


def _max_pool5_backward(grad_y, x, padding):
    return reference.max_pool5_backward(grad_y, x, _padding_name(padding))


def _langevin_step_(
    x,
    score,
    noise,
    step_size,
    step_size_tensor,
    seed,
    step,
    step_tensor,
    sample_offset,
    clip,
):
    reference.langevin_step_(
        x,
        score,
        noise,
        step_size if step_size_tensor is None else step_size_tensor,
        seed=seed,
        step=step if step_tensor is None else step_tensor,
        sample_offset=sample_offset,
        clip=clip,
    )


def _solver_step_(
    x,
    score,
    previous,
    table,
    level,
    level_tensor,
    noisy,
    seed,
    step,
    step_tensor,
    sample_offset,
):
    reference.solver_step_(
        x,
        score,
        table,
        level if level_tensor is None else level_tensor,
        previous=previous,
        seed=seed if noisy else None,
        step=step if step_tensor is None else step_tensor,
        sample_offset=sample_offset,
    )


def _philox_(out, seed, step, sample_offset, stream, kind):
    draws = {
        PHILOX_BITS: reference.philox_bits,
        PHILOX_UNIFORM: reference.philox_uniform,
        PHILOX_NORMAL: reference.philox_normal,
    }
    if kind not in draws:
        raise ValueError(f"kind must be 0, 1 or 2, got {kind}")
    out.copy_(
        draws[kind](
            tuple(out.shape),
            seed=seed,
            step=step,
            sample_offset=sample_offset,
            stream=stream,
            device=out.device,
        )
    )


# What each operator computes where no compiled kernel is loaded.
KERNELS = {
    "cond_instance_norm_elu": reference.cond_instance_norm_elu_with_statistics,
    "cond_instance_norm_elu_backward": reference.cond_instance_norm_elu_backward,
    "add_norm_elu": reference.add_norm_elu_with_statistics,
    "max_pool5": _max_pool5,
    "max_pool5_backward": _max_pool5_backward,
    "avg_pool5": reference.avg_pool5,
    "norm_elu_conv3x3": reference.norm_elu_conv3x3_with_statistics,
    "conv3x3": reference.conv3x3,
    "conv3x3_pack": reference.conv3x3_pack,
    "conv_direct": reference.conv_direct,
    "conv3x3_weight_gradient": reference.conv3x3_weight_gradient,
    "langevin_step_": _langevin_step_,
    "philox_": _philox_,
    "solver_step_": _solver_step_,
}


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        in_place = name.endswith("_")
        # On fake tensors the reference itself tells shapes, dtypes and strides; an in-place operator has none to tell.
        fake = _nothing if in_place else KERNELS[name]
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


def _nothing(*args: object) -> None:
    return None


def _implement_reference(library: torch.library.Library) -> None:
    for name, kernel in KERNELS.items():
        # Without no_grad, autograd would record the reference's own operations inside the operator.
        library.impl(name, torch.no_grad()(kernel), "CompositeExplicitAutograd")


# Kept for as long as the module: a Library that is collected takes its operators along.
LIBRARIES = {namespace: _define(namespace) for namespace in (NATIVE, TRITON)}
_implement_reference(LIBRARIES[NATIVE])


def operator(name: str, backend: str) -> torch._ops.OpOverload:
    """The dispatcher's operator that a backend implements (``"native"`` or ``"triton"``)."""
    namespace = TRITON if backend == "triton" else NATIVE
    return getattr(getattr(torch.ops, namespace), name).default
