"""The kernels' arithmetic by the portable path, compiled for AArch64 (NEON) and run in an emulator.

The parts that know no torch: the noise stream, ELU, Winograd's transforms and products, the direct convolution. Their
speed there is not tested.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Those of setup.py that decide about bits; -O3 would take a minute to compile and tell no more.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]


def test_arithmetic(tmp_path):
    compiler = shutil.which(CROSS)
    if compiler is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"no {CROSS} or no {EMULATOR} (packages g++-aarch64-linux-gnu, qemu-user)")
    sources = [str(HERE / "arithmetic.cpp"), str(CSRC / "cpu" / "conv3x3" / "kernels.cpp")]
    program = str(tmp_path / "program")
    command = [compiler, *FLAGS, "-static", f"-I{CSRC}", *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.endswith("right\n"), done.stdout + done.stderr
