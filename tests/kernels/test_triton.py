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

from support.triton_ahead import TARGETS, check, compile_kernel, launches_of  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from ncsn_fast.kernels import (  # noqa: E402
    avg_pool5,
    cond_instance_norm_elu,
    cond_instance_norm_elu_backward,
    langevin_step,
    max_pool5,
    philox,
    planes,
    solver_step,
    tune,
    tuned,
)
from ncsn_fast.ops import dispatch, extension  # noqa: E402
from ncsn_fast.ops.schema import PADDINGS  # noqa: E402

EXCHANGE = 4 * 4 * philox.GROUPS_PER_PROGRAM  # bytes: at most one exchange of the noise
SCORES = ("fp32", "bf16", "fp16", "fp64")
FLAGS = ("X_LAST", "SCORE_LAST", "NOISE_LAST", "CHANNEL_MINOR", "WIDE")


@pytest.mark.parametrize(
    ("tests", "least"),
    [
        ("kernels/_interpreted_noise.py", 60),
        ("kernels/_interpreted_norm_and_pools.py", 45),
        ("ops", 60),  # those of the fixture `backend`
    ],
)
def test_interpreter(tests, least, tmp_path):
    """Runs tests where TRITON_INTERPRET=1 is set before anything is imported."""
    report = tmp_path / "report.xml"
    tests = Path(__file__).parents[1] / tests
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


def solver_variant(target, score: str = "fp32", *flags: str):
    """A variant of the solvers' kernel; MEMORY has the previous state, DEVICE reads both numbers there."""
    types = {"x_ptr": "*fp32", "score_ptr": f"*{score}", "table_ptr": "*fp32"}
    names = ("NOISY", "VECTOR", "X_LAST", "SCORE_LAST", "CHANNEL_MINOR", "WIDE")
    constants: dict[str, object] = {"BLOCK": philox.GROUPS_PER_PROGRAM}
    constants |= {name: name in flags for name in names}
    device = "*i64" if "DEVICE" in flags else None
    optional = {"previous_ptr": "*fp32" if "MEMORY" in flags else None}
    optional |= {"level_ptr": device, "step_ptr": device}
    for name, kind in optional.items():
        if kind is None:
            constants[name] = None
        else:
            types[name] = kind
    return compile_kernel(solver_step.solver_step_kernel, target, types, constants)


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
SOLVER = {
    **{f"vector {score}": (score, "VECTOR", "NOISY") for score in SCORES},
    "vector memory": ("fp32", "VECTOR", "NOISY", "MEMORY", "DEVICE"),
    "vector without noise": ("fp32", "VECTOR", "MEMORY", "WIDE"),
    "generic": ("bf16", "NOISY", "MEMORY"),
    "generic device": ("fp32", "NOISY", "DEVICE"),
    "channels_last": ("bf16", "NOISY", "MEMORY", "X_LAST", "SCORE_LAST", "CHANNEL_MINOR"),
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


def test_solver_step_compiles(target, tmp_path):
    for name, variant in SOLVER.items():
        compiled = solver_variant(target, *variant)
        assembly = check(f"solver {name}", compiled, tmp_path, EXCHANGE)
        if target.backend == "cuda" and "VECTOR" in variant:
            assert "ld.global.v4.b32" in assembly and "st.global.v4.b32" in assembly


def test_philox_compiles(target, tmp_path):
    for name, flags in PHILOX.items():
        for kind in range(3):
            compiled = philox_variant(target, kind, *flags)
            assembly = check(f"philox {name} kind {kind}", compiled, tmp_path, EXCHANGE)
            if target.backend == "cuda" and "VECTOR" in flags:
                assert "st.global.v4.b32" in assembly
                assert compiled.metadata.shared == 0


@pytest.mark.parametrize(
    "kernel",
    [langevin_step.langevin_step_kernel, philox.philox_kernel, solver_step.solver_step_kernel],
)
def test_no_value_compiles_a_kernel_anew(kernel):
    """No number is a constant of the kernel, nor specialised on being 1 or a multiple of 16."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    for parameter in kernel.params:
        if not parameter.is_constexpr:
            assert parameter.do_not_specialize != parameter.name.endswith("_ptr"), parameter.name


def test_a_slice_of_a_table_compiles_nothing_anew():
    """The levels' step sizes stand side by side: only the first lies at a multiple of 16 bytes."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    kernel = langevin_step.langevin_step_kernel
    target = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, target)
    x, table, steps = torch.zeros(8), torch.zeros(8), torch.zeros(8, dtype=torch.int64)
    numbers = {"total_groups": 1, "groups": 1, "channels": 1, "spatial": 1, "clip": 1.0}
    numbers |= {"step_size": 0.0, "seed_lo": 0, "seed_hi": 0, "step": 0, "sample_offset": 0}
    constants = {p.name: 1 for p in kernel.params if p.is_constexpr}
    variants = {
        repr(
            bind(
                x_ptr=x,
                score_ptr=x,
                noise_ptr=None,
                step_size_ptr=table[level:],
                step_ptr=steps[level:],
                **numbers,
                **constants,
            )[1]
        )
        for level in range(3)
    }
    assert len(variants) == 1


