"""Triton without a GPU: the kernels in the interpreter, and compiled ahead of time for real chips."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ncsn_fast.kernels import langevin_step, philox  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SCORES = ("fp32", "bf16", "fp16", "fp64")
FLAGS = ("X_LAST", "SCORE_LAST", "NOISE_LAST", "CHANNEL_MINOR", "WIDE")


def test_interpreter(tmp_path):
    """Runs _triton_interpreted.py where TRITON_INTERPRET=1 is set before anything is imported."""
    report = tmp_path / "report.xml"
    tests = Path(__file__).with_name("_triton_interpreted.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    assert int(suite.get("tests")) >= 60 and int(suite.get("skipped")) == 0, result.stdout


def signature(kernel, types: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    """Every parameter's type, in order: the given ones, constants, and int32 for all others."""
    return {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }


def compile_kernel(kernel, target: GPUTarget, types: dict[str, str], constants: dict[str, object]):
    """As the launcher would compile it for these argument types, pointers being aligned to 16."""
    pointers = [name for name in types if types[name].startswith("*")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(
        kernel, signature(kernel, types, constants), constexprs=constants, attrs=aligned
    )
    return triton.compile(source, target=target, options={"enable_fp_fusion": True})


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


def cuda_resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory (where registers spill to)."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not binary.is_file():
        pytest.skip("this build of triton brings no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    usage = subprocess.check_output([binary, "-res-usage", file], text=True)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def check(name: str, compiled, folder: Path) -> str:
    """Fails on spills and on shared memory; prints a row; returns the assembly."""
    if "cubin" in compiled.asm:
        assembly = compiled.asm["ptx"]
        registers, spilled = cuda_resources(compiled.asm["cubin"], folder)
    else:
        assembly = compiled.asm["amdgcn"]
        found = dict(re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s+(\d+)", assembly))
        registers = int(found["vgpr_count"])
        spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
    shared = compiled.metadata.shared
    arch = compiled.metadata.target.arch
    print(f"{arch!s:7} {name:32} {registers:3} registers, {spilled} spilled, {shared} B shared")
    assert spilled == 0
    assert shared <= 4 * 4 * philox.GROUPS_PER_PROGRAM  # at most one exchange of the noise
    return assembly


def test_langevin_step_compiles(target, tmp_path):
    for name, variant in LANGEVIN.items():
        compiled = langevin_variant(target, *variant)
        assembly = check(name, compiled, tmp_path)
        if target.backend == "cuda" and "VECTOR" in variant:
            assert "ld.global.v4.b32" in assembly and "st.global.v4.b32" in assembly
            assert compiled.metadata.shared == 0


def test_philox_compiles(target, tmp_path):
    for name, flags in PHILOX.items():
        for kind in range(3):
            compiled = philox_variant(target, kind, *flags)
            assembly = check(f"philox {name} kind {kind}", compiled, tmp_path)
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
