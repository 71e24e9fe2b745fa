"""Chooses the backend of a call, in plain Python, from metadata alone (device, dtype, layout).

A backend serves a call if its library is loaded, it implements the operator, and ``LIMITS`` has no objection. A backend
that was asked for and cannot serve raises with the reason; ``auto`` takes the first that can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from . import extension
from .algorithms import (
    COMPOSED,
    CONV_ALGORITHMS,
    GEMM,
    WINOGRAD,
    Algorithm,
    dtype_of_call,
    names_of,
)
from .transforms import TENSORS, being_written_down, transform

BACKENDS = ("native", "triton", "reference")
OPERATORS = (
    "add_norm_elu",
    "avg_pool5",
    "cond_instance_norm_elu",
    "conv3x3",
    "langevin_step_",
    "max_pool5",
    "norm_elu_conv3x3",
    "philox_",
    "solver_step_",
)

# Operators that are made of others where no kernel does them at once. `select` answers COMPOSED for them where it would
# answer "reference" for any other: which backend ran is then a question to the parts. So a network runs on the CUDA or
# the Triton kernels by one `set_backend`, though the convolution is PyTorch's there.
CONVOLUTIONS = ("conv3x3", "norm_elu_conv3x3")
COMPOSITES = ("add_norm_elu", *CONVOLUTIONS)

# The order in which `auto` tries the backends. Triton on the CPU is its interpreter: only on request.
AUTO = {"cuda": ("native", "triton", "reference"), "cpu": ("native", "reference")}

# The policy: an operator's name, or "*" for all others, to a backend or "auto". A plain global, so that torch.compile
# guards on it and compiles anew when it changes.
_policy: dict[str, str] = {"*": "auto"}

# What :func:`recall` remembers, under this policy.
_decided: dict[object, str | Algorithm] = {}
_MOST_DECIDED = 4096  # calls of more sorts than these: forget them all and begin again
_NAMES = (str, int, NoneType)


class BackendError(RuntimeError):
    """A backend that was asked for cannot serve a call; the message says why."""


def _check_backend(name: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


def set_backend(name: str, op: str | None = None) -> None:
    """Choose the backend of every operator, or of one, for the whole process.

    Args:
        name: ``"native"`` (C++ or CUDA C++), ``"triton"``, ``"reference"`` (PyTorch) or ``"auto"``, the fastest
            that can serve the call.
        op: an operator's name, such as ``"langevin_step_"``; None for all of them.

    Raises:
        ValueError: an unknown backend or operator.
    """
    _check_backend(name)
    if op is not None and op not in OPERATORS:
        raise ValueError(f"op must be one of {', '.join(OPERATORS)}, got {op!r}")
    # A new one at once: another thread must not see it half made.
    _set_policy({"*": name} if op is None else {**_policy, op: name})


def _set_policy(policy: dict[str, str]) -> None:
    global _policy, _decided
    _policy = policy
    _decided = {}  # after the policy: whoever has the new one decides by the new policy


@contextmanager
def use_backend(name: str, op: str | None = None) -> Iterator[None]:
    """:func:`set_backend` for the length of a ``with`` block; it holds for all threads meanwhile."""
    before = _policy
    set_backend(name, op)
    try:
        yield
    finally:
        _set_policy(before)


def policy() -> dict[str, str]:
    """What :func:`set_backend` and :func:`use_backend` have chosen: operator, or "*" for all others, to backend."""
    return dict(_policy)


def layout_of(x: Tensor) -> str | None:
    """``"contiguous"``, ``"channels_last"`` (of 4 or 5 dimensions), or None for any other strides."""
    if x.is_contiguous():
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return "channels_last"
    return None


def _dense(*tensors: Tensor | None) -> str | None:
    for tensor in tensors:
        if tensor is not None and layout_of(tensor) is None:
            return f"strides {tuple(tensor.stride())} are neither contiguous nor channels_last"
    return None


def _mixed(x: Tensor, *others: Tensor | None) -> str | None:
    for other in others:
        if (
            other is not None
            and other.dtype != x.dtype
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return f"its tensors must have one dtype, got {names_of((x.dtype, other.dtype))}"
    return None


def _no_algorithm(backend: str, x: Tensor, *others: Tensor | None) -> str | None:
    """Why none of a backend's algorithms can serve a convolution of ``x`` with a weight, a bias and a residual."""
    reason = _mixed(x, *others)
    if reason is not None:
        return reason
    dtypes = [t.dtype for t in (x, *others) if t is not None]
    return _why_no_algorithm(backend, x.device.type, dtype_of_call(x), *dtypes)


