"""Conditional instance norm + ELU: all that is right for any backend, and what can go wrong in the C++ kernels alone.

Tests with the fixture ``backend`` run on the reference, in C++ and in Triton's interpreter. Elsewhere: the tiles of the
Triton kernels (tests/kernels), the bodies of the CUDA kernels on the CPU (tests/csrc), results on a GPU (tests/gpu).
It is longer than other files, because it is all of one operator.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.backends import expected_record, few
from support.cpu import (
    assert_threads_give_the_same_bits,
    at_every_level,
    between_nans,
    poisoned_outputs,
)
from support.tolerances import assert_forward, assert_gradient, relative_error
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from ncsn_fast import ops
from ncsn_fast.ops import autograd, reference
from ncsn_fast.ops.dispatch import layout_of

FORWARD = torch.ops.ncsn_fast.cond_instance_norm_elu.default
BACKWARD = torch.ops.ncsn_fast.cond_instance_norm_elu_backward.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around the kernels' 32 lanes and 256 rows: less than a row, odd rests, several tiles, one pixel, many channels.
SHAPES = (
    (2, 5, 9),
    (2, 3, 5, 7),
    (1, 4, 1, 1),
    (4, 2, 8, 8),
    (3, 8, 33, 31),
    (2, 32, 4, 4),
    (1, 64, 7, 7),
    (2, 48, 6, 5),
    (2, 33, 1, 1),
    (2, 2, 131, 127),
    (2, 100, 3, 1),
    (2, 3, 2, 5, 3),
    (2, 40, 3, 5, 6),
)
K = 4
PLUSPLUS = pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
CHANNELS_LAST = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


def to_layout(x, channels_last):
    """As channels_last, where there is such a layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last and x.dim() > 3 else x


