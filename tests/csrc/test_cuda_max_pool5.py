"""The CUDA kernels of max_pool5 without a GPU: every thread of every launch, run on the CPU, against the reference.

Results on a real GPU are in test_cuda_network.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.cuda_host import DTYPES, Canary, compile_for_host

from ncsn_fast.ops import reference

INF, NAN = float("inf"), float("nan")
# Smaller than a window; odd sizes; vectors along rows and across channels, at both ends of a row; several bands.
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 7), (2, 5, 7, 1), (3, 3, 5, 7), (1, 2, 3, 8), (2, 8, 4, 24)]
SHAPES += [(1, 16, 33, 6), (1, 2, 35, 16), (2, 3, 40, 9)]


class Call(ctypes.Structure):
    """As in cuda_pool.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "channels", "rows", "pixels")),
        *((name, ctypes.c_int64) for name in ("contiguous", "dtype", "aligned", "zero")),
        ("multiprocessors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "grad_y", "out", "choices")),
        ("tiling", ctypes.c_int64 * 3),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compile_for_host(
        Path(__file__).parent / "cuda_pool.cpp", tmp_path_factory.mktemp("cuda")
    )


def values(shape, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3
    if kind == "ordinary":
        return x
    x = torch.where(torch.rand(shape, generator=generator) < 0.6, -INF, x.round())
    if kind == "special":
        for value in (NAN, INF):
            x[torch.rand(shape, generator=generator) < 0.03] = value
    return x


def run(library, x, grad_y, padding, *, aligned=True, multiprocessors=1):
    """y, grad_x and the tiling."""
    held = [Canary(t, aligned).holding(t) for t in (x, grad_y)]
    results = []
    for gradient in (False, True):
        out = Canary(x)
        choices = torch.full((x.numel(),), 200, dtype=torch.uint8)
        call = Call(
            *x.shape,
            x.is_contiguous(),
            DTYPES.index(x.dtype),
            aligned,
            padding == "zero",
            multiprocessors,
            held[0].data_ptr(),
            held[1].data_ptr() if gradient else None,
            out.tensor.data_ptr(),
            choices.data_ptr(),
        )
        library.pool(ctypes.byref(call))
        out.check()
        results.append(out.tensor)
    return *results, list(call.tiling)


@pytest.mark.parametrize("padding", ["neg_inf", "zero"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_reference(library, dtype, shape, last, padding):
    """Gradients are small integers, whose sums are exact in every dtype."""
    layout = torch.channels_last if last else torch.contiguous_format
    for kind in ("ordinary", "tied", "special"):
        x = values(shape, kind).to(dtype).contiguous(memory_format=layout)
        grad_y = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grad_y = grad_y.contiguous(memory_format=layout)
        expected = (
            reference.max_pool5(x, padding),
            reference.max_pool5_backward(grad_y, x, padding),
        )
        for aligned, multiprocessors in ((True, 132), (True, 0), (False, 132)):
            options = dict(aligned=aligned, multiprocessors=multiprocessors)
            *results, tiling = run(library, x, grad_y, padding, **options)
            for got, want in zip(results, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            wide = 16 // x.element_size()
            axis = shape[3] if x.is_contiguous() else shape[1]
            fits = aligned and dtype != torch.float64 and axis % wide == 0
            assert tiling[:2] == [wide if fits else 1, fits and x.is_contiguous()]
            assert (tiling[2] > 1) == (shape[2] >= 4 and multiprocessors > 0)