def test_numbers_are_int32():
    """Triton types an integer argument by its size: seeds and steps must not change it."""
    for value in (0, 1, 2**31, 2**32 - 1, -(2**63), 2**63 - 1, 2**40 + 5):
        for word in (philox.int32(value), philox.int32(value >> 32)):
            assert -(2**31) <= word < 2**31
        assert philox.int32(value) % 2**32 == value % 2**32


# --- the network's operators ----------------------------------------------------------------------


def norm_launches(n, channels, size, dtype, last, plusplus, elu=True):
    """What forward and backward launch for a batch of images."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(n, channels, size, size, dtype=dtype, device="meta", memory_format=layout)
    weight = torch.empty(10, (3 if plusplus else 2) * channels, device="meta")
    labels = torch.empty(n, dtype=torch.int64, device="meta")
    mean = torch.empty(n, channels, device="meta")
    inputs = (x, labels, weight)
    return launches_of(
        cond_instance_norm_elu,
        lambda: cond_instance_norm_elu.cond_instance_norm_elu(*inputs, 1e-5, elu),
    ) + launches_of(
        cond_instance_norm_elu_backward,
        lambda: cond_instance_norm_elu_backward.cond_instance_norm_elu_backward(
            x, *inputs, mean, mean, elu
        ),
    )


def sum_launches(n, channels, size, dtype, last, plusplus):
    """What add_norm_elu launches: its gradient is that of the norm."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(n, channels, size, size, dtype=dtype, device="meta", memory_format=layout)
    weight = torch.empty(10, (3 if plusplus else 2) * channels, device="meta")
    labels, bias = torch.empty(n, dtype=torch.int64, device="meta"), weight[0, :channels]
    return launches_of(
        cond_instance_norm_elu,
        lambda: cond_instance_norm_elu.add_norm_elu(x, bias, x, labels, weight, 1e-5, True),
    )


def pool_launches(n, channels, size, dtype, last, padding="neg_inf"):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(n, channels, size, size, dtype=dtype, device="meta", memory_format=layout)

    def call() -> None:
        border = PADDINGS[padding]
        max_pool5.max_pool5_backward(max_pool5.max_pool5(x, border), x, border)

    return launches_of(max_pool5, call)