def inputs(shape, dtype=torch.float32, channels_last=False, columns=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = to_layout((torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype), channels_last)
    weight = (torch.randn(K, columns * shape[1], generator=generator) + 1).to(dtype)
    labels = torch.randint(K, shape[:1], generator=generator)
    grad = to_layout(torch.randn(shape, generator=generator).to(dtype), channels_last)
    return x, labels, weight, grad


def gradients(norm, x, labels, weight, grad, elu=True):
    """The result, and the gradients for x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = norm(x, labels, weight, 1e-5, elu)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad)


def on(backend):
    return partial(ops.cond_instance_norm_elu, backend=backend)


native = on("native")


def assert_right(x, labels, weight, grad, elu=True, backend="native"):
    y, grad_x, grad_weight = gradients(on(backend), x, labels, weight, grad, elu)
    assert y.dtype == grad_x.dtype == x.dtype and grad_weight.dtype == weight.dtype
    assert y.stride() == x.stride()
    expected = gradients(
        reference.cond_instance_norm_elu, x.double(), labels, weight.double(), grad.double(), elu
    )
    assert_forward(y, expected[0], x.dtype)
    assert_gradient(grad_weight, expected[2], x.dtype)
    one_pixel = x[0, 0].numel() == 1
    if backend == "native":
        assert grad_x.stride() == x.stride()
        if one_pixel and weight.shape[1] == 2 * x.shape[1]:
            assert not grad_x.any()
            return
    elif one_pixel:
        return  # the plane's own part is 0, but for rounding times 1/sqrt(eps)
    assert_gradient(grad_x, expected[1], x.dtype)


# --- values, on every backend ---------------------------------------------------------------------


def test_reference_is_the_formula():
    x, labels, weight, _ = inputs((3, 5, 6, 7), torch.float64)
    gamma, beta = weight[labels].chunk(2, dim=1)
    xhat = F.instance_norm(x, eps=1e-5)
    expected = F.elu(gamma[:, :, None, None] * xhat + beta[:, :, None, None])
    torch.testing.assert_close(reference.cond_instance_norm_elu(x, labels, weight), expected)

    x, labels, weight, _ = inputs((3, 5, 6, 7), torch.float64, columns=3)
    gamma, alpha, beta = (t[:, :, None, None] for t in weight[labels].chunk(3, dim=1))
    means = x.mean((2, 3), keepdim=True)
    m = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + 1e-5).sqrt()
    expected = gamma * (F.instance_norm(x, eps=1e-5) + alpha * m) + beta
    got = reference.cond_instance_norm_elu(x, labels, weight, elu=False)
    torch.testing.assert_close(got, expected)


@PLUSPLUS
@CHANNELS_LAST
@pytest.mark.parametrize("shape", few(SHAPES), ids=str)
@pytest.mark.parametrize("dtype", few(DTYPES), ids=str)
def test_against_float64(backend, dtype, shape, channels_last, columns, record_backends):
    for elu in few((True, False)):
        with record_backends() as ran:
            assert_right(*inputs(shape, dtype, channels_last, columns), elu, backend)
        assert ran == expected_record(
            backend, "cond_instance_norm_elu", "cond_instance_norm_elu_backward"
        )


def test_the_third_derivative(backend):
    """A gradient penalty is differentiated by a second derivative: nothing is taken as constant."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, labels, weight, v = inputs((2, 2, 3, 4), torch.float64)
    results = []
    for norm, kind in ((on(backend), dtype), (reference.cond_instance_norm_elu, torch.float64)):
        a = x.to(kind).requires_grad_()
        g = norm(a, labels, weight.to(kind)).pow(3).sum()
        for _ in range(3):
            # Not the plain sum: a norm does not see a shift, so that a gradient's sum over a plane is always 0.
            (g,) = torch.autograd.grad((g * v.to(kind)).sum(), a, create_graph=True)
        results.append(g)
    assert results[1].norm() > 1
    assert_gradient(*results, dtype)


def test_keeps_digits_of_a_large_mean(backend):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    weight = torch.cat([torch.ones(1, 3), torch.zeros(1, 3)], dim=1)
    labels = torch.zeros(2, dtype=torch.int64)
    expected = F.instance_norm(x.double(), eps=1e-5)
    got = on(backend)(x, labels, weight, 1e-5, False)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


def test_one_pixel_is_beta(backend):
    x, labels, weight, _ = inputs((2, 3, 1, 1))
    beta = weight[labels][:, 3:, None, None]
    torch.testing.assert_close(on(backend)(x, labels, weight), F.elu(beta))


@CHANNELS_LAST
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 32, 4, 4)], ids=str)
def test_an_empty_batch(backend, shape, channels_last):
    x, labels, weight, grad = inputs(shape, channels_last=channels_last)
    for label in (labels, torch.tensor([1])):
        y, grad_x, grad_weight = gradients(on(backend), x, label, weight, grad)
        assert y.shape == grad_x.shape == shape
        assert grad_weight.shape == weight.shape and not grad_weight.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_plane(backend, bad):
    x, labels, weight, _ = inputs((2, 3, 4, 4))
    x[1, 2, 0, 0] = bad
    y = on(backend)(x, labels, weight)
    assert y[1, 2].isnan().all()
    y[1, 2] = 0
    assert y.isfinite().all()


def test_labels(backend):
    x, _, weight, _ = inputs((3, 2, 4, 4))
    norm = on(backend)
    one, all_ = torch.tensor([2]), torch.tensor([2, 2, 2])
    torch.testing.assert_close(norm(x, one, weight), norm(x, all_, weight), rtol=0, atol=0)
    weight.requires_grad_()
    grads = [torch.autograd.grad(norm(x, y, weight).sum(), weight)[0] for y in (one, all_)]
    torch.testing.assert_close(*grads)
    assert torch.equal(norm(x, one.to(torch.int32), weight), norm(x, one, weight))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("label", [-1, K])
def test_a_label_out_of_range(backend, label):
    """On a GPU it is an assertion there; in Triton's interpreter, NaN."""
    x, _, weight, _ = inputs((3, 2, 4, 4))
    with pytest.raises(IndexError):
        on(backend)(x, torch.tensor([0, label, 1]), weight)


