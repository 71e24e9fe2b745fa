"""ELU and convolution without a norm, and norm and convolution without ELU: values, gradients, memory, bad input."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.cpu import assert_threads_give_the_same_bits, between_nans, poisoned_outputs
from support.tolerances import TOLERANCES, WINOGRAD, relative_error
from torch.autograd import gradcheck, gradgradcheck

from ncsn_fast import ops, use_backend
from ncsn_fast.ops import autograd, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
ELU = pytest.mark.parametrize("elu", [True, False], ids=["elu", "linear"])
POOLS = pytest.mark.parametrize("pool", [None, "neg_inf", "zero"])
# (samples, channels, height, width), outputs, dilation
CASES = (
    ((2, 3, 5, 7), 4, 1),
    ((1, 17, 33, 31), 35, 1),
    ((2, 5, 1, 1), 3, 1),
    ((2, 16, 16, 16), 16, 2),
    ((1, 6, 16, 16), 33, 4),
    ((0, 3, 4, 4), 2, 1),
)
K = 4


def inputs(shape, outputs, dtype=torch.float32, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        t = torch.randn(size, generator=generator).to(dtype)
        return t.contiguous(memory_format=layout) if t.dim() == 4 else t

    n, channels, *size = shape
    weight = (torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5).to(
        dtype
    )
    return randn(*shape), weight, randn(outputs), randn(n, outputs, *size), randn(n, outputs, *size)


def norm_of(x, columns=2):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(K, x.shape[:1], generator=generator)
    weight = torch.randn(K, columns * x.shape[1], generator=generator) + 1
    return labels, weight.to(x.dtype)


def in_float64(x, weight, bias, residual, dilation=1, pool=None, elu=True):
    x, weight, bias, residual = (
        None if t is None else t.double() for t in (x, weight, bias, residual)
    )
    return reference.elu_conv3x3(x, weight, bias, residual, dilation, pool, elu)


def ours(x, weight, bias, residual, dilation=1, pool=None, elu=True, **settings):
    return ops.elu_conv3x3(
        x, weight, bias, residual=residual, dilation=dilation, pool=pool, elu=elu, **settings
    )


def gradients(call, arguments, grad, *settings, **more):
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    y = call(*leaves, *settings, **more)
    wanted = [t for t in leaves if t is not None]
    return y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))


# --- ELU and convolution --------------------------------------------------------------------------


@ELU
def test_reference_is_the_formula(elu):
    x, weight, bias, residual, _ = inputs((2, 3, 6, 7), 4, torch.float64)
    h = F.elu(x) if elu else x
    expected = F.conv2d(F.max_pool2d(h, 5, 1, 2), weight, bias, padding=2, dilation=2) + residual
    got = reference.elu_conv3x3(x, weight, bias, residual, 2, "neg_inf", elu)
    torch.testing.assert_close(got, expected)


@ELU
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype, layout, elu):
    shape, outputs, dilation = case
    *arguments, grad = inputs(shape, outputs, dtype, layout)
    settings = (dilation, None, elu)
    tolerance = WINOGRAD if dtype == torch.float32 else TOLERANCES[dtype]
    got = gradients(ours, arguments, grad, *settings)
    want = gradients(in_float64, [t.double() for t in arguments], grad, *settings)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        assert relative_error(a, b) <= (tolerance.gradient if i else tolerance.forward)
    assert got[0].numel() == 0 or got[0].is_contiguous(memory_format=layout)


@ELU
@POOLS
@pytest.mark.parametrize("parts", [True, False], ids=["all", "bare"])
def test_parts_and_which_backend_ran(parts, pool, elu, record_backends):
    x, weight, bias, residual, _ = inputs((2, 7, 9, 10), 6)
    if not parts:
        bias = residual = None
    settings = (2, pool, elu)
    with record_backends() as ran:
        y = ours(x, weight, bias, residual, *settings, conv_algo="winograd")
    assert ran == [("max_pool5", "native")] * bool(pool) + [("conv3x3", "native")]
    assert relative_error(y, in_float64(x, weight, bias, residual, *settings)) <= WINOGRAD.forward
    for choice in ({"conv_algo": "direct"}, {"backend": "reference"}):
        with record_backends() as ran:
            y = ours(x, weight, bias, residual, *settings, **choice)
        assert ("conv3x3", "native") not in ran
        error = relative_error(y, in_float64(x, weight, bias, residual, *settings))
        assert error <= TOLERANCES[torch.float32].forward


def test_every_edge_of_a_tile():
    for height, width in product(range(1, 10), range(1, 10)):
        *arguments, _ = inputs((1, 3, height, width), 5)
        y = ours(*arguments, conv_algo="winograd")
        assert relative_error(y, in_float64(*arguments)) <= WINOGRAD.forward


def test_large_values_and_the_far_negative_side():
    """A network without norms has a stream of hundreds; there ELU is -1, and its slope 0."""
    *arguments, grad = inputs((2, 16, 9, 8), 8)
    arguments[0] = arguments[0] * 300
    got = gradients(ours, arguments, grad, conv_algo="winograd")
    want = gradients(in_float64, [t.double() for t in arguments], grad)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert relative_error(a, b) <= (WINOGRAD.gradient if i else WINOGRAD.forward)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(bad):
    *arguments, _ = inputs((3, 6, 7, 5), 4)
    clean = ours(*arguments, conv_algo="winograd")
    arguments[0][1, 2, 3, 3] = bad
    got = ours(*arguments, conv_algo="winograd")
    assert not got[1].isfinite().all()
    assert torch.equal(got[::2], clean[::2])


@ELU
def test_any_number_of_threads_gives_the_same_bits(elu):
    *arguments, grad = inputs((3, 16, 33, 32), 40)
    assert_threads_give_the_same_bits(
        lambda: gradients(ours, arguments, grad, 1, None, elu, conv_algo="winograd"), (1, 2, 3)
    )


@ELU
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_unaligned_slices_between_nans(case, elu):
    """Outputs begin as NaN, inputs lie at an odd offset between NaN."""
    shape, outputs, dilation = case
    *arguments, grad = inputs(shape, outputs)
    call = (dilation, None, elu)
    want = gradients(ours, arguments, grad, *call, conv_algo="winograd")
    with poisoned_outputs():
        poisoned = [*map(between_nans, arguments)], between_nans(grad)
        got = gradients(ours, *poisoned, *call, conv_algo="winograd")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- gradients of higher order --------------------------------------------------------------------


def by_operator(x, weight, bias, residual, elu=True):
    """With the autograd of the operators, in float64: on the reference's kernels."""
    return autograd.NormELUConv3x3.apply(
        x, None, None, weight, bias, residual, 1, 0.0, elu, "triton"
    )


