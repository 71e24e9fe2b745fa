"""The CUDA sources without a GPU: what each thread does, and what the compiled kernels use.

The kernels' bodies are functions that also run on the host. Here every thread of a launch is walked
on the CPU, through the same grid, and the result is compared with the oracle. Results on a real GPU
are in test_cuda.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support import philox_oracle as oracle
from support import tolerances

from ncsn_fast.ops import extension

CSRC = Path(__file__).parents[2] / "csrc"
INCLUDE = Path(torch.__file__).parent / "include"

EMULATION = """
#include "cuda/langevin_step.cuh"
#include "cuda/philox.cuh"
#include "cuda/solver_step.cuh"

#include <type_traits>

using namespace ncsn;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// max_blocks_y below the hardware's makes threads loop over samples, as for a huge batch.
template <typename Body>
void walk(const Geometry& geometry, int64_t max_blocks_y, const Body& body) {
  Grid grid = make_grid(geometry);
  grid.blocks_y = static_cast<unsigned>(std::min<int64_t>(grid.blocks_y, max_blocks_y));
  for (unsigned by = 0; by < grid.blocks_y; ++by)
    for (unsigned bx = 0; bx < grid.blocks_x; ++bx)
      for (unsigned ty = 0; ty < grid.threads_y; ++ty)
        for (unsigned tx = 0; tx < grid.threads_x; ++tx) body(thread_work(grid, bx, by, tx, ty));
}

Strides strides_of(const Geometry& g, bool last) {
  return last ? channels_last_strides(g) : contiguous_strides(g);
}

template <Access access>
using AccessIs = std::integral_constant<Access, access>;

template <typename F>
void with_access(Access access, const F& f) {
  switch (access) {
    case Access::kVector: return f(AccessIs<Access::kVector>());
    case Access::kChannelMinor: return f(AccessIs<Access::kChannelMinor>());
    case Access::kGeneric: return f(AccessIs<Access::kGeneric>());
  }
}

extern "C" int philox(int64_t n, int64_t c, int64_t s, bool last, uint32_t* out, uint64_t seed,
                      uint32_t step, uint32_t sample_offset, uint32_t stream, int kind,
                      int64_t max_blocks_y) {
  const Geometry g = {n, c, s};
  const PhiloxArgs args = {g, out, strides_of(g, last), philox_key(seed), sample_offset, step,
                           stream, static_cast<Kind>(kind)};
  const Access access = philox_access(args);
  with_access(access, [&](auto is) {
    walk(g, max_blocks_y, [&](const ThreadWork& work) { philox_thread<is()>(args, work); });
  });
  return static_cast<int>(access);
}

template <typename Score>
int step_all(const LangevinArgs& args, int64_t max_blocks_y) {
  const Access access = langevin_access<Score>(args);
  with_access(access, [&](auto is) {
    walk(args.geometry, max_blocks_y,
         [&](const ThreadWork& work) { langevin_step_thread<is(), Score>(args, work); });
  });
  return static_cast<int>(access);
}

extern "C" int langevin(int64_t n, int64_t c, int64_t s, float* x, bool x_last, const void* score,
                        bool score_last, int score_type, const void* noise, bool noise_last,
                        int noise_type, float step_size, const float* step_size_ptr, uint64_t seed,
                        uint32_t step, const int64_t* step_ptr, uint32_t sample_offset, float clip,
                        int64_t max_blocks_y) {
  const Geometry g = {n, c, s};
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                              ScalarType::Double};
  const LangevinArgs args = {g, x, score, noise, strides_of(g, x_last), strides_of(g, score_last),
                             strides_of(g, noise_last), types[noise_type], step_size, clip,
                             step_size_ptr, step_ptr, philox_key(seed), sample_offset, step};
  switch (score_type) {
    case 1: return step_all<BFloat16>(args, max_blocks_y);
    case 2: return step_all<Half>(args, max_blocks_y);
    case 3: return step_all<double>(args, max_blocks_y);
    default: return step_all<float>(args, max_blocks_y);
  }
}

template <typename Score>
int solver_all(const SolverArgs& args, int64_t max_blocks_y) {
  const Access access = solver_access<Score>(args);
  with_access(access, [&](auto is) {
    walk(args.geometry, max_blocks_y,
         [&](const ThreadWork& work) { solver_step_thread<is(), Score>(args, work); });
  });
  return static_cast<int>(access);
}