def test_float32_weight_with_half_input(backend):
    x, labels, weight, _ = inputs((2, 3, 5, 5), torch.bfloat16)
    weight = weight.float().requires_grad_()
    y = on(backend)(x, labels, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_other_ranks_and_strides():
    for shape in ((2, 3, 9), (2, 3, 2, 3, 4)):
        x, labels, weight, _ = inputs(shape, torch.float64)
        flat = ops.cond_instance_norm_elu(x.reshape(2, 3, 1, -1), labels, weight)
        torch.testing.assert_close(ops.cond_instance_norm_elu(x, labels, weight), flat.view(shape))
    x, labels, weight, _ = inputs((2, 3, 8, 8))
    for view in (x[:, :, ::2, 1:5], x.transpose(2, 3), x[:, :, 1:]):
        got = ops.cond_instance_norm_elu(view, labels, weight)
        torch.testing.assert_close(
            got, ops.cond_instance_norm_elu(view.contiguous(), labels, weight)
        )


# --- values, in C++ -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 16, 32, 32), (2, 32, 7, 7), (1, 3, 150, 150)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_twice_eager(dtype, shape):
    x, labels, weight, grad = inputs(shape, dtype)

    def eager(x, labels, weight, eps, elu):
        gamma, beta = F.embedding(labels, weight)[:, :, None, None].chunk(2, dim=1)
        return F.elu(gamma * F.instance_norm(x, eps=eps) + beta)

    wide = (x.double(), labels, weight.double(), grad.double())
    expected = gradients(reference.cond_instance_norm_elu, *wide)
    for ours, theirs, want in zip(
        gradients(native, x, labels, weight, grad),
        gradients(eager, x, labels, weight, grad),
        expected,
        strict=True,
    ):
        assert relative_error(ours, want) <= 2 * relative_error(theirs, want)


def test_two_axes():
    """(N, C) as planes of one element: only the operator takes them."""
    x, labels, weight, grad = inputs((3, 40, 1), columns=3)
    forward = FORWARD(x, labels, weight, 1e-5, True)
    flat = FORWARD(x[:, :, 0], labels, weight, 1e-5, True)
    assert flat[0].shape == (3, 40)
    for got, want in zip(flat, forward, strict=True):
        assert torch.equal(got, want.view_as(got))
    got = BACKWARD(grad[:, :, 0], x[:, :, 0], labels, weight, *flat[1:], True)
    want = BACKWARD(grad, x, labels, weight, *forward[1:], True)
    assert torch.equal(got[0], want[0][:, :, 0]) and torch.equal(got[1], want[1])


@PLUSPLUS
@CHANNELS_LAST
def test_the_reference_kernels_give_the_same(columns, channels_last):
    """Statistics and gradients by the operators; with this build, the only test of the reference's own backward."""
    x, labels, weight, grad = inputs((3, 8, 7, 9), torch.float64, channels_last, columns)
    for elu in (True, False):
        got = FORWARD(x, labels, weight, 1e-3, elu)
        want = reference.cond_instance_norm_elu_with_statistics(x, labels, weight, 1e-3, elu)
        torch.testing.assert_close(got, want)
        call = (x, labels, weight, *want[1:], elu)
        want = reference.cond_instance_norm_elu_backward(grad, *call)
        torch.testing.assert_close(BACKWARD(grad, *call), want)


@CHANNELS_LAST
@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 32, 9, 9), (2, 5, 150, 150)], ids=str)
def test_a_large_mean_costs_no_digits(shape, mean, channels_last):
    x, labels, weight, _ = inputs(shape, channels_last=channels_last)
    x = x + mean
    expected = reference.cond_instance_norm_elu(x.double(), labels, weight.double())
    assert_forward(native(x, labels, weight), expected, torch.float32)


@CHANNELS_LAST
def test_an_outlier_and_a_constant_plane(channels_last):
    x, labels, weight, grad = inputs((2, 5, 20, 21), channels_last=channels_last)
    x[0, 1, 0, 0] = 1e6  # the first element: useless as a shift
    x[1, 2] = 1e4 / 3
    assert_right(x, labels, weight, grad)
    beta = weight[labels][1, 5 + 2]
    torch.testing.assert_close(native(x, labels, weight, elu=False)[1, 2], beta.expand(20, 21))


@PLUSPLUS
@CHANNELS_LAST
@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_the_reference_has_it(bad, channels, channels_last, columns):
    x, labels, weight, grad = inputs((2, channels, 6, 7), torch.float32, channels_last, columns)
    x[1, 2, 5, 6] = bad
    got = gradients(native, x, labels, weight, grad)
    want = gradients(reference.cond_instance_norm_elu, x, labels, weight, grad)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()


# --- memory ---------------------------------------------------------------------------------------


@PLUSPLUS
@CHANNELS_LAST
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unaligned_slices_between_nans(shape, channels_last, columns):
    """Every output element is written, and nothing beside an input is read into a result."""
    arguments = inputs(shape, torch.float32, channels_last, columns)
    with poisoned_outputs():
        got = gradients(native, *map(between_nans, arguments))
    want = gradients(native, *arguments)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)