@extension.constant  # torch.compile would take seconds to trace it for every convolution of a network
def _why_no_algorithm(backend: str, device_type: str, *dtypes: torch.dtype) -> str | None:
    reasons = [
        [algorithm.why_not(device_type, dtype) for dtype in dict.fromkeys(dtypes)]
        for algorithm in CONV_ALGORITHMS
        if algorithm.backend == backend
    ]
    if any(not any(reason) for reason in reasons):
        return None
    return next((why for reason in reasons for why in reason if why), f"{backend} has no algorithm")


def _solver_step(
    x: Tensor, score: Tensor, previous: Tensor | None, noise: Tensor | None
) -> str | None:
    if x.dtype != torch.float32:
        return f"it computes in float32, got {x.dtype}"
    if noise is not None:
        return "explicit noise goes through the reference alone"
    if previous is not None and layout_of(previous) != layout_of(x):
        return f"previous must have the layout of x, got strides {tuple(previous.stride())}"
    return _dense(x, score)


# Operator -> what a fast kernel cannot do with these tensors, or None. (The arguments were checked to be legal before.)
LIMITS: dict[str, Callable[..., str | None]] = {
    "add_norm_elu": lambda x, labels=None, weight=None, residual=None: _dense(x, residual),
    "avg_pool5": _dense,
    "cond_instance_norm_elu": lambda x, labels, weight: _dense(x),
    "conv3x3": lambda x, *rest: _dense(x),
    "conv_direct": lambda x, *rest: _dense(x) or _mixed(x, *rest),
    "langevin_step_": _dense,
    "max_pool5": _dense,
    "norm_elu_conv3x3": lambda x, *rest: _dense(x),
    "philox_": _dense,
    "solver_step_": _solver_step,
}


def _triton_norm(x: Tensor, *rest: Tensor | None) -> str | None:
    if x.dtype == torch.float64:
        return "it has no float64 arithmetic"
    size = x.shape[2:].numel()
    return f"its planes are below 2**30 elements, these have {size}" if size >= 2**30 else None


# The same for the Triton kernels alone.
TRITON_LIMITS: dict[str, Callable[..., str | None]] = {
    "add_norm_elu": _triton_norm,
    "cond_instance_norm_elu": _triton_norm,
    # Of the dtype alone: where Triton runs, and so its interpreter on a CPU, was settled before.
    "conv_direct": lambda x, *rest: GEMM.why_not(GEMM.devices[0], x.dtype),
}


def _why_no_gemm(op: str, x: Tensor, *rest: Tensor | None) -> str | None:
    """Why the matrix product cannot serve a convolution's tensors; None if it can."""
    others = rest[2:] if op == "norm_elu_conv3x3" else rest
    return transform() or why_not(GEMM.backend, "conv_direct", x.device.type, x, *others)


def select_convolution(
    op: str, backend: str | None, conv_algo: str, dilation: int, *tensors: Tensor | None
) -> Algorithm:
    """:func:`select`, and among ``CONV_ALGORITHMS`` the one to use.

    Raises:
        BackendError: as :func:`select`; the algorithm asked for cannot serve the call.
        ValueError: as :func:`select`; an unknown ``conv_algo``.
    """
    names = [algorithm.name for algorithm in CONV_ALGORITHMS]
    if conv_algo != "auto" and conv_algo not in names:
        known = ", ".join(("auto", *sorted(set(names))))
        raise ValueError(f"conv_algo must be one of {known}, got {conv_algo!r}")
    x, choice = tensors[0], _choice_of(op, backend)
    # Asked for by name: PyTorch, to fall back on, has neither this one nor the next.
    if conv_algo == GEMM.name:
        reason = _why_no_gemm(op, *tensors)
        if backend not in (None, "auto", GEMM.backend):
            reason = f"it is of {GEMM.backend}, not of {backend}"
        if reason is not None:
            raise BackendError(f"conv_algo {conv_algo!r} cannot serve {op}: {reason}")
        return GEMM
    chosen = select(op, backend, *tensors)
    if conv_algo == WINOGRAD.name:
        reason = transform() or why_not(WINOGRAD.backend, op, x.device.type, *tensors)
        if reason is not None:
            raise BackendError(f"conv_algo {conv_algo!r} cannot serve {op}: {reason}")
        return WINOGRAD
    if conv_algo == choice == "auto" and chosen == COMPOSED and not being_written_down():
        if GEMM.pays(x, dilation) and _why_no_gemm(op, *tensors) is None:
            return GEMM
    # A backend that was asked for by the call: its first algorithm, whether it pays or not.
    return next(
        algorithm
        for algorithm in CONV_ALGORITHMS
        if algorithm.backend in (chosen, COMPOSED)
        and conv_algo in ("auto", algorithm.name)
        and (backend is not None or algorithm.pays(x, dilation))
    )


