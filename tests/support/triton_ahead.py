"""Compiling Triton kernels ahead of time for real chips, with no GPU; a report of what they need."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def compile_kernel(
    kernel: JITFunction,
    target: GPUTarget,
    types: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...] = (),
    **options: object,
):
    """As the launcher would compile it; parameters of no given type are int32, pointers aligned to 16."""
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned += tuple(name for name, kind in types.items() if kind.startswith("*"))
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": True, "debug": bool(kernel.debug)} | options
    return triton.compile(source, target=target, options=options)


class Launch:
    """What a kernel is launched with; compiles it for that, or says what would be compiled."""

    def __init__(
        self,
        kernel: JITFunction,
        grid: tuple[int, ...],
        arguments: tuple,
        keywords: dict[str, object],
    ) -> None:
        self.kernel = kernel
        self.programs = math.prod(grid)
        names = kernel.arg_names
        values = dict(zip(names, arguments, strict=False))
        values |= {name: value for name, value in keywords.items() if name in names}
        self.options = {name: value for name, value in keywords.items() if name not in names}
        self.types: dict[str, str] = {}
        self.constants: dict[str, object] = {}
        self.aligned: tuple[str, ...] = ()
        for parameter in kernel.params:
            value = values[parameter.name]
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                self.constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                self.types[parameter.name] = POINTERS[value.dtype]
            else:
                self.types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if special and value % 16 == 0:
                    self.aligned += (parameter.name,)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def variant(self) -> str:
        """The same for two launches that run the same compiled kernel."""
        return repr((self.name, self.types, self.constants, self.aligned, self.options))

    def compile(self, target: GPUTarget):
        return compile_kernel(
            self.kernel, target, self.types, self.constants, self.aligned, **self.options
        )


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:])
        return lambda *arguments, **keywords: self.launches.append(
            Launch(self.kernel, grid, arguments, keywords)
        )


def launches_of(module, call: Callable[[], object]) -> list[Launch]:
    """The launches of a module's kernels in a call, on meta tensors; nothing is run."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in vars(module).copy().items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                patch.setattr(module, name, _Recorder(kernel, launches))
        call()
    return launches


def resources(compiled, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and what is spilled from them (bytes of local memory, or registers)."""
    if "cubin" not in compiled.asm:
        found = dict(
            re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"])
        )
        spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        return int(found["vgpr_count"]), spilled
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not binary.is_file():
        pytest.skip("this build of triton brings no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    usage = subprocess.check_output([binary, "-res-usage", file], text=True)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def check(name: str, compiled, folder: Path, most_shared: int) -> str:
    """Fails on spills and on too much shared memory; prints a row; returns the assembly."""
    registers, spilled = resources(compiled, folder)
    shared = compiled.metadata.shared
    arch = compiled.metadata.target.arch
    print(f"{arch!s:7} {name:44} {registers:3} registers, {spilled} spilled, {shared} B shared")
    assert spilled == 0
    assert shared <= most_shared
    return compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
