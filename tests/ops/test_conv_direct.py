"""The direct convolution's kernel: against float64, its memory, and equal bits whatever the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.cpu import (
    assert_threads_give_the_same_bits,
    at_every_level,
    between_nans,
    poisoned_outputs,
)
from support.tolerances import TOLERANCES, relative_error

from ncsn_fast import ops
from ncsn_fast.ops import algorithms, reference
from ncsn_fast.ops.functional._convolution import convolve

DIRECT = torch.ops.ncsn_fast.conv_direct.default
FORWARD = TOLERANCES[torch.float32].forward
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)

# (samples, channels, height, width), outputs, dilation, side: first and last layers, few channels, taps that lie in the
# padding for some or all pixels, blocks and panels that are not full, one pixel, runs longer than a segment.
CASES = [
    ((2, 3, 16, 32), 40, 1, 3),
    ((2, 128, 6, 15), 3, 1, 3),
    ((3, 8, 9, 29), 8, 1, 3),
    ((1, 1, 5, 1), 16, 1, 3),
    ((2, 5, 4, 5), 33, 2, 3),
    ((2, 40, 9, 13), 17, 8, 3),
    ((2, 7, 3, 3), 70, 8, 3),
    ((1, 300, 2, 3), 9, 1, 3),
    ((2, 20, 4, 6), 50, 1, 1),
]


def inputs(shape, outputs, side, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    n, channels, *size = shape
    x, residual = (
        torch.randn(s, generator=generator).contiguous(memory_format=torch.channels_last)
        for s in (shape, (n, outputs, *size))
    )
    weight = torch.randn(outputs, channels, side, side, generator=generator)
    weight = (weight / (side**2 * channels) ** 0.5).contiguous(memory_format=layout)
    return x, weight, torch.randn(outputs, generator=generator), residual


def wide(*tensors):
    return [t.double() for t in tensors]


@LAYOUTS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, layout):
    """With NaN around the inputs and in the fresh output."""
    shape, outputs, dilation, side = case
    tensors = inputs(shape, outputs, side, layout)
    guarded = [between_nans(t) for t in tensors]
    for elu in (False, True):
        expected = reference.conv_direct(*wide(*tensors), dilation, elu)
        bare = reference.conv_direct(*wide(*tensors[:2]), None, None, dilation, elu)
        with poisoned_outputs():
            assert relative_error(DIRECT(*guarded, dilation, elu), expected) <= FORWARD
            y = DIRECT(*guarded[:2], None, None, dilation, elu)
        assert relative_error(y, bare) <= FORWARD
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_alone_has_the_same_bits(case):
    (n, *shape), outputs, dilation, side = case
    x, weight, bias, residual = inputs((n + 4, *shape), outputs, side)

    def call():
        return [DIRECT(x, weight, bias, residual, dilation, True)]

    (y,) = assert_threads_give_the_same_bits(call)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(DIRECT(x, last, bias, residual, dilation, True), y)
    for i in (0, n + 3):
        part = slice(i, i + 1)
        assert torch.equal(DIRECT(x[part], weight, bias, residual[part], dilation, True), y[part])


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_the_public_convolution_has_the_same_bits_in_either_layout(algorithm):
    x, weight, bias, residual = inputs((3, 6, 9, 8), 5, 3)
    for function in (ops.conv3x3, ops.elu_conv3x3):
        y = function(x, weight, bias, residual=residual, conv_algo=algorithm)
        for i in range(3):
            one = (x[i : i + 1].contiguous(), residual[i : i + 1].contiguous())
            alone = function(one[0], weight, bias, residual=one[1], conv_algo=algorithm)
            assert alone.is_contiguous() and torch.equal(alone[0], y[i])


def test_what_is_not_finite_stays_in_its_sample():
    x, weight, bias, _ = inputs((3, 4, 5, 6), 7, 3)
    x[1, 2, 3, 4] = float("nan")
    y = DIRECT(x, weight, bias, None, 1, False)
    assert y[1].isnan().any() and y[0].isfinite().all() and y[2].isfinite().all()
    assert torch.equal(y[1].isnan(), F.conv2d(x, weight, bias, padding=1)[1].isnan())


@pytest.mark.parametrize("elu", [False, True])
@pytest.mark.parametrize("case", [CASES[4], CASES[8]], ids=str)
def test_gradients_to_second_order(case, elu, record_backends):
    shape, outputs, dilation, side = case

    def gradients(dtype, function):
        tensors = [t.to(dtype).requires_grad_() for t in inputs(shape, outputs, side)]
        y = function(*tensors)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        total = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(total, tensors)]

    def ours(x, weight, bias, residual):
        return convolve(x, weight, bias, residual, dilation, elu, algorithms.DIRECT)

    with record_backends() as ran:
        got = gradients(torch.float32, ours)
    assert ran == [("conv_direct", "native")]
    expected = gradients(torch.float64, lambda *t: reference.conv_direct(*t, dilation, elu))
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCES[torch.float32].gradient


def test_gradients_that_nobody_wants():
    x, weight, bias, residual = inputs((1, 3, 4, 5), 2, 3)
    for wanted in (weight, bias, residual):
        wanted.requires_grad_()
        y = ops.conv3x3(x, weight, bias, residual=residual, conv_algo="direct")
        (grad,) = torch.autograd.grad(y.sum(), wanted)
        plain = F.conv2d(x, weight, bias, padding=1) + residual
        torch.testing.assert_close(grad, torch.autograd.grad(plain.sum(), wanted)[0])
        wanted.requires_grad_(False)
    weight.requires_grad_()
    y = ops.conv3x3(x, weight, None, conv_algo="direct")
    assert torch.autograd.grad(y.sum(), weight)[0].isfinite().all()


def test_opcheck():
    x, weight, bias, residual = inputs((2, 3, 6, 7), 5, 3)
    torch.library.opcheck(DIRECT, (x, weight, bias, residual, 2, True))
    torch.library.opcheck(DIRECT, (x, weight[:, :, :1, :1].contiguous(), None, None, 1, False))


def test_bad_input():
    x, weight, bias, residual = inputs((2, 3, 6, 7), 5, 3)
    for arguments, message in (
        ((x.contiguous(), weight, bias, residual, 1), "x must have shape .* channels_last"),
        ((x, weight[:, :2], bias, residual, 1), "weight must fit the 3 channels"),
        ((x, weight[:, :, :2], bias, residual, 1), r"weight must have shape \(O, C, 3, 3\)"),
        ((x, weight, bias[:2], residual, 1), "bias must be a contiguous"),
        ((x, weight, bias, residual[:1], 1), "residual must have the shape"),
        ((x, weight, bias, residual, 0), "dilation must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            DIRECT(*arguments, False)


def check_level() -> str:
    """For ``at_every_level``: the largest error, and whether a sample alone has the same bits."""
    worst, same = 0.0, True
    for shape, outputs, dilation, side in CASES:
        tensors = inputs(shape, outputs, side)
        y = DIRECT(*tensors, dilation, True)
        worst = max(
            worst, relative_error(y, reference.conv_direct(*wide(*tensors), dilation, True))
        )
        x, weight, bias, residual = tensors
        same = same and torch.equal(
            DIRECT(x[:1], weight, bias, residual[:1], dilation, True), y[:1]
        )
    return f"{worst} {same}"


def test_every_simd_level():
    for answer in at_every_level("test_conv_direct"):
        worst, same = answer.split()
        assert float(worst) <= FORWARD and same == "True"