def mean_launches(n, channels, size, dtype, last):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(n, channels, size, size, dtype=dtype, device="meta", memory_format=layout)
    return launches_of(avg_pool5, lambda: avg_pool5.avg_pool5(x))


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Sizes of the network, large and odd ones; the first eight have every kernel, and are for every chip.
NETWORK = {
    "norm nhwc 32x32 bf16": partial(norm_launches, 256, 128, 32, BF16, True, False),
    "norm nchw 32x32 bf16": partial(norm_launches, 256, 128, 32, BF16, False, False),
    "norm nhwc 64x64 fp16": partial(norm_launches, 256, 128, 64, F16, True, False),
    "norm++ nhwc 32x32 bf16": partial(norm_launches, 1, 128, 32, BF16, True, True),
    "pool nhwc 32x32 bf16": partial(pool_launches, 256, 128, 32, BF16, True),
    "mean nhwc 32x32 bf16": partial(mean_launches, 256, 128, 32, BF16, True),
    "sum nhwc 32x32 bf16": partial(sum_launches, 256, 128, 32, BF16, True, False),
    "sum++ nhwc 32x32 bf16": partial(sum_launches, 1, 128, 32, BF16, True, True),
    "norm nhwc 32x32 fp32": partial(norm_launches, 256, 128, 32, F32, True, False),
    "norm nchw 32x32 fp32": partial(norm_launches, 256, 128, 32, F32, False, False),
    "sum nhwc 32x32 fp32": partial(sum_launches, 256, 128, 32, F32, True, False),
    "sum nhwc 64x64 fp16": partial(sum_launches, 256, 128, 64, F16, True, False),
    "norm nhwc 28x28 bf16": partial(norm_launches, 256, 128, 28, BF16, True, False),
    "norm nchw 256x256 fp32": partial(norm_launches, 64, 32, 256, F32, False, False),
    "norm++ nchw 32x32 fp32": partial(norm_launches, 16, 128, 32, F32, False, True),
    "norm nhwc 33x33x130 bf16": partial(norm_launches, 16, 130, 33, BF16, True, False),
    "pool nchw 32x32 fp32 zero": partial(pool_launches, 256, 128, 32, F32, False, "zero"),
}
EVERYWHERE = tuple(NETWORK)[:8]
# Bytes. A tile that changed its layout by way of shared memory would take tens of KiB.
MOST_SHARED = {"cuda": 8192, "hip": 16384}


def test_network_compiles(target, tmp_path):
    compiled = set()
    for name in NETWORK if target is TARGETS["sm_90"] else EVERYWHERE:
        for launch in NETWORK[name]():
            if launch.variant() in compiled:
                continue
            compiled.add(launch.variant())
            most_shared = MOST_SHARED[target.backend]
            assembly = check(f"{name} {launch.name}", launch.compile(target), tmp_path, most_shared)
            vectors = "32x32" in name and launch.name != "weight_gradient_kernel"
            if target.backend == "cuda" and vectors:
                assert re.search(r"ld\.global\S*\.v4\.b32", assembly), name
                unstored = ("statistics_kernel", "gradient_sums_kernel", "place_kernel")
                if launch.name not in unstored or launch.types.get("z_ptr"):
                    assert re.search(r"st\.global\S*\.v4\.b32", assembly), name


def test_every_kernel_is_compiled_everywhere():
    names = {launch.name for name in EVERYWHERE for launch in NETWORK[name]()}
    for module in (avg_pool5, cond_instance_norm_elu, cond_instance_norm_elu_backward, max_pool5):
        assert {n for n in vars(module) if re.fullmatch(r"(?!in_one)\w+_kernel", n)} <= names


