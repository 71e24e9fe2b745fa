"""The 3x3 convolution alone: by its algorithms, and which of them runs.

The engine's tiles, threads and memory are tested with a norm before it, in ``test_norm_elu_conv3x3.py``.
"""

from __future__ import annotations

import pytest
import torch
from support.tolerances import TOLERANCES, WINOGRAD, relative_error

from ncsn_fast import ops
from ncsn_fast.ops import algorithms, reference

CONV = torch.ops.ncsn_fast.conv3x3.default
WEIGHT_GRADIENT = torch.ops.ncsn_fast.conv3x3_weight_gradient.default


def inputs(shape, outputs, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    n, channels, *size = shape
    x, residual = (
        torch.randn(shape, generator=generator).contiguous(memory_format=layout)
        for shape in (shape, (n, outputs, *size))
    )
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return x, weight, torch.randn(outputs, generator=generator), residual


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_against_float64(layout, record_backends):
    x, weight, bias, residual = inputs((2, 7, 9, 10), 6, layout)
    with record_backends() as ran:
        y = ops.conv3x3(x, weight, bias, dilation=3, residual=residual, conv_algo="winograd")
    assert ran == [("conv3x3", "native")] and y.stride() == residual.stride()
    expected = reference.conv3x3(
        x.double(), weight.double(), bias.double(), residual.double(), dilation=3
    )
    assert relative_error(y, expected) <= WINOGRAD.forward


def test_the_rounding_of_many_channels():
    """Of numbers without a pattern, whose products cancel; other interpolation points would double it."""
    x, weight, *_ = inputs((1, 256, 12, 12), 32)
    y = ops.conv3x3(x, weight, None, conv_algo="winograd")
    wide = reference.conv3x3(x.double(), weight.double(), None)
    assert relative_error(y, wide) <= WINOGRAD.forward


def test_which_algorithm(record_backends):
    def ran_by(channels, height, width, dilation, conv_algo, dtype=torch.float32):
        x, weight, bias, _ = (t.to(dtype) for t in inputs((1, channels, height, width), 4))
        with record_backends() as ran:
            ops.conv3x3(x, weight, bias, dilation=dilation, conv_algo=conv_algo)
        return {"conv3x3": "winograd", "conv_direct": "direct"}[ran[0][0]] if ran else "composed"

    for algorithm in ("direct", "winograd"):
        assert ran_by(20, 32, 32, 8, algorithm) == ran_by(2, 3, 3, 8, algorithm) == algorithm
    table = {
        (16, 32, 32, 1): "winograd",
        (16, 32, 32, 8): "winograd",
        (16, 16, 16, 8): "direct",  # images of 2x2
        (16, 33, 32, 8): "winograd",
        (3, 12, 12, 1): "winograd",
        (3, 32, 32, 1): "direct",
        (32, 1, 1, 1): "direct",
    }
    for case, expected in table.items():
        assert ran_by(*case, "auto") == expected, case
    assert ran_by(16, 32, 32, 1, "auto", torch.float64) == "composed"
    with pytest.raises(
        RuntimeError, match="'winograd' cannot serve conv3x3: winograd takes float32"
    ):
        ran_by(16, 32, 32, 1, "winograd", torch.float64)
    with pytest.raises(ValueError, match="conv_algo must be one of auto, direct, gemm, winograd"):
        ran_by(16, 32, 32, 1, "fft")


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("channels", [3, 20])  # direct, winograd
def test_16_bits_are_computed_in_float32(channels, dtype, autocast, record_backends, monkeypatch):
    """Where the processor has no matrix units for them; x comes back in its own dtype."""
    monkeypatch.setattr(algorithms, "processor_flags", frozenset)
    x, weight, bias, residual = inputs((2, channels, 16, 15), 6)
    if not autocast:
        x, weight, bias, residual = (t.to(dtype) for t in (x, weight, bias, residual))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    with record_backends() as ran, torch.autocast("cpu", dtype, enabled=autocast):
        y = ops.conv3x3(*leaves[:3], residual=leaves[3])
    assert ran == [("conv_direct" if channels == 3 else "conv3x3", "native")]
    assert y.dtype == x.dtype
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = reference.conv3x3(*wide)
    grads = torch.autograd.grad(y.double().square().sum(), leaves)
    wants = torch.autograd.grad(expected.square().sum(), wide)
    tolerance = WINOGRAD if autocast else TOLERANCES[dtype]  # autocast loses nothing
    assert relative_error(y, expected) <= tolerance.forward
    for grad, want in zip(grads, wants, strict=True):
        assert grad.dtype == x.dtype and relative_error(grad, want) <= tolerance.gradient


@pytest.mark.parametrize("dtype", HALF)
def test_16_bits_are_left_to_pytorch_on_a_processor_with_matrix_units(
    dtype, record_backends, monkeypatch
):
    flags = frozenset({"avx2", "amx_bf16", "amx_fp16"})
    monkeypatch.setattr(algorithms, "processor_flags", lambda: flags)
    x, weight, bias, _ = inputs((2, 20, 16, 15), 6)
    with record_backends() as ran:
        half = ops.conv3x3(x.to(dtype), weight.to(dtype), bias.to(dtype))
        with torch.autocast("cpu", dtype):
            cast = ops.conv3x3(x, weight, bias)
            double = ops.conv3x3(x.double(), weight.double(), bias.double())
        ops.conv3x3(x.to(dtype), weight.to(dtype), None, backend="native")
    assert half.dtype == cast.dtype == dtype and double.dtype == torch.float64
    assert ran == [("conv3x3", "native")]


def test_opcheck():
    x, weight, bias, residual = inputs((2, 3, 6, 7), 5)
    for arguments in (
        (x, weight, bias, residual, 2, False, True),
        (residual, weight, None, None, 1, True, False),
    ):
        torch.library.opcheck(CONV, arguments)
    no_norm = (None, None, None, None)
    for elu in (False, True):
        torch.library.opcheck(WEIGHT_GRADIENT, (residual, x, *no_norm, 1, elu))
