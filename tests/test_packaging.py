"""The sdist, the wheels, an environment with nothing else in it, and what setup.py says when it cannot build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import ncsn_fast
from ncsn_fast.models.shipped import shipped_names

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def build_wheel(source: Path, out: Path, mode: str) -> Path:
    """With code that is not optimised, which is compiled in a third of the time and packed the same way."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = run([*command, "-w", out, "."], source, NCSN_FAST_BUILD=mode, DEBUG="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, "."]
    result = run(command, ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory) -> Path:
    """An environment of nothing but Python and the dependencies of this one, without this one's ncsn_fast."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder)
    # A path in a .pth file is searched, but the .pth files in it (the editable install) are not read.
    folders = {sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parents[1])}
    (Path(site.stdout.strip()) / "dependencies.pth").write_text("\n".join(folders))
    return python


SMOKE = """
import importlib.util, sys, torch, ncsn_fast
from ncsn_fast import ops
from ncsn_fast.ops import extension
import ncsn_fast.kernels
assert ncsn_fast.__file__.startswith(sys.argv[1]), ncsn_fast.__file__
assert importlib.util.find_spec("kernels") is None
from ncsn_fast.benchmarks import suite
cpu = suite.Settings(torch.device("cpu"), (torch.float32,), quick=True)
assert {case.suite for case in suite.find_cases(cpu)} == set(suite.SUITES)
status = extension.status("cpu")
assert (status is None) == (sys.argv[2] == "cpu"), status
backend = "native" if sys.argv[2] == "cpu" else "reference"
z = ops.philox_normal((1, 4), seed=1234, stream=1, backend=backend)
assert abs(z[0, 0] - 0.3378573) < 2e-6
model = ncsn_fast.NCSN(in_channels=1, nf=4, num_classes=2, sigmas=(1.0, 0.1))
loss, labels = model.get_loss(torch.zeros(2, 1, 8, 8))
loss.backward()
from ncsn_fast.training.config import merge_config
from ncsn_fast.training.presets import preset_names
assert preset_names() and all(merge_config(preset=name, data="x") for name in preset_names())
from ncsn_fast.models.shipped import shipped_names
assert {"digits", "fashion-mnist"} <= {*shipped_names()}
model = ncsn_fast.NCSN.from_pretrained("digits")
print(model.sample(2, 8, 1, 2, 1e-3, verbose=False).shape)
"""


def install_and_smoke(python: Path, wheel: Path, folder: Path, mode: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    result = run([*command, "--force-reinstall", wheel], folder)
    assert result.returncode == 0, result.stderr
    smoke = run([python, "-c", SMOKE, python.parent.parent, mode], folder)
    assert smoke.returncode == 0, smoke.stderr
    assert "torch.Size([2, 1, 8, 8])" in smoke.stdout
    entry = run([python.parent / "ncsn-fast", "--help"], folder)
    assert entry.returncode == 0, entry.stderr


def test_sdist_holds_the_sources(sdist):
    for file in ("csrc/binding.cpp", "csrc/common/philox.h", "csrc/cuda/langevin_step.cu"):
        assert (sdist / file).is_file()
    for file in ("kernels/langevin_step.py", "ncsn_fast/py.typed", "LICENSE", "README.md"):
        assert (sdist / file).is_file()
    assert not list(sdist.rglob("*.so"))


def test_wheel_with_kernels(sdist, empty_environment, tmp_path):
    wheel = build_wheel(sdist, tmp_path, "cpu")
    names = zipfile.ZipFile(wheel).namelist()
    # For every Python from 3.10 on, as it uses no more of Python than that promises to keep.
    assert re.search(r"-cp310-abi3-[a-z]+\w*\.whl$", wheel.name), wheel.name
    assert [n for n in names if n.endswith(".so")] == ["ncsn_fast/_C.abi3.so"]
    assert "ncsn_fast/kernels/langevin_step.py" in names
    assert "ncsn_fast/presets/digits.toml" in names and "ncsn_fast/py.typed" in names
    assert not any("/results/" in name for name in names)
    assert "ncsn_fast/benchmarks/cases/langevin_step.py" in names
    for network in shipped_names():
        assert f"ncsn_fast/shipped/{network}/model.safetensors" in names
    assert {n.split("/")[0] for n in names} == {
        "ncsn_fast",
        f"ncsn_fast-{ncsn_fast.__version__}.dist-info",
    }
    install_and_smoke(empty_environment, wheel, tmp_path, "cpu")


def test_what_another_build_left_is_gone(sdist):
    """It would be loaded in the place of the new, or packed into a wheel."""
    left = [sdist / "ncsn_fast" / f"{n}.cpython-310-x86_64-linux-gnu.so" for n in ("_C", "_C_cuda")]
    other = sdist / "ncsn_fast" / "_Cython.py"
    for file in (*left, other):
        file.touch()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = run(command, sdist, NCSN_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert not any(file.exists() for file in left) and other.exists()
    other.unlink()


def test_pure_wheel(sdist, empty_environment, tmp_path):
    wheel = build_wheel(sdist, tmp_path, "none")
    assert wheel.name.endswith("-py3-none-any.whl")
    install_and_smoke(empty_environment, wheel, tmp_path, "none")


# A build environment without torch, as pip's isolated one is.
HIDE_TORCH = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
"""
SETUP = """
import runpy, sys
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py", run_name="__main__")
"""
NO_TORCH = HIDE_TORCH + SETUP


