"""Loads the compiled and the Triton kernels, each once, in silence, and remembers why one could not be loaded.

``ncsn_fast`` works with no compiler, no GPU and no Triton; only a wrong ``NCSN_FAST_SIMD`` raises (ValueError). The C++
kernels load with the package; those for a GPU when they are first needed, so that an import touches no driver. The
reasons are shown by ``ncsn_fast.info`` and by the error of a backend that was asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from . import schema

_Answer = TypeVar("_Answer")

BUILD_COMMAND = "pip install --no-build-isolation ."

# Operators in Triton, and the files in kernels/ that have them; the function that launches one has its name.
TRITON_KERNELS = {
    "add_norm_elu": "cond_instance_norm_elu",
    "avg_pool5": "avg_pool5",
    "conv_direct": "conv3x3",
    "cond_instance_norm_elu": "cond_instance_norm_elu",
    "cond_instance_norm_elu_backward": "cond_instance_norm_elu_backward",
    "langevin_step_": "langevin_step",
    "max_pool5": "max_pool5",
    "max_pool5_backward": "max_pool5",
    "philox_": "philox",
    "solver_step_": "solver_step",
}

_status: dict[str, str | None] = {}
_kernels: dict[tuple[str, str, str], bool] = {}  # asked only once the library is loaded
_lock = threading.Lock()


def constant(function: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Lets torch.compile call the function while it traces, and take its answer as a constant, without a guard.

    ``torch.compiler.assume_constant_result`` does the same, and imports the whole compiler for it.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def status(library: str) -> str | None:
    """None if the kernel library (``"cpu"``, ``"cuda"`` or ``"triton"``) is loaded, else the reason why it is not."""
    if library not in _status:
        with _lock:
            if library not in _status:
                _status[library] = _LOADERS[library]()
    return _status[library]


# What goes wrong in a library that was built for another Python, torch or CUDA.
_LOAD_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)


def shadowed() -> str | None:
    """What to do where this package hides another, as a clone's sources do an installed one; None if it hides none."""
    here = Path(__file__).resolve().parent.parent
    for entry in sys.path:
        other = Path(entry, here.name).resolve()
        if other != here and (other / "__init__.py").is_file():
            return (
                f"imported from {here}, which hides the one installed at {other}: run from another folder, "
                f"by python -P or PYTHONSAFEPATH=1, or install this one by pip install --no-build-isolation -e ."
            )
    return None


def _load_cpu() -> str | None:
    if importlib.util.find_spec("ncsn_fast._C") is None:
        hides = shadowed()
        if hides is not None:
            return f"the C++ extension is not beside the sources that run: {hides}"
        return f"the C++ extension is not built: with torch and a C++ compiler, in a clone, {BUILD_COMMAND}"
    try:
        importlib.import_module("ncsn_fast._C")
    except _LOAD_ERRORS as error:
        return f"the C++ extension does not load: {error}"
    return _stale()


def _stale() -> str | None:
    """Why the compiled kernels must not be called: they were built for other schemas, so arguments would be misread."""
    kernels = importlib.import_module("ncsn_fast._C")
    same = kernels.build_config().get("schemas") == schema.fingerprint()
    if same and hasattr(kernels, "packs_late"):  # which the schemas do not tell of
        return None
    return f"the C++ extension is of another version of the sources: build it anew, {BUILD_COMMAND}"


def _load_cuda() -> str | None:
    spec = importlib.util.find_spec("ncsn_fast._C_cuda")
    if spec is None or spec.origin is None:
        if torch.version.cuda is None:
            return f"the CUDA extension is not built: this torch, {torch.__version__}, has no CUDA"
        return f"the CUDA extension is not built: with nvcc, NCSN_FAST_BUILD=cuda {BUILD_COMMAND}"
    if not torch.cuda.is_available():
        return "the CUDA extension is built, but torch sees no CUDA device"
    try:
        if (stale := _stale()) is not None:  # the two are built together
            return stale
        torch.ops.load_library(spec.origin)
    except _LOAD_ERRORS as error:
        return f"the CUDA extension does not load: {error}"
    return None


def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not (torch.cuda.is_available() or interpreting()):
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    try:
        kernels = {
            name: getattr(importlib.import_module(f"ncsn_fast.kernels.{file}"), name)
            for name, file in TRITON_KERNELS.items()
        }
    except _LOAD_ERRORS as error:
        return f"triton does not load: {error}"
    library = schema.LIBRARIES[schema.TRITON]
    for key in ("CUDA", "CPU") if interpreting() else ("CUDA",):
        for name, kernel in kernels.items():
            library.impl(name, kernel, key)
    return None


_LOADERS = {"cpu": _load_cpu, "cuda": _load_cuda, "triton": _load_triton}


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def build_config() -> dict[str, object] | None:
    """Compiler, flags, SIMD levels and versions of the compiled part; None if it is not loaded."""
    if status("cpu") is not None:
        return None
    return dict(importlib.import_module("ncsn_fast._C").build_config())


@constant
def has_kernel(op: str, backend: str, device_type: str) -> bool:
    """Whether the backend's loaded library implements the operator for the device type."""
    key = (op, backend, device_type)
    if key not in _kernels:  # asking the dispatcher costs as much as a small operator
        namespace = schema.TRITON if backend == "triton" else schema.NATIVE
        _kernels[key] = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{namespace}::{op}", device_type.upper()
        )
    return _kernels[key]


status("cpu")