def _why_absent(backend: str, device_type: str) -> str | None:
    """Why a backend has no kernels at all on a device here; None if it has."""
    if device_type not in AUTO:
        return f"there are no {backend} kernels for device type {device_type!r}"
    if backend == "triton" and device_type == "cpu" and not extension.interpreting():
        return "triton has no CPU kernels (TRITON_INTERPRET=1 interprets them, slowly)"
    return extension.status("triton" if backend == "triton" else device_type)


def why_not(backend: str, op: str, device_type: str, *tensors: Tensor | None) -> str | None:
    """Why a backend cannot serve the operator on a device (and with these tensors, if given); None if it can."""
    if backend == "reference":
        return None
    reason = _why_absent(backend, device_type)
    if reason is not None:
        return reason
    if not extension.has_kernel(op, backend, device_type):
        return f"{op} has no {backend} kernel for {device_type}"
    if not tensors:
        return None
    reason = LIMITS[op](*tensors)
    if reason is None and op in CONVOLUTIONS:
        others = tensors[3:] if op == "norm_elu_conv3x3" else tensors[1:]
        reason = _no_algorithm(backend, tensors[0], *others)
    if reason is None and backend == "triton" and op in TRITON_LIMITS:
        reason = TRITON_LIMITS[op](*tensors)
    return reason


def _choice_of(op: str, backend: str | None) -> str:
    return _policy.get(op, _policy["*"]) if backend is None else _check_backend(backend)


def select(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that serves this call; ``COMPOSED`` for one of ``COMPOSITES`` that no kernel serves as a whole.

    Raises:
        BackendError: the backend asked for, by the call or by :func:`set_backend`, cannot serve it. One that was chosen
            for all operators need not have a kernel for a whole of ``COMPOSITES``: it then serves the parts.
        ValueError: there is no backend of that name.
    """
    plain = COMPOSED if op in COMPOSITES else "reference"
    choice = _choice_of(op, backend)
    reason = transform()
    if reason is not None:
        if choice in ("auto", "reference"):
            return plain
        raise BackendError(f"backend {choice!r} cannot serve {op}: {reason}")
    device_type = tensors[0].device.type
    if choice == "reference":
        return plain
    if choice != "auto":
        reason = why_not(choice, op, device_type, *tensors)
        if reason is None:
            return choice
        # Chosen for all operators, it serves those parts that it has kernels for. A sum is no part to ask a kernel for.
        of_parts = (backend is None and op not in _policy) or op not in CONVOLUTIONS
        if of_parts and op in COMPOSITES and _why_absent(choice, device_type) is None:
            return plain
        raise BackendError(f"backend {choice!r} cannot serve {op}: {reason}")
    if being_written_down():  # a graph that runs without this package
        return plain
    for name in AUTO.get(device_type, ()):
        if name != "reference" and why_not(name, op, device_type, *tensors) is None:
            return name
    return plain


def recall(
    op: str, backend: str | None, tensors: tuple[object, ...], *options: object
) -> tuple[dict[object, Any], object]:
    """What was chosen for calls under the present policy, and this call's key among them.

    Whether the arguments are legal and who serves them follows from metadata. In a network of 80 units, of which a
    kernel computes some in 20 us, asking anew at every call would take longer than the arithmetic.

    Args:
        op: the operator.
        backend: as of the call.
        tensors: those of the call, in whose place there may be anything.
        options: what else the checks and the choice depend on.

    Returns:
        A dictionary and a key: ``chosen = memory.get(key)`` is None for a call that must be checked and decided, which
        ``memory[key] = ...`` then keeps. Of a call that is traced or transformed nothing is kept.
    """
    global _decided
    nothing = {}, None
    if torch.compiler.is_compiling() or transform() is not None or being_written_down():
        return nothing
    key: list[object] = [op, backend, *options]
    if any(type(option) not in _NAMES for option in key) or tensors[0] is None:
        return nothing
    for t in tensors:
        if t is None:
            key.append(None)
        elif type(t) in TENSORS and t.layout == torch.strided:
            key += (t.shape, t.stride(), t.dtype, t.device)
        else:
            return nothing
    device_type = tensors[0].device.type
    key.append(torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type))
    if len(_decided) > _MOST_DECIDED:
        _decided = {}
    return _decided, tuple(key)


# Set to nothing is as good as not set, as of any environment variable.
_wanted = os.environ.get("NCSN_FAST_BACKEND", "").strip() or "auto"
try:
    set_backend(_wanted)
except ValueError as error:
    raise ValueError(f"environment variable NCSN_FAST_BACKEND: {error}") from None
