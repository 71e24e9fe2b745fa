"""What promises equal bits keeps the promise whatever code PyTorch, oneDNN and MKL choose for the processor.

The libraries are held to lower levels than this processor has, each in a process of its own, as they choose once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
SETTINGS = {
    "no vectors in PyTorch": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2 in PyTorch": {"ATEN_CPU_CAPABILITY": "avx2"},
    "AVX2 in oneDNN and MKL": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "SSE4.2 in MKL": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "our baseline": {"NCSN_FAST_SIMD": "baseline"},
}
# Tests of equal bits between backends, batches, layouts and threads.
PROMISES = (
    "ops/test_langevin_step.py::test_explicit_noise_is_the_same_bits_in_every_backend",
    "ops/test_langevin_step.py::test_the_scale_of_the_noise_is_correctly_rounded",
    "sampling/test_sampling.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_promises_hold_on_lesser_processors(name):
    setting = SETTINGS[name]
    program = (
        "import sys, pytest, torch\n"
        "print('capability', torch.backends.cpu.get_cpu_capability())\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", program, *(str(TESTS / promise) for promise in PROMISES)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command,
        env=environment | setting,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    wanted = setting.get("ATEN_CPU_CAPABILITY")
    if wanted is not None and torch.backends.cpu.get_cpu_capability() != "NO AVX":
        there = done.stdout.split("capability ", 1)[1].split("\n", 1)[0]
        assert there == {"default": "DEFAULT", "avx2": "AVX2"}[wanted]