@PLUSPLUS
@CHANNELS_LAST
def test_the_gradient_may_come_in_any_layout(channels_last, columns):
    x, labels, weight, grad = inputs((2, 6, 5, 7), torch.float32, channels_last, columns)
    for other in (
        to_layout(grad.contiguous(), not channels_last),
        grad.mT.contiguous().mT,
        grad[:1, :1].expand(x.shape),
    ):
        got = gradients(native, x, labels, weight, other)
        want = gradients(
            native,
            x,
            labels,
            weight,
            other.clone(memory_format=torch.preserve_format) + torch.zeros_like(x),
        )
        assert got[1].stride() == x.stride()
        assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weights_of_any_dtype_and_strides(dtype, weight_dtype):
    x, labels, weight, grad = inputs((5, 3, 6, 6), dtype)
    weight = weight.to(weight_dtype)
    expected = gradients(native, x, labels, weight.to(dtype), grad)
    for same in (weight, weight.t().contiguous().t(), weight.repeat(2, 2)[:K, : 2 * 3]):
        got = gradients(native, x, labels, same, grad)
        assert got[2].dtype == weight_dtype
        if weight_dtype == dtype:
            assert all(torch.equal(ours, want) for ours, want in zip(got, expected, strict=True))
        else:
            wide = gradients(
                reference.cond_instance_norm_elu, x.double(), labels, weight.double(), grad.double()
            )
            assert_forward(got[0], wide[0], dtype)
            assert_gradient(got[1], wide[1], dtype)
            coarser = max((dtype, weight_dtype), key=lambda d: torch.finfo(d).eps)
            assert_gradient(got[2], wide[2], coarser)


def test_labels_of_any_stride_and_one_for_all():
    x, _, weight, grad = inputs((4, 3, 5, 5))
    table = torch.tensor([[3, 0], [1, 0], [0, 0], [3, 0]])
    got = gradients(native, x, table[:, 0], weight, grad)
    want = gradients(native, x, table[:, 0].clone(), weight, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = gradients(native, x, torch.tensor([2]), weight, grad)
    want = gradients(native, x, torch.tensor([2] * 4), weight, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- threads and SIMD levels ----------------------------------------------------------------------


@PLUSPLUS
@CHANNELS_LAST
@pytest.mark.parametrize(
    "shape", [(1, 3, 150, 150), (1, 64, 40, 40), (40, 32, 9, 9), (3, 40, 33, 33)], ids=str
)
def test_any_number_of_threads_gives_the_same_bits(shape, channels_last, columns):
    arguments = inputs(shape, torch.float32, channels_last, columns)
    assert_threads_give_the_same_bits(lambda: gradients(native, *arguments), (1, 2, 3, 16))


def elu_and_slope(values):
    """The kernels' ELU of any numbers, and its derivative: planes of one pixel with gamma 0 are elu(beta)."""
    x = torch.zeros(1, len(values), 1, dtype=values.dtype)
    label, weight = torch.tensor([0]), torch.cat([torch.zeros_like(values), values])[None]
    y, mean, rstd = FORWARD(x, label, weight, 1e-5, True)
    _, grad_weight = BACKWARD(torch.ones_like(x), x, label, weight, mean, rstd, True)
    return y.flatten(), grad_weight[0, len(values) :]


def negative_numbers(dtype):
    """Of every size from the smallest to where exp is 0."""
    if dtype == torch.float32:
        bits = torch.arange(1, 0x42DC0000, 4099, dtype=torch.int32)
        return -bits.view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(50_000, generator=generator, dtype=dtype)
    return -torch.cat([even * 760, even * 2, 2.0 ** (-100 * even)])


def check_elu_bounds():
    """The bounds that csrc/common/elu.h states."""
    for dtype, bound, smallest, beyond in (
        (torch.float32, 1e-7, -87.3, 1e-38),
        (torch.float64, 2.5e-16, -708.0, 1e-300),
    ):
        values = negative_numbers(dtype)
        exact = values.numpy().astype(np.longdouble)
        y, slope = (t.numpy().astype(np.longdouble) for t in elu_and_slope(values))
        assert np.abs(y / np.expm1(exact) - 1).max() < bound
        assert np.abs(slope / np.exp(exact) - 1)[exact > smallest].max() < bound
        assert np.abs(slope - np.exp(exact))[exact <= smallest].max() < beyond
        nan, inf = float("nan"), float("inf")
        special = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, 3.5, 1e38, -1e38], dtype=dtype)
        y, slope = elu_and_slope(special)
        expected = torch.tensor([nan, nan, inf, -1, 0, 0, 3.5, 1e38, -1], dtype=dtype)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        expected = torch.tensor([nan, nan, 1, 0, 1, 1, 1, 1, 0], dtype=dtype)
        torch.testing.assert_close(slope, expected, rtol=0, atol=0, equal_nan=True)


