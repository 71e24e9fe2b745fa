"""Triton without a GPU: the kernels in the interpreter, and compiled ahead of time for real chips."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from _triton_ahead import TARGETS, check, compile_kernel, launches_of  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from ncsn_fast.kernels import (  # noqa: E402
    cond_instance_norm_elu,
    langevin_step,
    max_pool5,
    philox,
)

EXCHANGE = 4 * 4 * philox.GROUPS_PER_PROGRAM  # bytes: at most one exchange of the noise
SCORES = ("fp32", "bf16", "fp16", "fp64")
FLAGS = ("X_LAST", "SCORE_LAST", "NOISE_LAST", "CHANNEL_MINOR", "WIDE")


@pytest.mark.parametrize(
    ("file", "least"), [("_triton_interpreted.py", 60), ("_triton_interpreted_network.py", 45)]
)
def test_interpreter(file, least, tmp_path):
    """Runs a file of tests where TRITON_INTERPRET=1 is set before anything is imported."""
    report = tmp_path / "report.xml"
    tests = Path(__file__).with_name(file)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    assert int(suite.get("tests")) >= least and int(suite.get("skipped")) == 0, result.stdout


def langevin_variant(target, score: str = "fp32", noise: str | None = None, *flags: str):
    """A variant of the Langevin kernel with these flags; DEVICE reads both scalars there."""
    device = "DEVICE" in flags
    types = {"x_ptr": "*fp32", "score_ptr": f"*{score}", "step_size": "fp32", "clip": "fp32"}
    constants: dict[str, object] = {"BLOCK": philox.GROUPS_PER_PROGRAM}
    constants |= {name: name in flags for name in ("VECTOR", *FLAGS)}
    optional = {
        "noise_ptr": noise and f"*{noise}",
        "step_size_ptr": "*fp32" if device else None,
        "step_ptr": "*i64" if device else None,
    }
    for name, kind in optional.items():
        if kind is None:
            constants[name] = None
        else:
            types[name] = kind
    return compile_kernel(langevin_step.langevin_step_kernel, target, types, constants)


def philox_variant(target: GPUTarget, kind: int, *flags: str):
    names = ("VECTOR", "CHANNELS_LAST", "CHANNEL_MINOR", "WIDE")
    constants = {"BLOCK": philox.GROUPS_PER_PROGRAM, "KIND": kind}
    constants |= {name: name in flags for name in names}
    types = {"out_ptr": "*i32" if kind == 0 else "*fp32"}
    return compile_kernel(philox.philox_kernel, target, types, constants)


# Every variant that a launch can ask for, less the products of independent choices.
LANGEVIN = {
    **{f"vector {score}": (score, None, "VECTOR") for score in SCORES},
    **{f"vector fp32 noise {noise}": ("fp32", noise, "VECTOR") for noise in SCORES},
    "vector device": ("fp32", None, "VECTOR", "DEVICE"),
    "vector wide": ("bf16", None, "VECTOR", "WIDE"),
    **{f"generic {score}": (score, None) for score in SCORES},
    "generic device": ("fp32", None, "DEVICE"),
    "generic wide": ("fp32", "fp64", "WIDE"),
    "score channels_last": ("bf16", None, "SCORE_LAST"),
    "x channels_last": ("bf16", None, "X_LAST"),
    **{
        f"channels_last {score}": (score, None, "X_LAST", "SCORE_LAST", "CHANNEL_MINOR")
        for score in SCORES
    },
    "channels_last noise": ("fp32", "fp32", "X_LAST", "SCORE_LAST", "NOISE_LAST", "CHANNEL_MINOR"),
    "channels_last wide": ("fp32", None, "X_LAST", "SCORE_LAST", "CHANNEL_MINOR", "WIDE"),
}
PHILOX = {
    "vector": ("VECTOR",),
    "vector wide": ("VECTOR", "WIDE"),
    "generic": (),
    "channels_last": ("CHANNELS_LAST", "CHANNEL_MINOR"),
    "channels_last odd": ("CHANNELS_LAST",),
    "channels_last wide": ("CHANNELS_LAST", "CHANNEL_MINOR", "WIDE"),
}


@pytest.fixture(scope="module", params=list(TARGETS))
def target(request, tmp_path_factory):
    """A target to compile for, with an empty cache, so that the compiler really runs."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield TARGETS[request.param]


def test_langevin_step_compiles(target, tmp_path):
    for name, variant in LANGEVIN.items():
        compiled = langevin_variant(target, *variant)
        assembly = check(name, compiled, tmp_path, EXCHANGE)
        if target.backend == "cuda" and "VECTOR" in variant:
            assert "ld.global.v4.b32" in assembly and "st.global.v4.b32" in assembly
            assert compiled.metadata.shared == 0


def test_philox_compiles(target, tmp_path):
    for name, flags in PHILOX.items():
        for kind in range(3):
            compiled = philox_variant(target, kind, *flags)
            assembly = check(f"philox {name} kind {kind}", compiled, tmp_path, EXCHANGE)
            if target.backend == "cuda" and "VECTOR" in flags:
                assert "st.global.v4.b32" in assembly
                assert compiled.metadata.shared == 0


