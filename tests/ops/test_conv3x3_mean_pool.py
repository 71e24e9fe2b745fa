"""Convolution and 2x2 mean at once, against the two one after the other in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import TOLERANCES, WINOGRAD, relative_error
from torch.autograd import gradcheck, gradgradcheck

from ncsn_fast import ops
from ncsn_fast.ops import reference

LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
KERNELS = pytest.mark.parametrize("kernel", [3, 1])


def inputs(shape, outputs, kernel, dtype=torch.float32, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(outputs, shape[1], kernel, kernel, generator=generator) / kernel
    bias = torch.randn(outputs, generator=generator)
    n, _, height, width = shape
    grad = torch.randn(n, outputs, height // 2, width // 2, generator=generator)
    return [t.to(dtype) for t in (x, weight, bias, grad)]


def gradients(call, arguments, grad):
    leaves = [t.detach().requires_grad_() for t in arguments]
    y = call(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad)


@KERNELS
def test_reference_is_the_mean_of_the_four_phases(kernel):
    x, weight, bias, _ = inputs((2, 3, 6, 8), 4, kernel, torch.float64)
    y = F.conv2d(x, weight, bias, padding=kernel // 2)
    phases = (y[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    torch.testing.assert_close(reference.conv3x3_mean_pool(x, weight, bias), sum(phases) / 4)


@KERNELS
@LAYOUTS
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (1, 17, 32, 30), (3, 8, 6, 10), (0, 2, 4, 4)])
def test_against_float64(shape, dtype, layout, kernel):
    *arguments, grad = inputs(shape, 5, kernel, dtype, layout)
    got = gradients(ops.conv3x3_mean_pool, arguments, grad)
    wide = [t.double() for t in arguments]
    want = gradients(reference.conv3x3_mean_pool, wide, grad.double())
    plain = gradients(reference.conv3x3_mean_pool, arguments, grad)
    tolerance = WINOGRAD if (dtype, kernel) == (torch.float32, 3) else TOLERANCES[dtype]
    for i, (a, b, eager) in enumerate(zip(got, want, plain, strict=True)):
        assert a.dtype == dtype
        bound = tolerance.gradient if i else tolerance.forward
        assert relative_error(a, b) <= max(bound, 2 * relative_error(eager, b))
    assert got[0].numel() == 0 or got[0].is_contiguous(memory_format=layout)


@LAYOUTS
def test_which_algorithm(layout, record_backends):
    """Kernels of our own where they serve, else one convolution with stride 2; all give the same."""
    x, weight, bias, _ = inputs((2, 17, 16, 18), 5, 3, layout=layout)
    wide = [t.double() for t in (x, weight, bias)]
    expected = reference.conv3x3_mean_pool(*wide)
    with record_backends() as ran:
        y = ops.conv3x3_mean_pool(x, weight, bias)
    assert ran == [("conv3x3", "native")]
    assert relative_error(y, expected) <= WINOGRAD.forward
    with record_backends() as ran:
        y = ops.conv3x3_mean_pool(x, weight, bias, backend="reference")
        assert relative_error(y, expected) <= TOLERANCES[torch.float32].forward
        torch.testing.assert_close(ops.conv3x3_mean_pool(*wide), expected)
        ops.conv3x3_mean_pool(x, weight[:, :, :1, :1], bias, backend="reference")
    assert not ran
    thin = x[:, :3].contiguous(memory_format=layout)
    with record_backends() as ran:
        ops.conv3x3_mean_pool(x, weight[:, :, :1, :1], bias)
        few = ops.conv3x3_mean_pool(thin, weight[:, :3], bias)
    assert ran == [("conv_direct", "native")] * 2
    wide = [t.double() for t in (thin, weight[:, :3], bias)]
    assert relative_error(few, reference.conv3x3_mean_pool(*wide)) <= 1e-6


def test_second_order_by_the_engine():
    results = []
    for dtype in (torch.float32, torch.float64):
        x, weight, bias, _ = inputs((1, 16, 8, 6), 4, 3, dtype)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        y = ops.conv3x3_mean_pool(*leaves, bias)
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), leaves))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= WINOGRAD.gradient


@KERNELS
def test_gradients_to_second_order(kernel):
    *arguments, _ = inputs((1, 2, 4, 6), 2, kernel, torch.float64)
    leaves = [t.requires_grad_() for t in arguments]
    assert gradcheck(ops.conv3x3_mean_pool, leaves)
    assert gradgradcheck(ops.conv3x3_mean_pool, leaves)


@pytest.mark.slow
@KERNELS
def test_fullgraph(kernel):
    *arguments, grad = inputs((2, 3, 6, 4), 5, kernel)
    torch.compiler.reset()
    compiled = torch.compile(ops.conv3x3_mean_pool, fullgraph=True, backend="aot_eager")
    want = gradients(ops.conv3x3_mean_pool, arguments, grad)
    torch.testing.assert_close(gradients(compiled, arguments, grad), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 5, 6)}, ValueError, r"even and >= 2, got \(2, 3, 5, 6\)"),
        ({"x": torch.zeros(2, 3, 6, 3)}, ValueError, r"even and >= 2, got \(2, 3, 6, 3\)"),
        ({"x": torch.zeros(3, 6, 6)}, ValueError, r"\(N, C, H, W\).*got \(3, 6, 6\)"),
        ({"x": torch.zeros(2, 3, 6, 6).int()}, TypeError, "x must have dtype.*got int32"),
        ({"weight": torch.zeros(5, 3, 5, 5)}, ValueError, r"\(O, 3, 1, 1\), got \(5, 3, 5, 5\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
    ],
)
def test_refuses(change, error, message):
    x, weight, bias, _ = inputs((2, 3, 6, 8), 5, 3)
    with pytest.raises(error, match=message):
        ops.conv3x3_mean_pool(**({"x": x, "weight": weight, "bias": bias} | change))
