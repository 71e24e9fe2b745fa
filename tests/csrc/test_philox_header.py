"""csrc/common/philox.h on the host: known answers, and its error over every value of a word.

The header is compiled here by itself, once without and once with fused multiply-adds: what a CPU
build does, and what a CUDA build does by default.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import philox_oracle as oracle
from support import tolerances

CSRC = Path(__file__).parents[2] / "csrc"
BOUND = 1.2e-6  # what the header states; the project promises tolerances.NORMAL
SOURCE = """
#include "common/philox.h"

using namespace ncsn;

extern "C" void words(const uint32_t* counter, const uint32_t* key, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t* c = counter + 4 * i;
    const PhiloxWords w = philox4x32_10({c[0], c[1], c[2], c[3]}, {key[0], key[1]});
    out[4 * i] = w.w0, out[4 * i + 1] = w.w1, out[4 * i + 2] = w.w2, out[4 * i + 3] = w.w3;
  }
}

extern "C" void normals(const uint32_t* w, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Quad z = normal4({w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]});
    out[4 * i] = z.v0, out[4 * i + 1] = z.v1, out[4 * i + 2] = z.v2, out[4 * i + 3] = z.v3;
  }
}

extern "C" void parts(const uint32_t* w, float* u, float* radius, float* sin, float* cos,
                      int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const detail::SinCos angle = detail::sincos_turn(detail::odd_numerator(w[i]));
    u[i] = uniform(w[i]), radius[i] = normal_radius(w[i]), sin[i] = angle.sin, cos[i] = angle.cos;
  }
}

// The fixed-size loop that the CPU kernels are made of.
extern "C" void block(uint32_t group, uint32_t sample, uint64_t seed, float* out) {
  for (uint32_t i = 0; i < 32; ++i) {
    const Quad z = normal4(philox4x32_10({group + i, sample, 0, 1}, philox_key(seed)));
    out[4 * i] = z.v0, out[4 * i + 1] = z.v1, out[4 * i + 2] = z.v2, out[4 * i + 3] = z.v3;
  }
}
"""
FLAGS = {
    "separate": ["-ffp-contract=off"],
    "fused": ["-ffp-contract=fast", "-march=native"],
}


def compiler() -> str:
    """The C++ compiler that setup.py would take."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not found:
        pytest.skip("no C++ compiler (CXX, c++ or g++)")
    return found


def build(folder: Path, *flags: str) -> str:
    source = folder / "philox.cpp"
    source.write_text(SOURCE)
    common = [*compiler().split(), "-std=c++17", "-O3", "-Wall", "-Wextra", "-fno-math-errno"]
    result = subprocess.run(
        [*common, f"-I{CSRC}", *flags, str(source)], capture_output=True, text=True, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    assert "philox.h" not in result.stderr, result.stderr  # no warning from the header
    return result.stdout


@pytest.fixture(scope="module", params=list(FLAGS))
def header(request, tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp(request.param)
    build(folder, "-shared", "-fPIC", "-o", "philox.so", *FLAGS[request.param])
    return ctypes.CDLL(str(folder / "philox.so"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def normals(header: ctypes.CDLL, words: np.ndarray) -> np.ndarray:
    words, out = np.ascontiguousarray(words, np.uint32), np.empty(words.shape, np.float32)
    header.normals(pointer(words), pointer(out), ctypes.c_int64(words.size // 4))
    return out


def test_known_words_and_normals(header):
    for counter, key, expected in oracle.KNOWN_WORDS:
        out = np.empty(4, np.uint32)
        c, k = np.array(counter, np.uint32), np.array(key, np.uint32)
        header.words(pointer(c), pointer(k), pointer(out), ctypes.c_int64(1))
        assert tuple(out) == expected
    for seed, element, sample, step, stream, expected in oracle.KNOWN_NORMALS:
        words = oracle.words(
            np.array([element // 4, sample, step, stream], np.uint64), oracle.key_of(seed)
        )
        assert np.abs(normals(header, words) - expected).max() < tolerances.NORMAL


def test_words_are_the_oracle_s(header):
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (4096, 4), np.uint64)
    key = (0xDEADBEEF, 0x12345678)
    expected = oracle.words(counters, key)
    c, k, out = counters.astype(np.uint32), np.array(key, np.uint32), np.empty((4096, 4), np.uint32)
    header.words(pointer(c), pointer(k), pointer(out), ctypes.c_int64(4096))
    assert (out == expected).all()


def test_error_over_every_value_of_a_word(header):
    """Exhaustive in each of the two words of a normal; the bound of the product follows."""
    radius_error, unit_error = 0.0, 0.0
    radii = []
    for k in np.array_split(np.arange(2**23, dtype=np.uint32), 8):
        # The lowest nine bits must not matter.
        words = (k << np.uint32(9)) | (k & np.uint32(511))
        u, radius, sin, cos = (np.empty(len(k), np.float32) for _ in range(4))
        header.parts(pointer(words), *map(pointer, (u, radius, sin, cos)), ctypes.c_int64(len(k)))
        exact = (k + 0.5) * 2.0**-23
        assert (u.astype(np.float64) == exact).all()
        r = np.sqrt(-2.0 * np.log(exact))
        t = 2.0 * np.pi * exact
        radii.append((r, np.abs(radius - r)))
        radius_error = max(radius_error, np.abs(radius - r).max())
        unit_error = max(unit_error, np.abs(sin - np.sin(t)).max(), np.abs(cos - np.cos(t)).max())
    # |dz| <= |dr| + r |d unit| + half a unit in the last place of z
    bound = max((error + r * (unit_error + 2.0**-24)).max() for r, error in radii)
    print(f"radius {radius_error:.2e}, sine and cosine {unit_error:.2e}, normal {bound:.2e}")
    assert bound < BOUND < tolerances.NORMAL


def test_normals_of_random_and_of_extreme_words(header):
    words = np.random.default_rng(1).integers(0, 2**32, (2**20, 4), np.uint64)
    edges = np.array([0, 511, 512, 2**30, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 1], np.uint64)
    grid = np.stack(np.meshgrid(edges, edges, edges, edges), -1).reshape(-1, 4)
    for w in (words, grid):
        z = normals(header, w)
        assert np.abs(z).max() <= 5.7682
        assert np.abs(z - oracle.box_muller(w)).max() < BOUND


def test_loop_becomes_simd(tmp_path):
    """On x86-64, baseline SSE2: every square root of the block is a packed one."""
    version = subprocess.check_output([*compiler().split(), "--version"], text=True)
    if platform.machine() not in ("x86_64", "AMD64") or "Free Software Foundation" not in version:
        pytest.skip("looks for x86-64 instructions in gcc's output")
    assembly = build(tmp_path, "-ffp-contract=off", "-S", "-o", "-")
    body = re.search(r"^block:(.*?)\.size\s+block", assembly, re.S | re.M)[1]
    assert "sqrtps" in body
    assert "sqrtss" not in body
    assert "call" not in body