@pytest.fixture
def operators_of_any_dtype():
    """The namespace without compiled kernels, on the reference."""
    from ncsn_fast.ops import schema

    library = torch.library.Library(schema.TRITON, "IMPL")
    for name in ("conv3x3", "conv3x3_weight_gradient"):
        library.impl(name, torch.no_grad()(schema.KERNELS[name]), "CPU")
    yield
    library._destroy()


@ELU
def test_gradients_to_second_order(elu, operators_of_any_dtype):
    *arguments, _ = inputs((1, 2, 3, 4), 2, torch.float64)
    leaves = [t.requires_grad_() for t in arguments]
    for call in (by_operator, lambda *a, elu: ours(*a, 1, "zero", elu)):
        assert gradcheck(lambda *a, call=call: call(*a, elu=elu), leaves)
        assert gradgradcheck(lambda *a, call=call: call(*a, elu=elu), leaves)


@ELU
def test_third_order_agrees_with_the_reference(elu):
    results = []
    for call, dtype in ((ours, torch.float32), (in_float64, torch.float64)):
        x, weight, bias, residual, _ = inputs((1, 3, 5, 6), 4)
        x = x.to(dtype).requires_grad_()
        tensors = [t.to(dtype) for t in (weight, bias, residual)]
        settings = {"conv_algo": "winograd"} if call is ours else {}
        g = call(x, *tensors, 1, None, elu, **settings).pow(4).mean()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        results.append(g)
    assert relative_error(*results) <= WINOGRAD.gradient


