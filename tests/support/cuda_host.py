"""Compiles the CUDA kernels' bodies for the CPU, where the tests run them thread by thread."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
INCLUDE = Path(torch.__file__).parent / "include"
# The numbers by which the C++ of the tests knows the dtypes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MARGIN = 64


def compile_for_host(source: Path, folder: Path, *first: Path) -> ctypes.CDLL:
    """The shared library of one source, with folders of headers to look in first; skips without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler (CXX, c++ or g++)")
    target = folder / f"{source.stem}.so"
    flags = ["-std=c++17", "-O0", "-fno-math-errno", "-fno-strict-aliasing", "-shared", "-fPIC"]
    includes = [
        *(f"-I{path}" for path in first),
        f"-I{CSRC}",
        f"-I{source.parent}",
        f"-isystem{INCLUDE}",
    ]
    subprocess.run([*compiler.split(), *flags, *includes, source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


class Canary:
    """A dense tensor inside a larger, NaN-filled memory, on a multiple of 16 bytes or just not."""

    def __init__(self, like: torch.Tensor, aligned: bool = True) -> None:
        size = like.numel()
        memory = torch.full((size + 2 * MARGIN + 16,), float("nan"), dtype=like.dtype)
        past = memory.data_ptr() % 16 // memory.element_size()
        start = MARGIN - past + (not aligned)
        self.memory, self.span = memory, slice(start, start + size)
        self.tensor = memory.as_strided(like.shape, like.stride(), start)

    def holding(self, values: torch.Tensor) -> torch.Tensor:
        return self.tensor.copy_(values)

    def check(self) -> None:
        """Nothing outside was written."""
        outside = torch.ones(len(self.memory), dtype=torch.bool)
        outside[self.span] = False
        assert self.memory[outside].isnan().all()