def test_no_batch_size_compiles_the_network_anew():
    """A batch chooses between kernels, and whether a plane's parts are one or several; nothing else."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    for size, last, plusplus in product((8, 32, 64, 256), (False, True), (False, True)):
        variants: dict[tuple, set[str]] = {}
        for n in (1, 2, 15, 16, 33, 256, 500):
            launches = norm_launches(n, 64, size, BF16, last, plusplus)
            for launch in launches + pool_launches(n, 64, size, BF16, last):
                parts = launch.constants.get("SPLITS")
                variants.setdefault((launch.name, parts), set()).add(launch.variant())
        assert all(len(found) == 1 for found in variants.values()), (size, last, variants)
        assert {parts for _, parts in variants} <= {None, 1, planes.MAX_SPLITS}


def test_sizes_compile_by_powers_of_two():
    """Of image sizes between two powers of two, those that a tile does not cover exactly share a variant."""
    variants = {
        launch.variant()
        for size in (24, 28)
        for launch in norm_launches(64, 128, size, BF16, True, False)
    }
    assert len(variants) == 3


def test_small_batches_keep_many_multiprocessors_busy():
    """One image is reduced in parts, by as many programs as it has tiles, or dozens."""
    for size, last in product((64, 128, 256), (False, True)):
        kernels = {launch.name: launch for launch in norm_launches(1, 32, size, BF16, last, True)}
        assert kernels["statistics_kernel"].programs >= min(64, 32 * size * size // 4096)


def test_auto_takes_triton_where_no_cuda_kernels_are(monkeypatch):
    """The choice is made from metadata: no GPU is needed to see it."""
    pairs = product(dispatch.OPERATORS, ("native", "triton"))
    kernels = {
        (op, backend, "cuda"): backend == "triton" and op not in dispatch.COMPOSITES
        for op, backend in pairs
    }
    monkeypatch.setattr(extension, "_kernels", kernels)
    monkeypatch.setitem(extension._status, "cuda", "the CUDA extension is not built")
    monkeypatch.setitem(extension._status, "triton", None)
    with FakeTensorMode():
        for layout, dtype in product((torch.contiguous_format, torch.channels_last), (F32, BF16)):
            x = torch.empty(2, 4, 8, 8, device="cuda", dtype=dtype, memory_format=layout)
            labels = torch.zeros(2, dtype=torch.int64, device="cuda")
            weight = torch.empty(3, 8, device="cuda")
            assert dispatch.select("cond_instance_norm_elu", None, x, labels, weight) == "triton"
            assert dispatch.select("max_pool5", None, x) == "triton"
            assert dispatch.select("langevin_step_", None, x.float(), x, None) == "triton"
            with pytest.raises(dispatch.BackendError, match="not built"):
                dispatch.select("max_pool5", "native", x)
        double = x.double()
        assert (
            dispatch.select("cond_instance_norm_elu", None, double, labels, weight) == "reference"
        )
        monkeypatch.setitem(extension._status, "triton", "triton is not installed")
        assert dispatch.select("max_pool5", None, x) == "reference"


# --- measured tile sizes --------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NCSN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "_table", None)
    return tmp_path / "cache" / "triton_tiles.json"


def test_tune_keeps_the_fastest_and_the_kernels_use_it(cache):
    """With a made-up clock: the tile with the most warps is the fastest."""

    def clock(call) -> float:
        launches = launches_of(cond_instance_norm_elu, call)
        return 1.0 / launches[0].options["num_warps"]

    before = norm_launches(4, 32, 16, BF16, True, False)[0]
    found = tune.tune("norm", (400, 32, 16, 16), BF16, last=True, clock=clock, device="meta")
    assert found.best.warps == max(tile.warps for tile in found.seconds)
    assert all(tile.planes >= 16 for tile in found.seconds) and len(found.seconds) > 3
    after = norm_launches(400, 32, 15, BF16, True, False)[0]
    assert after.options["num_warps"] == found.best.warps != before.options["num_warps"]
    # Other sizes, dtypes and processes.
    assert norm_launches(4, 32, 16, F32, True, False)[0].options != after.options
    tuned._table = None
    assert norm_launches(4, 32, 16, BF16, True, False)[0].options == after.options


@pytest.mark.parametrize("text", ["", "[1, 2]", "{not json", '{"another machine": {}}'])
def test_a_broken_cache_is_no_cache(cache, text):
    expected = norm_launches(4, 32, 16, BF16, True, False)[0].variant()
    cache.parent.mkdir()
    cache.write_text(text)
    tuned._table = None
    assert norm_launches(4, 32, 16, BF16, True, False)[0].variant() == expected


def test_tune_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main(["--quick"]) == 1
    assert "GPU" in capsys.readouterr().err