def test_only_the_gradients_that_are_needed(record_backends):
    *arguments, grad = inputs((2, 5, 6, 7), 4)
    want = gradients(ours, arguments, grad, conv_algo="winograd")
    x = arguments[0].clone().requires_grad_()
    with record_backends() as ran:
        y = ours(x, *arguments[1:], conv_algo="winograd")
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], want[1])
    assert ran == [("conv3x3", "native")] * 2


# --- norm and convolution without ELU -------------------------------------------------------------


@POOLS
@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
def test_norm_without_elu(columns, pool, record_backends):
    x, weight, bias, residual, grad = inputs((2, 7, 9, 10), 6)
    labels, norm_weight = norm_of(x, columns)

    def unit(x, norm_weight, weight, bias, residual):
        return ops.norm_elu_conv3x3(
            x, labels, norm_weight, weight, bias, residual=residual, pool=pool, elu=False,
            conv_algo="winograd" if x.dtype == torch.float32 else "direct",
        )  # fmt: skip

    def plain(x, norm_weight, weight, bias, residual):
        h = reference.cond_instance_norm_elu(x, labels, norm_weight, elu=False)
        h = h if pool is None else reference.max_pool5(h, pool)
        return F.conv2d(h, weight, bias, padding=1) + residual

    arguments = (x, norm_weight, weight, bias, residual)
    wide = [t.double() for t in arguments]
    with record_backends() as ran:
        got = gradients(unit, arguments, grad)
    assert {backend for _, backend in ran} == {"native"}
    assert ("norm_elu_conv3x3", "native") in ran or pool
    want = gradients(plain, wide, grad)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert relative_error(a, b) <= (WINOGRAD.gradient if i else WINOGRAD.forward)
    with use_backend("reference"):
        torch.testing.assert_close(unit(*wide), want[0])


def test_second_order_of_norm_without_elu():
    results = []
    for dtype in (torch.float32, torch.float64):
        x, weight, bias, *_ = (t.to(dtype) for t in inputs((2, 3, 5, 6), 4))
        labels, norm_weight = norm_of(x)
        x.requires_grad_()
        norm_weight.requires_grad_()
        algorithm = "winograd" if dtype == torch.float32 else "direct"
        y = ops.norm_elu_conv3x3(
            x, labels, norm_weight, weight, bias, elu=False, conv_algo=algorithm
        )
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), (x, norm_weight)))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= WINOGRAD.gradient


# --- the dispatcher's view, bad input -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, "zero"])
@LAYOUTS
def test_fullgraph_forward_and_backward(layout, pool):
    *arguments, grad = inputs((2, 3, 6, 5), 4, layout=layout)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    settings = {"pool": pool, "conv_algo": "winograd"}
    want = gradients(ours, arguments, grad, **settings)
    got = gradients(compiled, arguments, grad, **settings)
    torch.testing.assert_close(got, want)
    assert [t.stride() for t in got[:2]] == [t.stride() for t in want[:2]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, ValueError, r"\(N, C, H, W\).*got \(3, 4, 4\)"),
        ({"x": torch.zeros(2, 3, 6, 7).int()}, TypeError, "x must have dtype float32.*got int32"),
        ({"weight": torch.zeros(5, 3, 5, 5)}, ValueError, r"\(O, 3, 3, 3\), got \(5, 3, 5, 5\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        ({"residual": torch.zeros(2, 5, 6, 6)}, ValueError, r"residual.*\(2, 5, 6, 7\)"),
        ({"dilation": 0}, ValueError, "dilation must be an int >= 1, got 0"),
        ({"pool": "same"}, ValueError, "padding must be one of neg_inf, zero, got 'same'"),
        ({"conv_algo": "fft"}, ValueError, "conv_algo must be one of.*got 'fft'"),
        ({"backend": "cuda"}, ValueError, "native, triton, reference.*got 'cuda'"),
    ],
)
def test_refuses(change, error, message):
    x, weight, bias, residual, _ = inputs((2, 3, 6, 7), 5)
    arguments = {"x": x, "weight": weight, "bias": bias, "residual": residual} | change
    with pytest.raises(error, match=message):
        ops.elu_conv3x3(**arguments)
