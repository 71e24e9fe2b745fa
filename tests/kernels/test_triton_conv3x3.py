"""The Triton convolution without a GPU: in the interpreter, compiled ahead of time, and the table that chooses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

# Only now: they import triton.
from support.triton_ahead import TARGETS, check, launches_of  # noqa: E402

from ncsn_fast.kernels import conv3x3, tune, tuned  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16
# Batch, channels, size, whether a norm comes first. The first two, of either tile and kind, are for every chip.
CASES = {
    "128 64x64 bf16": (256, 128, 64, False, BF16),
    "norm 128 32x32 bf16": (1, 128, 32, True, BF16),
    "128 32x32 fp16": (256, 128, 32, False, F16),  # for sm_90 alone
}
MOST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def test_interpreter():
    """Runs the tests where TRITON_INTERPRET=1 is set before anything is imported."""
    tests = Path(__file__).parent / "_interpreted_conv3x3.py"
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"7 passed", result.stdout) and "skipped" not in result.stdout


def launch_of(n, channels, size, norm, dtype):
    """What a convolution launches with everything that it can have."""
    like = {"dtype": dtype, "device": "meta", "memory_format": torch.channels_last}
    x = torch.empty(n, channels, size, size, **like)
    weight = torch.empty(channels, channels, 3, 3, **like)
    before = None
    if norm:
        moments = torch.empty(n, 16, channels, device="meta")
        labels = torch.empty(n, dtype=torch.int64, device="meta")
        table = torch.empty(10, 2 * channels, device="meta")
        before = conv3x3.Norm(conv3x3.Parts(moments, moments, 64), labels, table, 1e-5)
    bias = torch.empty(channels, device="meta")
    (launch,) = launches_of(
        conv3x3, lambda: conv3x3.convolve(x, weight, bias, x, 2, norm, before, True)
    )
    return launch


@pytest.mark.parametrize("name", TARGETS)
def test_compiles_to_tensor_cores_without_spills(name, tmp_path, monkeypatch):
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "hip", "6.4" if name == "gfx942" else None)
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for case in CASES if name == "sm_90" else list(CASES)[:2]:
        compiled = launch_of(*CASES[case]).compile(TARGETS[name])
        assembly = check(f"conv {case}", compiled, tmp_path, MOST_SHARED[name])
        assert instruction[name] in assembly, case
        # The product's tiles come 16 bytes at a time, past the registers or by way of them.
        if name != "gfx942":
            assert re.search(r"cp\.async\S* .*0x10|ld\.global\S*\.v4\.b32", assembly), case


def test_no_batch_compiles_anew_or_takes_another_tile():
    """Sample i keeps its bits: nothing but the number of programs follows the batch."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    for norm in (False, True):
        launches = [launch_of(n, 128, 32, norm, BF16) for n in (1, 2, 15, 16, 256)]
        assert len({launch.variant() for launch in launches}) == 1
        assert [launch.programs for launch in launches] == [32, 64, 480, 512, 8192]


@pytest.mark.parametrize("faster_at", [(), (1,), (1, 8)])
def test_the_table_takes_it_where_it_wins_at_every_batch(faster_at, monkeypatch, tmp_path):
    """With a made-up clock."""
    monkeypatch.setenv("NCSN_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_table", None)
    batches = iter([1, 8] * 100)

    def clock(call) -> float:
        launches = launches_of(conv3x3, call)
        n = next(batches)
        if not launches:
            return 1.0  # PyTorch's
        return (0.5 if n in faster_at else 2.0) * (1 + launches[0].constants["M"] / 1e4)

    # launches_of watches the module of the kernel, which the tuner calls by way of its launch function.
    found = tune.tune_convolution((64, 16, 16), BF16, 2, batches=(1, 8), clock=clock, device="meta")
    assert found.best.positions == 64
    assert tuned.tile(tuned.conv_key(64, 256, 2, BF16)) == [int(len(faster_at) == 2)]
    assert tuned.tile(tuned.conv_key(64, 256, 4, BF16)) is None
    tuned._table = None
    assert conv3x3.tile_for(64, 64, 256, BF16, False) == found.best
