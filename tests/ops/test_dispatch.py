"""Which backend serves a call, and what is said when one cannot; the package without its extension."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import ncsn_fast
from ncsn_fast import info, ops, set_backend, use_backend
from ncsn_fast.ops import algorithms, dispatch, extension, schema
from ncsn_fast.ops.algorithms import (
    COMPOSED,
    COMPOSED_DIRECT,
    CONV_ALGORITHMS,
    DIRECT,
    GEMM,
    WINOGRAD,
)


def ran_by(record_backends, **arguments):
    x = torch.zeros(2, 3, 4, 4)
    with record_backends() as ran:
        ops.langevin_step_(x, x.clone(), 0.1, seed=1, **arguments)
    assert len(ran) <= 1
    return ran[0][1] if ran else "reference"


@pytest.fixture(autouse=True)
def policy_restored():
    with use_backend("auto"):
        yield


def test_the_extension_is_built_and_loaded():
    assert extension.status("cpu") is None
    assert extension.build_config()["torch"] == torch.__version__


def test_auto_call_block_and_process(record_backends):
    assert ran_by(record_backends) == "native"
    assert ran_by(record_backends, backend="reference") == "reference"
    with use_backend("reference"):
        assert ran_by(record_backends) == "reference"
        assert ran_by(record_backends, backend="native") == "native"
        with use_backend("native", op="langevin_step_"):
            assert ran_by(record_backends) == "native"
        assert ran_by(record_backends) == "reference"
    assert ran_by(record_backends) == "native"
    set_backend("reference", op="langevin_step_")
    assert ran_by(record_backends) == "reference"
    assert dispatch.policy() == {"*": "auto", "langevin_step_": "reference"}
    set_backend("auto")  # for all of them
    assert dispatch.policy() == {"*": "auto"}


def test_policy_is_restored_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.policy() == {"*": "auto"}


def test_unknown_names():
    with pytest.raises(ValueError, match="native, triton, reference or auto, got 'cudnn'"):
        set_backend("cudnn")
    with pytest.raises(ValueError, match="op must be one of .*langevin_step_.*got 'relu'"):
        set_backend("native", op="relu")


def test_a_backend_that_cannot_serve_says_why():
    x, labels, weight = torch.zeros(2, 3, 4, 4), torch.tensor([0]), torch.ones(1, 6)
    with pytest.raises(RuntimeError, match="'triton' cannot serve max_pool5: triton has no CPU"):
        ops.max_pool5(x, backend="triton")
    convolution = torch.zeros(3, 3, 3, 3)
    with pytest.raises(RuntimeError, match="'triton' cannot serve norm_elu_conv3x3: triton has no"):
        ops.norm_elu_conv3x3(x, labels, weight, convolution, None, backend="triton")
    for backend, dtype, why in (
        ("triton", torch.float32, "triton has no CPU"),
        ("native", torch.float64, "winograd takes float32, bfloat16, float16, got float64"),
    ):
        images, kernels = x.to(dtype), convolution.to(dtype)
        for convolve in (ops.conv3x3, ops.elu_conv3x3, ops.conv3x3_mean_pool):
            with pytest.raises(RuntimeError, match=f"'{backend}' cannot serve conv3x3: {why}"):
                convolve(images, kernels, None, backend=backend)
            with use_backend(backend, op="conv3x3"), pytest.raises(RuntimeError, match=why):
                convolve(images, kernels, None)
        with pytest.raises(RuntimeError, match=why):
            ops.norm_elu_conv3x3(images, labels, weight, kernels, None, backend=backend)
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton has no CPU"):
        ops.conv3x3(x, convolution, None)  # it is not there for any part
    with pytest.raises(RuntimeError, match="must have one dtype, got float32, bfloat16"):
        ops.conv3x3(x, convolution.bfloat16(), None, backend="native")


def test_a_backend_for_all_operators_serves_the_parts_that_it_can(record_backends):
    x, labels, weight = (
        torch.ones(2, 3, 4, 4).double(),
        torch.tensor([0]),
        torch.ones(1, 6).double(),
    )
    with use_backend("native"), record_backends() as ran:
        ops.norm_elu_conv3x3(x, labels, weight, torch.ones(3, 3, 3, 3).double(), None)
    assert ran == [("cond_instance_norm_elu", "native")]  # and PyTorch's convolution of float64


def test_a_compiled_function_follows_the_policy():
    @torch.compile(fullgraph=True, backend="eager")
    def call(x):
        return ops.langevin_step_(x, torch.zeros_like(x), 0.1, seed=1)

    x = torch.zeros(2, 3, 4, 4)
    for backend in ("auto", "reference", "native"):
        with use_backend(backend):
            call(x)  # compiles
            with torch.profiler.profile() as profile:
                call(x)
        names = {event.key for event in profile.key_averages()}
        assert ("ncsn_fast::langevin_step_" in names) == (backend != "reference")


# --- in a process of their own --------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_is_silent_and_needs_only_the_core():
    code = (
        "import sys, ncsn_fast; extras = {'typer', 'matplotlib', 'sklearn', 'PIL', 'triton', 'scipy'};"
        "print(sorted(extras & set(sys.modules)))"
    )
    result = python(code)
    assert (result.returncode, result.stderr, result.stdout.strip()) == (0, "", "[]")


def test_environment_variable():
    code = "from ncsn_fast.ops import dispatch; print(dispatch.policy())"
    assert "'*': 'reference'" in python(code, NCSN_FAST_BACKEND="reference").stdout
    wrong = python(code, NCSN_FAST_BACKEND="fast")
    assert "NCSN_FAST_BACKEND: backend must be one of" in wrong.stderr


HIDE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {hidden} else find(name, *a)
"""

