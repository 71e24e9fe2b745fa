"""The CUDA kernel of avg_pool5 without a GPU: every thread of every launch, run on the CPU, against the reference.

Its gradient is the same kernel. Results on a real GPU are in test_cuda_network.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.cuda_host import DTYPES, Canary, compile_for_host
from support.tolerances import assert_forward

from ncsn_fast import ops
from ncsn_fast.ops import extension, reference

INF, NAN = float("inf"), float("nan")
# Smaller than a window; odd sizes; vectors along rows and across channels, at both ends of a row; several bands.
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 7), (2, 5, 7, 1), (3, 3, 5, 7), (1, 2, 3, 8), (2, 8, 4, 24)]
SHAPES += [(1, 16, 33, 6), (1, 2, 35, 16), (2, 3, 40, 9)]
EACH_LAYOUT = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Call(ctypes.Structure):
    """As in cuda_avg_pool.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "channels", "rows", "pixels")),
        *((name, ctypes.c_int64) for name in ("contiguous", "dtype", "aligned")),
        ("multiprocessors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        ("tiling", ctypes.c_int64 * 3),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compile_for_host(
        Path(__file__).parent / "cuda_avg_pool.cpp", tmp_path_factory.mktemp("cuda")
    )


def run(library, x, *, aligned=True, multiprocessors=132):
    """The output and the tiling; nothing outside of it was written, and NaN around x did not get in."""
    held, out = Canary(x, aligned).holding(x), Canary(x)
    call = Call(
        *x.shape,
        x.is_contiguous(),
        DTYPES.index(x.dtype),
        aligned,
        multiprocessors,
        held.data_ptr(),
        out.tensor.data_ptr(),
    )
    library.pool(ctypes.byref(call))
    out.check()
    return out.tensor, list(call.tiling)


def images(shape, dtype, layout, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    return x.to(dtype).contiguous(memory_format=layout)


@EACH_LAYOUT
@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(library, dtype, shape, layout):
    x = images(shape, dtype, layout)
    expected, results = reference.avg_pool5(x.double()), []
    for aligned, multiprocessors in ((True, 132), (True, 0), (False, 132)):
        y, tiling = run(library, x, aligned=aligned, multiprocessors=multiprocessors)
        assert_forward(y, expected, dtype)
        results.append(y)
        wide = 16 // x.element_size()
        axis = shape[3] if x.is_contiguous() else shape[1]
        fits = aligned and dtype != torch.float64 and axis % wide == 0
        assert tiling[:2] == [wide if fits else 1, fits and x.is_contiguous()]
        assert (tiling[2] > 1) == (shape[2] >= 4 and multiprocessors > 0)
    # However the work is cut, the same sums in the same order.
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@EACH_LAYOUT
@EACH_DTYPE
def test_same_bits_as_the_cpu_kernel(library, dtype, layout):
    reason = extension.status("cpu")
    if reason is not None:
        pytest.skip(reason)
    x = images((2, 8, 19, 16), dtype, layout)
    assert torch.equal(run(library, x)[0], ops.avg_pool5(x, backend="native"))


@EACH_LAYOUT
@EACH_DTYPE
def test_special_values_stay_in_their_windows(library, dtype, layout):
    x = images((2, 8, 20, 16), dtype, layout)
    for at, value in (((0, 1, 3, 4), NAN), ((1, 2, 9, 0), INF), ((1, 7, 19, 15), -INF)):
        x[at] = value
    y, _ = run(library, x)
    expected = reference.avg_pool5(x.double())
    finite = expected.isfinite()
    assert torch.equal(y.isfinite(), finite) and 0 < int((~finite).sum()) <= 3 * 25
    torch.testing.assert_close(
        y[~finite].double(), expected[~finite], rtol=0, atol=0, equal_nan=True
    )


@EACH_LAYOUT
def test_is_its_own_gradient(library, layout):
    """<pool(x), g> = <x, pool(g)>, by the kernel alone."""
    x, g = (images((2, 8, 33, 6), torch.float64, layout, seed) for seed in (0, 1))
    left, right = (run(library, x)[0] * g).sum(), (x * run(library, g)[0]).sum()
    torch.testing.assert_close(left, right)