@pytest.mark.parametrize(
    ("code", "environment", "message"),
    [
        (SETUP, {"NCSN_FAST_BUILD": "gpu"}, "must be auto, cpu, cuda or none, got 'gpu'"),
        (SETUP, {"NCSN_FAST_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "no CUDA toolkit"),
        (NO_TORCH, {"NCSN_FAST_BUILD": "cpu"}, "pip install --no-build-isolation ."),
        (NO_TORCH, {"NCSN_FAST_BUILD": "cuda"}, "pip install --no-build-isolation ."),
    ],
)
def test_setup_refuses(code, environment, message):
    result = run([sys.executable, "-c", code], ROOT, **environment)
    assert result.returncode != 0
    assert message in result.stderr.replace("\n", " ")


def test_setup_without_torch_says_how_to_build_the_kernels():
    result = run([sys.executable, "-c", NO_TORCH], ROOT, NCSN_FAST_BUILD="auto")
    assert result.returncode == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ncsn_fast:")]
    assert "pip install --no-build-isolation ." in line


def test_setup_refuses_a_free_threaded_python():
    code = f"import sysconfig; sysconfig.get_config_var = {{'Py_GIL_DISABLED': 1}}.get\n{SETUP}"
    refused = run([sys.executable, "-c", code], ROOT, NCSN_FAST_BUILD="cpu")
    assert refused.returncode != 0 and "free-threaded Python" in refused.stderr
    without = run([sys.executable, "-c", code], ROOT, NCSN_FAST_BUILD="auto")
    assert without.returncode == 0
    assert "without C++ and CUDA kernels: the kernels do not build for a free" in without.stderr


PLAN = """
import os, pathlib, runpy, sys
sys.argv = ["setup.py", "--name"]
names = runpy.run_path("setup.py", run_name="setup")
plan = names["plan"].__globals__
plan["find_cuda_home"] = lambda: pathlib.Path("/cuda")
plan["find_torch"] = lambda: (pathlib.Path("/torch"), "9.9", os.environ["HAS_CUDA"] == "yes")
print([extension.name for extension in names["plan"]()])
"""


def test_cuda_kernels_are_built_where_torch_would_load_them():
    for mode, has_cuda, built in (
        ("auto", "yes", True),
        ("auto", "no", False),
        ("cuda", "no", True),
        ("cpu", "yes", False),
    ):
        result = run([sys.executable, "-c", PLAN], ROOT, NCSN_FAST_BUILD=mode, HAS_CUDA=has_cuda)
        assert result.returncode == 0, result.stderr
        assert ("_C_cuda" in result.stdout) == built, (mode, has_cuda)
        assert ("torch 9.9 could not load" in result.stderr) == ((mode, has_cuda) == ("auto", "no"))


ARCHITECTURES = """
import pathlib, runpy, subprocess, sys
sys.argv = ["setup.py", "--name"]
names = runpy.run_path("setup.py", run_name="setup")
subprocess.check_output = lambda *a, **k: "compute_80\\ncompute_90\\ncompute_120\\n"
print(names["cuda_architectures"](pathlib.Path("nvcc")))
"""


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("9.0\n9.0\n8.0\n", ["sm_80", "sm_90", "compute_90"]),
        ("7.5\n", ["sm_80", "sm_90", "sm_120", "compute_120"]),  # this nvcc does not know it
        (None, ["sm_80", "sm_90", "sm_120", "compute_120"]),
    ],
)
def test_architectures_are_those_of_the_gpus_that_are_there(tmp_path, gpus, expected):
    if gpus is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<END\n{gpus}END\n")
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = run([sys.executable, "-c", ARCHITECTURES], ROOT, PATH=path, TORCH_CUDA_ARCH_LIST="")
    assert result.returncode == 0, result.stderr
    assert re.findall(r",code=(\w+)", result.stdout) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"NCSN_FAST_BUILD": "cpu", "CXX": "no-such-compiler"},
            "no C++ compiler (no-such-compiler",
        ),
        ({"NCSN_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "Hopper"}, "got 'Hopper'"),
    ],
)
def test_build_refuses(environment, message, tmp_path):
    if environment["NCSN_FAST_BUILD"] == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path]
    result = run([*command, "--build-temp", tmp_path], ROOT, **environment)
    assert result.returncode != 0
    assert message in result.stderr.replace("\n", " ")