extern "C" int solver(int64_t n, int64_t c, int64_t s, float* x, bool x_last, const void* score,
                      bool score_last, int score_type, float* previous, const float* table,
                      int64_t rows, int64_t level, const int64_t* level_ptr, bool noisy,
                      uint64_t seed, uint32_t step, const int64_t* step_ptr,
                      uint32_t sample_offset, int64_t max_blocks_y) {
  const Geometry g = {n, c, s};
  const SolverArgs args = {g, x, score, previous, strides_of(g, x_last),
                           strides_of(g, score_last), table, rows, level, level_ptr, step_ptr,
                           philox_key(seed), sample_offset, step, noisy};
  switch (score_type) {
    case 1: return solver_all<BFloat16>(args, max_blocks_y);
    case 2: return solver_all<Half>(args, max_blocks_y);
    case 3: return solver_all<double>(args, max_blocks_y);
    default: return solver_all<float>(args, max_blocks_y);
  }
}

// The offset of the last element of a batch too large to allocate, by the generic path and by the
// channels_last one.
extern "C" int64_t last_offset(int64_t n, int64_t c, int64_t s, bool last) {
  const Geometry g = {n, c, s};
  if (last) {
    const Group group = group_of<Access::kChannelMinor>(g, g.groups() - 1);
    return offset_of(strides_of(g, true), n - 1, group.places[group.size - 1]);
  }
  const Group group = group_of<Access::kGeneric>(g, g.groups() - 1);
  return offset_of(strides_of(g, false), n - 1, group.places[group.size - 1]);
}
"""

VECTOR, CHANNEL_MINOR, GENERIC = range(3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (N, C, S): full groups; groups that straddle channels and end short; small and large samples.
SHAPES = [(3, 2, 24), (2, 3, 35), (1, 1, 1023), (5, 1, 1)]
SHAPES += [(300, 1, 4), (2, 5, 1), (2, 130, 4), (1, 3, 1024)]


# --- the threads, on the host ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def threads(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler (CXX, c++ or g++)")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "threads.cpp").write_text(EMULATION)
    flags = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-strict-aliasing", "-shared", "-fPIC"]
    command = [*compiler.split(), *flags, f"-I{CSRC}", f"-I{INCLUDE}", "threads.cpp"]
    subprocess.run([*command, "-o", "threads.so"], check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "threads.so"))
    library.last_offset.restype = ctypes.c_int64
    return library


class Batch:
    """A tensor (N, C, S) of either layout inside a larger, poisoned array, aligned or not."""

    MARGIN = 32

    def __init__(self, values: torch.Tensor, last: bool = False, aligned: bool = True) -> None:
        self.last, self.shape, size = last, values.shape, values.numel()
        start = self.MARGIN + (not aligned)
        self.memory = torch.full((size + 2 * self.MARGIN + 1,), float("nan"), dtype=values.dtype)
        self.inside = self.memory[start : start + size]
        self.inside.copy_((values.transpose(1, 2) if last else values).reshape(-1))
        self.pointer = ctypes.c_void_p(self.inside.data_ptr())

    def values(self) -> np.ndarray:
        """In logical order, after checking that nothing outside was written."""
        n, c, s = self.shape
        start = (self.inside.data_ptr() - self.memory.data_ptr()) // self.memory.element_size()
        around = torch.cat([self.memory[:start], self.memory[start + n * c * s :]])
        assert around.isnan().all()
        if self.last:
            return self.inside.reshape(n, s, c).transpose(1, 2).numpy()
        return self.inside.reshape(n, c, s).numpy()


def run_langevin(
    threads: ctypes.CDLL,
    x: Batch,
    score: Batch,
    noise: Batch | None = None,
    *,
    step_size: float,
    step: int = 0,
    seed: int = 0,
    sample_offset: int = 0,
    clip: float = np.inf,
    pointers: bool = False,
    max_blocks_y: int = 65535,
) -> int:
    """One emulated launch; its Access. With ``pointers``, step and step_size are in memory."""
    n, c, s = x.shape
    size = np.array([step_size], np.float32)
    count = np.array([step], np.int64)
    at = (lambda a: ctypes.c_void_p(a.ctypes.data)) if pointers else (lambda a: None)
    flat = not (x.last or score.last or (noise is not None and noise.last))
    return threads.langevin(
        *map(ctypes.c_int64, (n, 1, c * s) if flat else (n, c, s)),
        x.pointer,
        ctypes.c_bool(x.last),
        score.pointer,
        ctypes.c_bool(score.last),
        DTYPES.index(score.inside.dtype),
        noise.pointer if noise else None,
        ctypes.c_bool(noise is not None and noise.last),
        DTYPES.index(noise.inside.dtype) if noise else 0,
        ctypes.c_float(np.nan if pointers else step_size),
        at(size),
        ctypes.c_uint64(seed),
        ctypes.c_uint32(12345 if pointers else step),
        at(count),
        ctypes.c_uint32(sample_offset),
        ctypes.c_float(clip),
        ctypes.c_int64(max_blocks_y),
    )


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_of_philox(threads, shape, last, kind):
    seed, step, offset, stream = 2**64 - 5, 2**32 - 1, 2**32 - 2, 2
    for aligned in (True, False):
        for max_blocks_y in (65535, 2):
            out = Batch(torch.full(shape, float("nan")), last, aligned)
            n, c, s = shape
            access = threads.philox(
                *map(ctypes.c_int64, (n, c, s) if last else (n, 1, c * s)),
                ctypes.c_bool(last),
                out.pointer,
                ctypes.c_uint64(seed),
                *map(ctypes.c_uint32, (step, offset, stream)),
                kind,
                ctypes.c_int64(max_blocks_y),
            )
            got = np.ascontiguousarray(out.values())
            if kind == 0:
                expected = oracle.bits(shape, seed, step, offset, stream)
                assert (got.view(np.uint32) == expected).all()
            else:
                draw = oracle.uniform if kind == 1 else oracle.normal
                error = np.abs(got - draw(shape, seed, step, offset, stream)).max()
                assert error <= (0.0 if kind == 1 else tolerances.NORMAL)
            if not last:
                assert access == (VECTOR if c * s % 4 == 0 and aligned else GENERIC)
            elif c > 1:
                assert access == (CHANNEL_MINOR if s % 4 == 0 else GENERIC)


def layouts() -> Iterator[tuple[bool, bool, bool]]:
    for bits in range(8):
        yield bool(bits & 1), bool(bits & 2), bool(bits & 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_of_langevin_step(threads, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, score, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    score, noise = score.to(dtype), noise.to(dtype)
    drawn = oracle.normal(shape, 77, 9, 5, oracle.STREAM_LANGEVIN)
    for x_last, score_last, noise_last in layouts():
        for explicit in (False, True):
            for aligned in (True, False):
                state = Batch(x, x_last, aligned)
                access = run_langevin(
                    threads,
                    state,
                    Batch(score, score_last),
                    Batch(noise, noise_last) if explicit else None,
                    step_size=0.05,
                    step=9,
                    seed=77,
                    sample_offset=5,
                    pointers=score_last,
                    max_blocks_y=2 if aligned else 65535,
                )
                z = noise.double().numpy() if explicit else drawn
                expected = oracle.langevin_step(x.numpy(), score.double().numpy(), 0.05, noise=z)
                # The noise's error, scaled, and the rounding of the state.
                assert np.abs(state.values() - expected).max() <= tolerances.NORMAL
                flat = not (x_last or score_last or (explicit and noise_last))
                if flat and aligned:
                    assert access == (VECTOR if shape[1] * shape[2] % 4 == 0 else GENERIC)
                elif x_last and shape[1] > 1:
                    assert access == (CHANNEL_MINOR if shape[2] % 4 == 0 else GENERIC)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_of_solver_step(threads, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, score, old = (torch.randn(shape, generator=generator) for _ in range(3))
    score = score.to(dtype)
    drawn = torch.from_numpy(oracle.normal(shape, 77, 9, 5, oracle.STREAM_LANGEVIN))
    table = np.array([[9.0] * 5, [0.7, -0.4, 0.3, 1.3, 0.2]], np.float32)
    a, b, c, d, e = (float(value) for value in table[1])
    at, count = np.array([1], np.int64), np.array([9], np.int64)
    for x_last, score_last, multistep in layouts():
        for aligned, noisy in ((True, True), (False, True), (True, False)):
            state, given = Batch(x, x_last, aligned), Batch(score, score_last)
            previous = Batch(old, x_last, aligned) if multistep else None
            flat, pointers = not (x_last or score_last), score_last
            number, samples, size = shape[1], shape[0], shape[2]
            access = threads.solver(
                *map(
                    ctypes.c_int64, (samples, 1, number * size) if flat else (samples, number, size)
                ),
                state.pointer,
                ctypes.c_bool(x_last),
                given.pointer,
                ctypes.c_bool(score_last),
                DTYPES.index(dtype),
                previous.pointer if multistep else None,
                ctypes.c_void_p(table.ctypes.data),
                *map(ctypes.c_int64, (2, 0 if pointers else 1)),
                ctypes.c_void_p(at.ctypes.data) if pointers else None,
                ctypes.c_bool(noisy),
                ctypes.c_uint64(77),
                ctypes.c_uint32(12345 if pointers else 9),
                ctypes.c_void_p(count.ctypes.data) if pointers else None,
                ctypes.c_uint32(5),
                ctypes.c_int64(2 if aligned else 65535),
            )
            expected = a * x.double() + b * score.double() + c * noisy * drawn
            if multistep:
                expected += e * old.double()
                memory = x.double() + d * score.double()
                assert np.abs(previous.values() - memory.numpy()).max() <= 1e-6
            assert np.abs(state.values() - expected.numpy()).max() <= 1e-6
            if flat and aligned:
                assert access == (VECTOR if number * size % 4 == 0 else GENERIC)
            elif x_last and number > 1:
                assert access == (CHANNEL_MINOR if size % 4 == 0 else GENERIC)


def test_threads_clip_and_keep_nan(threads):
    x = torch.tensor([3.0, -3.0, 0.5, float("nan"), float("inf"), -float("inf"), 1.0, 0.0])
    state = Batch(x.reshape(1, 1, 8))
    zero = Batch(torch.zeros(1, 1, 8))
    run_langevin(threads, state, zero, zero, step_size=0.5, clip=1.0)
    assert torch.equal(state.inside.nan_to_num(9.0), x.clamp(-1, 1).nan_to_num(9.0))
    state = Batch(x.reshape(1, 1, 8))
    run_langevin(threads, state, zero, zero, step_size=0.5)
    assert torch.equal(state.inside.nan_to_num(9.0), x.nan_to_num(9.0))


def test_offsets_beyond_32_bits(threads):
    batches = [(3, 2**16, 2**16 + 4, True), (5, 7, 2**33 + 1, False), (2**33, 3, 4, True)]
    for n, c, s, last in batches:
        sizes = map(ctypes.c_int64, (n, c, s))
        assert threads.last_offset(*sizes, ctypes.c_bool(last)) == n * c * s - 1


# --- the device code ------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    try:
        import triton
    except ImportError:
        pass
    else:
        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    found = [str(f / name) for f in folders if (f / name).is_file()]
    return next(iter(found), shutil.which(name))


# Kernels of each name in the library, for one architecture.
KERNELS = {
    "langevin_step_kernel": 12,  # three ways to reach the elements, four types of the score
    "philox_kernel": 3,
    "solver_step_kernel": 12,  # as langevin_step_kernel
    # Two layouts; 16 bytes, as clusters or not, or one element, and that alone for float64.
    "norm_forward_kernel": 20,
    "add_norm_forward_kernel": 20,
    "norm_backward_kernel": 20,
    "norm_apply_kernel": 14,
    "norm_backward_apply_kernel": 14,
    "affine_kernel": 2,
    "gradient_kernel": 2,
    "grad_weight_kernel": 2,
    # One element, for four types; 16 bytes along rows or across channels, for three.
    "pool_forward_kernel": 10,
    "pool_choice_kernel": 10,
    "pool_gather_kernel": 10,
    "mean_pool_kernel": 10,
}


class Kernel(NamedTuple):
    """A kernel in the built library, for one architecture."""

    arch: str
    name: str  # as the compiler knows it
    stem: str
    registers: int
    stack: int  # bytes; spilled registers lie there
    shared: int

    @property
    def vectors(self) -> bool:
        """Whether its accesses are of 16 bytes, wherever it reads or writes planes."""
        width = re.search(r"Li(\d+)E", self.name)
        return "AccessE0" in self.name or (width is not None and int(width[1]) > 1)


@pytest.fixture(scope="module")
def library() -> Path:
    """The CUDA library, built with the package."""
    spec = importlib.util.find_spec("ncsn_fast._C_cuda")
    if spec is None:
        pytest.skip("the CUDA library is not built (NCSN_FAST_BUILD=cuda)")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    tool = find_tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump (CUDA toolkit, or Triton's wheel)")
    return tool


@pytest.fixture(scope="module")
def kernels(library, cuobjdump) -> list[Kernel]:
    usage = subprocess.check_output([cuobjdump, "-res-usage", library], text=True)
    found = []
    for part in usage.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = sm_(\w+)", part)[1]
        line = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for name, registers, stack, shared, local in re.findall(line, part):
            stem = re.search(rf"\d({'|'.join(KERNELS)})I", name)[1]
            spilled = int(stack) + int(local)
            found.append(Kernel(arch, name, stem, int(registers), spilled, int(shared)))
    assert found
    return found


def test_the_library_holds_what_the_build_says(kernels):
    config = extension.build_config()
    assert config is not None and config["cuda"] is not None
    said = {a.removeprefix("sm_") for a in config["cuda_architectures"].split() if "sm_" in a}
    assert {k.arch for k in kernels} == said
    for arch in said:
        assert Counter(k.stem for k in kernels if k.arch == arch) == KERNELS


def test_no_kernel_spills(kernels):
    """Prints the table. What keeps the memory busy by many resident threads has a limit on its registers."""
    limits = {"langevin_step_kernel": 64, "philox_kernel": 64, "solver_step_kernel": 128}
    limits |= {"norm_apply_kernel": 80, "norm_forward_kernel": 80, "add_norm_forward_kernel": 80}
    limits |= {"pool_forward_kernel": 80}
    for k in sorted(kernels):
        kind = "16 bytes" if k.vectors else "element"
        print(f"sm_{k.arch:5} {k.stem:28} {kind:9} {k.registers:4} registers, {k.stack} B of stack")
        assert k.stack == 0, k
        # At least two blocks of 256 threads; and three, where nothing but the tile in shared memory sets a limit.
        assert k.registers <= (168 if "pool" in k.stem else 128), k
        # Of a cluster, or of float32 across channels on capability 12, two blocks of a norm.
        two_blocks = "Lb[01]ELb1EE" if k.arch != "120" else "Lb[01]ELb1EE|kernelIfLi4ELb1E"
        two_blocks = re.search(two_blocks, k.name)
        if k.vectors and k.stem in limits and not two_blocks:
            assert k.registers <= limits[k.stem], k


def test_hot_kernels_move_sixteen_bytes(library, cuobjdump, kernels):
    """From and to the memory of the tensors, in all kernels made for it; pools also read the pairs beside a vector."""
    reads = {
        "langevin_step_kernel": "LDG.E.128",
        "philox_kernel": None,
        "solver_step_kernel": "LDG.E.128",
        "norm_forward_kernel": "LDGSTS.E.BYPASS.128",  # to shared memory, past the registers
        "add_norm_forward_kernel": "LDG.E.128",
        "norm_backward_kernel": "LDGSTS.E.BYPASS.128",
        "norm_apply_kernel": "LDG.E.128",
        "norm_backward_apply_kernel": "LDG.E.128",
        "pool_forward_kernel": "LDG.E.128",
        "pool_choice_kernel": "LDG.E.128",
        "pool_gather_kernel": "LDG.E.128",
        "mean_pool_kernel": "LDG.E.128",
    }
    hot = {k.name: k for k in kernels if k.arch == "90" and k.vectors}
    if not hot:
        pytest.skip("the library is built without sm_90")
    sass = subprocess.check_output([cuobjdump, "-arch", "sm_90", "-sass", library], text=True)
    bodies = dict(re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", sass, re.S))
    assert {k.stem for k in hot.values()} == reads.keys()
    for name, kernel in hot.items():
        body, read = bodies[name], reads[kernel.stem]
        assert read is None or read in body, name
        if kernel.stem == "pool_choice_kernel":  # a byte for each element
            assert "STG.E.128" not in body and re.search(r"STG\.E(\.64)? ", body), name
        else:
            assert "STG.E.128" in body, name
        # Vectors are nowhere taken apart: the only narrow stores are a norm's numbers of a plane, float32.
        assert "STG.E.U" not in body and "LDS.U" not in body, name
        forward = dict.fromkeys(("norm_forward_kernel", "add_norm_forward_kernel"), 5)
        numbers = (forward | {"norm_backward_kernel": 4}).get(kernel.stem, 0)
        if kernel.stem != "pool_choice_kernel":
            assert body.count("STG.E ") + body.count("STG.E.64") == numbers, name