def check_conversions():
    """Every 16-bit number is read, and float32 numbers of every size are rounded, as by PyTorch."""
    label = torch.tensor([0])
    bits = torch.arange(-(2**31), 2**31, 16381).to(torch.int32)
    numbers = torch.cat([bits.view(torch.float32), torch.tensor([65504.0, 65519.9, 65520.0])])
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = every[None, :, None]
        _, mean, _ = FORWARD(x, label, torch.zeros(1, 2 * len(every)), 1e-5, True)
        torch.testing.assert_close(mean[0], every.float(), rtol=0, atol=0, equal_nan=True)
        ties = (every[:-1].float() + every[1:].float()) / 2
        for values in (numbers, ties):
            x = torch.zeros(1, len(values), 1, dtype=dtype)
            weight = torch.cat([torch.zeros_like(values), values])[None]
            y, _, _ = FORWARD(x, label, weight, 1e-5, False)
            want = values.to(dtype)
            torch.testing.assert_close(y.flatten(), want, rtol=0, atol=0, equal_nan=True)


def check_level():
    """What must hold at every SIMD level."""
    check_elu_bounds()
    check_conversions()
    for dtype in DTYPES:
        for shape in SHAPES[1:9]:
            for channels_last in (False, True):
                assert_right(*inputs(shape, dtype, channels_last))


def test_elu_keeps_its_bounds():
    check_elu_bounds()


def test_conversions_are_pytorchs():
    check_conversions()


def test_every_simd_level():
    at_every_level("test_cond_instance_norm_elu")


# --- autograd, the dispatcher, the compiler ---------------------------------------------------------


@PLUSPLUS
@CHANNELS_LAST
@pytest.mark.parametrize("elu", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])  # of float64
def test_gradients_to_second_order(backend, elu, channels_last, columns):
    x, labels, weight, _ = inputs((3, 3, 3, 4), torch.float64, channels_last, columns)

    def call(x, weight):
        return on(backend)(to_layout(x, channels_last), labels, weight, 1e-5, elu)

    arguments = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


def test_forward_mode_is_never_silently_zero():
    x, labels, weight, _ = inputs((2, 3, 4, 4), torch.float64)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        y = ops.cond_instance_norm_elu(dual, labels, weight, backend="reference")
        got = forward_ad.unpack_dual(y).tangent
        with pytest.raises(RuntimeError, match="forward mode"):
            autograd.CondInstanceNormELU.apply(dual, labels, weight, 1e-5, True, "native")
    call = partial(ops.cond_instance_norm_elu, labels=labels, weight=weight)
    _, expected = torch.autograd.functional.jvp(call, x, tangent)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("elu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@CHANNELS_LAST
def test_opcheck(channels_last, dtype, elu):
    """With statistics and weights of another dtype than x, and a gradient of another layout."""
    x, labels, weight, grad = inputs((2, 3, 5, 6), dtype, channels_last)
    torch.library.opcheck(FORWARD, (x, labels, weight.float(), 1e-5, elu))
    _, mean, rstd = FORWARD(x, labels, weight.float(), 1e-5, elu)
    grad = to_layout(grad.contiguous(), not channels_last)
    torch.library.opcheck(BACKWARD, (grad, x, labels, weight.float(), mean, rstd, elu))


@pytest.mark.slow
@CHANNELS_LAST
def test_fullgraph_forward_and_backward(channels_last):
    x, labels, weight, _ = inputs((2, 3, 5, 6), channels_last=channels_last)

    def call(x, labels, weight):
        return native(x, labels, weight).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        arguments = [t.clone().requires_grad_() for t in (x, weight)]
        function(arguments[0], labels, arguments[1]).backward()
        results.append([t.grad for t in arguments])
    torch.testing.assert_close(*results)
    with pytest.raises((IndexError, RuntimeError), match=r"labels must be in 0\.\.3, got 9"):
        compiled(x, torch.full_like(labels, 9), weight)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "labels"),
    [(2, [0, 4]), (2, [-1, 0]), (2, [4]), (0, [4]), (2, [-(2**62), 0]), (2, [0, 2**62])],
    ids=str,
)
def test_labels_out_of_range(samples, labels):
    x, _, weight, grad = inputs((samples, 3, 4, 4))
    labels = torch.tensor(labels)
    wrong = next(v for v in labels.tolist() if not 0 <= v < K)
    message = rf"labels must be in 0\.\.3, got {wrong}"
    with pytest.raises(IndexError, match=message):
        native(x, labels, weight)
    statistics = torch.ones(samples, 3)
    with pytest.raises(IndexError, match=message):
        BACKWARD(grad, x, labels, weight, statistics, statistics, True)