WITHOUT_EXTENSION = """
import torch, ncsn_fast
from ncsn_fast import ops
from ncsn_fast.ops import extension
assert "not built" in extension.status("cpu"), extension.status("cpu")
assert extension.build_config() is None
assert "ncsn_fast._C" not in sys.modules
x = torch.zeros(2, 1, 8, 8)
ops.langevin_step_(x, x.clone(), 0.5, seed=1234)
torch.ops.ncsn_fast.langevin_step_(x, x.clone(), None, 0.5, None, 1234, 0, None, 0, None)
model = ncsn_fast.NCSN(in_channels=1, nf=4, num_classes=2)
model.set_sigmas(model.make_sigmas(1.0, 0.1, 2))
out = model.sample(2, 8, 1, 2, 1e-3, seed=1, verbose=False)
assert out.shape == (2, 1, 8, 8) and out.isfinite().all()
try:
    ops.langevin_step_(x, x.clone(), 0.5, seed=1, backend="native")
except RuntimeError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError("native served without its extension")
print("ok", float(out.sum()))
"""


def test_everything_works_without_the_extension():
    hide = HIDE.format(hidden={"ncsn_fast._C", "ncsn_fast._C_cuda"})
    result = python(hide + WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok")


def test_an_extension_that_does_not_load_is_reported():
    code = HIDE.format(hidden=set()) + (
        "import importlib\nreal = importlib.import_module\n"
        "def broken(name, package=None):\n"
        "    if name == 'ncsn_fast._C': raise ImportError('undefined symbol: torch_x')\n"
        "    return real(name, package)\n"
        "importlib.import_module = broken\n"
        "from ncsn_fast.ops import extension; print(extension.status('cpu'))"
    )
    assert "does not load: undefined symbol: torch_x" in python(code).stdout


# --- info -----------------------------------------------------------------------------------------


def info_of(prefix: str = "", **environment: str) -> dict:
    code = prefix + "\nfrom ncsn_fast import info; raise SystemExit(info.main(['--json']))"
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_info_with_and_without():
    whole = info_of()
    assert whole["libraries"]["cpu"] is None
    assert whole["operators"]["cpu"]["langevin_step_"]["auto"] == "native"
    assert whole["build"]["simd_level"] in whole["build"]["simd_levels"]
    assert whole["packages"]["torch"] == torch.__version__

    hidden = info_of(HIDE.format(hidden={"ncsn_fast._C"}))
    assert "not built" in hidden["libraries"]["cpu"] and hidden["build"] is None
    facts = hidden["operators"]["cpu"]["langevin_step_"]
    assert facts["auto"] == "reference" and "not built" in facts["why_not"]["native"]

    without_triton = info_of(HIDE.format(hidden={"triton"}))
    assert "not installed" in without_triton["libraries"]["triton"]

    interpreted = info_of(TRITON_INTERPRET="1")
    assert interpreted["libraries"]["triton"] is None
    assert interpreted["operators"]["cpu"]["langevin_step_"]["why_not"]["triton"] is None


def test_info_as_text():
    command = [sys.executable, "-m", "ncsn_fast.info"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    for line in (
        f"ncsn_fast {ncsn_fast.__version__}",
        "kernels    cpu: loaded",
        "norm_elu_conv3x3",
        "winograd                 native: device cpu, dtype float32, bfloat16, float16",
    ):
        assert line in result.stdout
    wrong = subprocess.run([*command, "--yaml"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "usage" in wrong.stderr


def test_info_lists_every_operator_and_backend():
    table = info.collect()["operators"]["cpu"]
    assert set(table) == set(dispatch.OPERATORS)
    for facts in table.values():
        assert set(facts["why_not"]) == set(dispatch.BACKENDS)
        assert facts["why_not"]["reference"] is None
    rows = info.collect()["conv_algorithms"]
    assert [row["conv_algo"] for row in rows] == ["winograd", "direct", "gemm", "direct"]
    assert rows[0]["backend"] == "native" and rows[0]["dtype"] == "float32, bfloat16, float16"


def test_kernels_of_other_schemas_are_refused(monkeypatch):
    """Their arguments would be misread, down to a crash."""
    assert extension._load_cpu() is None
    monkeypatch.setitem(schema.SCHEMAS, "max_pool5", "(Tensor x, str padding) -> Tensor")
    assert "another version of the sources: build it anew" in extension._load_cpu()


def test_a_build_without_the_functions_of_these_sources_is_refused(monkeypatch):
    monkeypatch.delattr("ncsn_fast._C.packs_late")
    assert "another version of the sources: build it anew" in extension._load_cpu()


def test_a_number_without_a_meaning_is_refused():
    """By the kernels of every backend, for calls past the public functions."""
    x = torch.zeros(1, 1, 2, 2)
    native = torch.ops.ncsn_fast
    for number in (2, -1):
        for pool in (native.max_pool5, schema.KERNELS["max_pool5"]):
            with pytest.raises((RuntimeError, ValueError), match=rf"\(zero\), got {number}"):
                pool(x, number)
        for pool in (native.max_pool5_backward, schema.KERNELS["max_pool5_backward"]):
            with pytest.raises((RuntimeError, ValueError), match=rf"\(zero\), got {number}"):
                pool(x, x, number)
    for kind in (3, -1):
        for draw in (native.philox_, schema.KERNELS["philox_"]):
            with pytest.raises((RuntimeError, ValueError), match=f"0, 1 or 2, got {kind}"):
                draw(x, 0, 0, 0, 0, kind)


def test_the_table_of_algorithms_has_every_kernel_of_the_convolution():
    """A kernel that is not in it would never be taken; and no row without a kernel."""
    in_table = {
        (algorithm.backend, device) for algorithm in CONV_ALGORITHMS for device in algorithm.devices
    }
    for op in ("conv3x3", "norm_elu_conv3x3"):
        for backend in ("native", "triton"):
            for device in ("cpu", "cuda"):
                if extension.has_kernel(op, backend, device):
                    assert (backend, device) in in_table
        assert all(
            extension.has_kernel(op, backend, device)
            for backend, device in in_table
            if device == "cpu"
        )
    assert extension.has_kernel("conv_direct", "native", "cpu")
    # The last one serves everything.
    assert CONV_ALGORITHMS[-1].backend == COMPOSED and not CONV_ALGORITHMS[-1].devices


def test_what_is_composed_has_a_name_of_its_own():
    x, weight = torch.zeros(1, 3, 4, 4, dtype=torch.float64), torch.zeros(2, 3, 3, 3).double()
    assert dispatch.select("conv3x3", None, x, weight) == COMPOSED
    assert dispatch.select("conv3x3", "reference", x, weight) == COMPOSED
    assert dispatch.select("max_pool5", "reference", x) == "reference"
    x, weight = x.float(), weight.float()
    chosen = [
        dispatch.select_convolution("conv3x3", backend, algorithm, 1, x, weight)
        for backend, algorithm in (
            (None, "auto"), (None, "direct"), ("reference", "winograd"), ("reference", "auto"),
            ("reference", "direct"), ("native", "auto"), ("native", "direct"),
        )
    ]  # fmt: skip
    assert chosen == [
        WINOGRAD, DIRECT, WINOGRAD, COMPOSED_DIRECT, COMPOSED_DIRECT, WINOGRAD, DIRECT,
    ]  # fmt: skip
    double = dispatch.select_convolution("conv3x3", None, "auto", 1, x.double(), weight.double())
    assert double is COMPOSED_DIRECT


def test_the_matrix_product_serves_where_asked_for_or_measured(monkeypatch):
    """On a machine that has it, which this one is made to look like."""
    why_not = dispatch.why_not

    def on_gpu(backend, op, device_type, *tensors):
        if (backend, op) == ("triton", "conv_direct"):
            return dispatch.LIMITS[op](*tensors) or dispatch.TRITON_LIMITS[op](*tensors)
        return "it is a GPU" if backend == "native" else why_not(backend, op, device_type, *tensors)

    monkeypatch.setattr(dispatch, "why_not", on_gpu)
    x, weight = torch.zeros(1, 3, 4, 4).half(), torch.zeros(2, 3, 3, 3).half()

    def chosen(backend, algorithm, x=x):
        return dispatch.select_convolution("conv3x3", backend, algorithm, 1, x, weight, None, None)

    for backend in (None, "auto", "triton"):
        assert chosen(backend, "gemm") is GEMM
    assert chosen(None, "auto") is chosen(None, "direct") is COMPOSED_DIRECT
    norm = (x, torch.tensor([0]), torch.ones(1, 6), weight, None, None)  # its table stays float32
    assert dispatch.select_convolution("norm_elu_conv3x3", None, "gemm", 1, *norm) is GEMM
    for backend, x_, why in (
        ("reference", x, "of triton, not of reference"),
        (None, x.float(), "must have one dtype, got float32, float16"),
    ):
        with pytest.raises(dispatch.BackendError, match=f"'gemm' cannot serve conv3x3: .*{why}"):
            chosen(backend, "gemm", x_)

    monkeypatch.setattr(algorithms, "gemm_has_won", lambda *shape: shape == (3, 16, 1, torch.half))
    assert chosen(None, "auto") is GEMM
    assert chosen(None, "auto", x[..., :2]) is chosen(None, "direct") is COMPOSED_DIRECT
    assert chosen("reference", "auto") is COMPOSED_DIRECT
    with use_backend("reference"):
        assert chosen(None, "auto") is COMPOSED_DIRECT and chosen(None, "gemm") is GEMM


def test_another_thread_never_sees_half_a_policy():
    stop, failures = threading.Event(), []

    def watch():
        while not stop.is_set():
            try:
                ops.max_pool5(torch.zeros(1, 1, 2, 2))
            except KeyError as error:
                failures.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(300):
        with use_backend("reference"), use_backend("auto", op="max_pool5"):
            pass
    stop.set()
    watcher.join()
    assert not failures


@pytest.mark.parametrize("wanted", ["avx1024", "AVX2", "baseline,avx2"])
def test_a_wrong_simd_level_is_told(wanted):
    levels = extension.build_config()["simd_levels"]
    run = subprocess.run(
        [sys.executable, "-c", "import ncsn_fast"],
        env=os.environ | {"NCSN_FAST_SIMD": wanted},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ValueError: NCSN_FAST_SIMD must be one of") and last.endswith(wanted)
    assert levels[0] in last