@pytest.mark.parametrize("kernel", [langevin_step.langevin_step_kernel, philox.philox_kernel])
def test_no_value_compiles_a_kernel_anew(kernel):
    """No number is a constant of the kernel, nor specialised on being 1 or a multiple of 16."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    for parameter in kernel.params:
        if not parameter.is_constexpr:
            assert parameter.do_not_specialize != parameter.name.endswith("_ptr"), parameter.name


def test_numbers_are_int32():
    """Triton types an integer argument by its size: seeds and steps must not change it."""
    for value in (0, 1, 2**31, 2**32 - 1, -(2**63), 2**63 - 1, 2**40 + 5):
        for word in (philox.int32(value), philox.int32(value >> 32)):
            assert -(2**31) <= word < 2**31
        assert philox.int32(value) % 2**32 == value % 2**32


# --- the network's operators ----------------------------------------------------------------------


def norm_launches(n, channels, size, dtype, last, plusplus):
    """What forward and backward launch for a batch of images."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(n, channels, size, size, dtype=dtype, device="meta", memory_format=layout)
    weight = torch.empty(10, (3 if plusplus else 2) * channels, device="meta")
    labels = torch.empty(n, dtype=torch.int64, device="meta")

    def call() -> None:
        y, mean, rstd = cond_instance_norm_elu.cond_instance_norm_elu(x, labels, weight, 1e-5, True)
        cond_instance_norm_elu.cond_instance_norm_elu_backward(
            y, x, labels, weight, mean, rstd, True
        )

    return launches_of(cond_instance_norm_elu, call)


def pool_launches(n, channels, size, dtype, last):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(n, channels, size, size, dtype=dtype, device="meta", memory_format=layout)

    def call() -> None:
        max_pool5.max_pool5_backward(max_pool5.max_pool5(x, "zero"), x, "zero")

    return launches_of(max_pool5, call)


# Images of the default network, and the largest; for the other chips every kernel once.
NETWORK = {
    "norm nchw 32x32 fp32": partial(norm_launches, 256, 128, 32, torch.float32, False, False),
    "norm nchw 64x64 bf16": partial(norm_launches, 256, 128, 64, torch.bfloat16, False, False),
    "norm nhwc 32x32 bf16": partial(norm_launches, 256, 128, 32, torch.bfloat16, True, False),
    "norm nhwc 64x64 fp16": partial(norm_launches, 256, 128, 64, torch.float16, True, False),
    "norm nhwc 256x256 fp32": partial(norm_launches, 1, 32, 256, torch.float32, True, False),
    "norm++ nchw 32x32 bf16": partial(norm_launches, 16, 128, 32, torch.bfloat16, False, True),
    "norm++ nhwc 32x32 fp32": partial(norm_launches, 16, 128, 32, torch.float32, True, True),
    "norm nchw 33x33 bf16": partial(norm_launches, 16, 130, 33, torch.bfloat16, False, False),
    "norm nhwc 33x33 bf16": partial(norm_launches, 16, 130, 33, torch.bfloat16, True, False),
    "norm++ 1x1 fp32": partial(norm_launches, 16, 5, 1, torch.float32, False, True),
    "pool nchw 32x32 fp32": partial(pool_launches, 256, 128, 32, torch.float32, False),
    "pool nhwc 32x32 bf16": partial(pool_launches, 256, 128, 32, torch.bfloat16, True),
}
EVERYWHERE = ("norm nhwc 32x32 bf16", "norm++ nchw 32x32 bf16", "pool nhwc 32x32 bf16")


def test_network_compiles(target, tmp_path):
    compiled = set()
    for name in NETWORK if target is TARGETS["sm_90"] else EVERYWHERE:
        for launch in NETWORK[name]():
            if launch.variant() in compiled:
                continue
            compiled.add(launch.variant())
            # No tile changes its layout by way of shared memory: that would be tens of KiB.
            assembly = check(f"{name} {launch.name}", launch.compile(target), tmp_path, 8192)
            wide = launch.name != "weight_gradient_kernel" and (
                "32x32" in name and "pool nchw" not in name
            )
            if target.backend == "cuda" and wide:
                assert re.search(r"ld\.global\S*\.v[24]\.b32", assembly), name


def test_no_batch_size_compiles_the_network_anew():
    """A batch size chooses between the kernels, at most; it is no part of any of them."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    for size, last, plusplus in product((8, 32, 64, 256), (False, True), (False, True)):
        variants: dict[str, set[str]] = {}
        for n in (1, 2, 15, 16, 33, 256, 1000):
            launches = norm_launches(n, 64, size, torch.bfloat16, last, plusplus)
            for launch in launches + pool_launches(n, 64, size, torch.bfloat16, last):
                variants.setdefault(launch.name, set()).add(launch.variant())
        assert all(len(found) == 1 for found in variants.values()), (size, last, variants)