def test_the_operators_guard_their_memory():
    """Direct calls, past the public function's checks."""
    x, labels, weight, grad = inputs((2, 3, 4, 4))
    _, mean, rstd = FORWARD(x, labels, weight, 1e-5, True)
    good = {"x": x, "labels": labels, "weight": weight}
    bad = [
        {"x": torch.zeros(2, 3, 4, 8)[..., ::2]},
        {"x": x.int()},
        {"x": torch.zeros(6)},
        {"x": torch.zeros(2, 3, 0, 4)},
        {"labels": labels.int()},
        {"labels": torch.tensor([0, 1, 2])},
        {"labels": torch.tensor(0)},
        {"weight": torch.zeros(K, 7)},
        {"weight": torch.zeros(6)},
        {"weight": weight.long()},
    ]
    for change in bad:
        arguments = (good | change).values()
        with pytest.raises(RuntimeError, match="must"):
            FORWARD(*arguments, 1e-5, True)
        with pytest.raises(RuntimeError, match="must"):
            BACKWARD(grad, *arguments, mean, rstd, True)
    for gradient in (grad[:1], grad.double(), grad[..., :3], grad.long()):
        with pytest.raises(RuntimeError, match="grad_y must"):
            BACKWARD(gradient, x, labels, weight, mean, rstd, True)
    for statistics in (mean[:1], mean.double(), mean.t(), mean[:, :2], mean.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="must be what the forward pass returned"):
            BACKWARD(grad, x, labels, weight, statistics, rstd, True)
        with pytest.raises(RuntimeError, match="must be what the forward pass returned"):
            BACKWARD(grad, x, labels, weight, mean, statistics, True)


def test_an_autograd_graph_keeps_no_output():
    """The backward pass saves x, mean and rstd, not y: y may be changed in place."""
    x, labels, weight, _ = inputs((2, 3, 4, 4))
    y = autograd.CondInstanceNormELU.apply(x.requires_grad_(), labels, weight, 1e-5, True, "native")
    y.mul_(2)
    y.sum().backward()
    assert layout_of(x.grad) == "contiguous"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"shape \(N, C, \*spatial\).*got \(2, 3\)"),
        ({"x": torch.zeros(2, 3, 0, 4)}, ValueError, r">= 1, got \(2, 3, 0, 4\)"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "float32.*got int32"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"labels": torch.zeros(2)}, TypeError, "labels.*int64.*got float32"),
        ({"labels": torch.zeros(2, dtype=torch.bool)}, TypeError, "got bool"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, r"\(2,\) or \(1,\), got \(3,\)"),
        ({"weight": torch.zeros(4, 7)}, ValueError, r"\(K, 6\).*\(K, 9\).*got \(4, 7\)"),
        ({"weight": torch.zeros(6)}, ValueError, r"got \(6,\)"),
        ({"weight": torch.zeros(4, 6, device="meta")}, RuntimeError, "on cpu.*got meta"),
        ({"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1"),
        ({"backend": "cuda"}, ValueError, "native, triton, reference.*got 'cuda'"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([0, 1])}
    arguments |= {"weight": torch.ones(4, 6)} | change
    with pytest.raises(error, match=message):
        ops.cond_instance_norm_elu(**arguments)


def test_plusplus_refuses_one_channel():
    with pytest.raises(ValueError, match="at least 2 channels"):
        ops.cond_instance_norm_elu(torch.zeros(2, 1, 4, 4), torch.tensor([0]), torch.ones(4, 3))
