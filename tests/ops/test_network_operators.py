"""The operators of the network against a float64 evaluation: values, first and second gradients, layouts, bad input."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_forward, assert_gradient
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from ncsn_fast import ops
from ncsn_fast.ops import autograd, reference
from ncsn_fast.ops.schema import PADDINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((2, 3, 5, 7), (3, 8, 33, 31), (1, 4, 1, 1), (4, 2, 8, 8))
K = 4


def norm_inputs(shape, dtype, layout=torch.contiguous_format, columns=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    weight = torch.randn(K, columns * shape[1], generator=generator) + 1
    labels = torch.randint(K, shape[:1], generator=generator)
    x = x.to(dtype).contiguous(memory_format=layout) if len(shape) == 4 else x.to(dtype)
    return x, labels, weight.to(dtype)


def as_operator(x, labels, weight, eps=1e-5, elu=True):
    """The operator with its own autograd, whatever kernel is registered for it."""
    return autograd.CondInstanceNormELU.apply(x, labels, weight, eps, elu, "native")


def pool_as_operator(x, padding="neg_inf"):
    return autograd.MaxPool5.apply(x, padding, "native")


NORMS = pytest.mark.parametrize("norm", [ops.cond_instance_norm_elu, as_operator])
COLUMNS = pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
POOLS = pytest.mark.parametrize("pool", [ops.max_pool5, pool_as_operator])
WITH_PADDINGS = pytest.mark.parametrize("padding", ["neg_inf", "zero"])


# --- conditional instance norm + ELU --------------------------------------------------------------


def test_reference_is_the_formula():
    x, labels, weight = norm_inputs((3, 5, 6, 7), torch.float64)
    gamma, beta = weight[labels].chunk(2, dim=1)
    xhat = F.instance_norm(x, eps=1e-5)
    expected = F.elu(gamma[:, :, None, None] * xhat + beta[:, :, None, None])
    torch.testing.assert_close(ops.cond_instance_norm_elu(x, labels, weight), expected)

    x, labels, weight = norm_inputs((3, 5, 6, 7), torch.float64, columns=3)
    gamma, alpha, beta = (t[:, :, None, None] for t in weight[labels].chunk(3, dim=1))
    means = x.mean((2, 3), keepdim=True)
    m = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + 1e-5).sqrt()
    expected = gamma * (F.instance_norm(x, eps=1e-5) + alpha * m) + beta
    got = ops.cond_instance_norm_elu(x, labels, weight, elu=False)
    torch.testing.assert_close(got, expected)


@NORMS
@COLUMNS
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elu", [True, False])
def test_norm_against_float64(norm, columns, layout, shape, dtype, elu):
    x, labels, weight = norm_inputs(shape, dtype, layout, columns)
    x.requires_grad_()
    weight.requires_grad_()
    y = norm(x, labels, weight, 1e-5, elu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = reference.cond_instance_norm_elu(x64, labels, weight64, 1e-5, elu)
    assert_forward(y, expected, dtype)

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(y, (x, weight), grad)
    expected = torch.autograd.grad(expected, (x64, weight64), grad.double())
    for got, want, like in zip(grads, expected, (x, weight), strict=True):
        assert got.dtype == like.dtype
        if like is x and shape[2] * shape[3] == 1:
            continue  # the plane's own part is 0, but for rounding times 1/sqrt(eps)
        assert_gradient(got, want, dtype)


@NORMS
@COLUMNS
@pytest.mark.parametrize("elu", [True, False])
def test_norm_gradients_to_second_order(norm, columns, elu):
    x, labels, weight = norm_inputs((3, 3, 3, 4), torch.float64, columns=columns)
    inputs = (x.requires_grad_(), weight.requires_grad_())

    def call(x, weight):
        return norm(x, labels, weight, 1e-5, elu)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_norm_third_order_by_the_operator():
    """A gradient penalty is differentiated by a second derivative: nothing is taken as constant."""
    x, labels, weight = norm_inputs((2, 2, 2, 3), torch.float64)
    results = []
    for norm in (ops.cond_instance_norm_elu, as_operator):
        a = x.clone().requires_grad_()
        g = norm(a, labels, weight).pow(3).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), a, create_graph=True)
        results.append(g)
    torch.testing.assert_close(*results)


@NORMS
def test_norm_keeps_digits_of_a_large_mean(norm):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    weight = torch.cat([torch.ones(1, 3), torch.zeros(1, 3)], dim=1)
    labels = torch.zeros(2, dtype=torch.int64)
    expected = F.instance_norm(x.double(), eps=1e-5)
    got = norm(x, labels, weight, 1e-5, False)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


@NORMS
def test_norm_of_one_pixel_is_beta(norm):
    x, labels, weight = norm_inputs((2, 3, 1, 1), torch.float32)
    beta = weight[labels][:, 3:, None, None]
    torch.testing.assert_close(norm(x, labels, weight), F.elu(beta))


@NORMS
def test_norm_of_an_empty_batch(norm):
    x, labels, weight = norm_inputs((0, 3, 4, 4), torch.float32)
    x.requires_grad_()
    y = norm(x, labels, weight.requires_grad_())
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


@NORMS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_keeps_nan_in_its_plane(norm, bad):
    x, labels, weight = norm_inputs((2, 3, 4, 4), torch.float32)
    x[1, 2, 0, 0] = bad
    y = norm(x, labels, weight)
    assert y[1, 2].isnan().all()
    y[1, 2] = 0
    assert y.isfinite().all()


@NORMS
def test_norm_labels(norm):
    x, _, weight = norm_inputs((3, 2, 4, 4), torch.float32)
    one, all_ = torch.tensor([2]), torch.tensor([2, 2, 2])
    torch.testing.assert_close(norm(x, one, weight), norm(x, all_, weight), rtol=0, atol=0)
    weight.requires_grad_()
    grads = [torch.autograd.grad(norm(x, y, weight).sum(), weight)[0] for y in (one, all_)]
    torch.testing.assert_close(*grads)
    same = ops.cond_instance_norm_elu(x, one.to(torch.int32), weight)
    assert torch.equal(same, ops.cond_instance_norm_elu(x, one, weight))
    for label in (-1, K):
        with pytest.raises(IndexError):
            norm(x, torch.tensor([0, label, 1]), weight)


def test_norm_of_other_ranks_and_strides():
    for shape in ((2, 3, 9), (2, 3, 2, 3, 4)):
        x, labels, weight = norm_inputs(shape, torch.float64)
        flat = ops.cond_instance_norm_elu(x.reshape(2, 3, 1, -1), labels, weight)
        torch.testing.assert_close(ops.cond_instance_norm_elu(x, labels, weight), flat.view(shape))
    x, labels, weight = norm_inputs((2, 3, 8, 8), torch.float32)
    for view in (x[:, :, ::2, 1:5], x.transpose(2, 3), x[:, :, 1:]):
        got = ops.cond_instance_norm_elu(view, labels, weight)
        torch.testing.assert_close(
            got, ops.cond_instance_norm_elu(view.contiguous(), labels, weight)
        )


def test_norm_float32_weight_with_half_input():
    x, labels, weight = norm_inputs((2, 3, 5, 5), torch.bfloat16)
    weight = weight.float().requires_grad_()
    y = ops.cond_instance_norm_elu(x, labels, weight)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_forward_mode_is_never_silently_zero():
    x, labels, weight = norm_inputs((2, 3, 4, 4), torch.float64)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        y = ops.cond_instance_norm_elu(dual, labels, weight, backend="reference")
        got = forward_ad.unpack_dual(y).tangent
        with pytest.raises(RuntimeError, match="forward mode"):
            as_operator(dual, labels, weight)
    call = partial(ops.cond_instance_norm_elu, labels=labels, weight=weight)
    _, expected = torch.autograd.functional.jvp(call, x, tangent)
    torch.testing.assert_close(got, expected)


# --- 5x5 max pool ---------------------------------------------------------------------------------


def brute_force_pool(x, padding):
    border = 0.0 if padding == "zero" else float("-inf")
    return F.pad(x, (2, 2, 2, 2), value=border).unfold(2, 5, 1).unfold(3, 5, 1).amax((-1, -2))


@POOLS
@WITH_PADDINGS
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_against_windows(pool, padding, layout, shape, dtype):
    x = norm_inputs(shape, dtype, layout)[0].requires_grad_()
    y = pool(x, padding=padding) if pool is ops.max_pool5 else pool(x, padding)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, brute_force_pool(x, padding), rtol=0, atol=0)

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x64 = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(reference.max_pool5(x64, padding), x64, grad.double())[0]
    assert_gradient(torch.autograd.grad(y, x, grad)[0], expected, dtype)


@WITH_PADDINGS
def test_pool_gradients_to_second_order(padding):
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64).requires_grad_()
    for call in (
        partial(ops.max_pool5, padding=padding),
        partial(pool_as_operator, padding=padding),
    ):
        assert gradcheck(call, (x,))
        assert gradgradcheck(call, (x,))


@POOLS
def test_pool_ties_go_to_the_first_maximum(pool):
    x = torch.zeros(1, 1, 5, 5, requires_grad=True)
    pool(x).sum().backward()
    expected = torch.zeros(5, 5)  # the window of (i, j) begins at (max(i - 2, 0), max(j - 2, 0))
    for i in range(5):
        for j in range(5):
            expected[max(i - 2, 0), max(j - 2, 0)] += 1
    assert torch.equal(x.grad[0, 0], expected)


# --- norm + ELU + convolution ---------------------------------------------------------------------


def unit_inputs(dtype, out_channels=5):
    x, labels, norm_weight = norm_inputs((2, 3, 6, 7), dtype)
    generator = torch.Generator().manual_seed(2)
    shapes = ((out_channels, 3, 3, 3), (out_channels,), (2, out_channels, 6, 7))
    weight, bias, residual = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, labels, norm_weight, weight, bias, residual


@pytest.mark.parametrize("pool", [None, "neg_inf", "zero"])
@pytest.mark.parametrize("dilation", [1, 2, 8])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_unit_is_its_parts(pool, dilation, with_bias, with_residual):
    x, labels, norm_weight, weight, bias, residual = unit_inputs(torch.float64)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    h = reference.cond_instance_norm_elu(x, labels, norm_weight)
    if pool:
        h = brute_force_pool(h, pool)
    expected = F.conv2d(h, weight, bias, padding=dilation, dilation=dilation)
    if with_residual:
        expected = expected + residual
    got = ops.norm_elu_conv3x3(
        x, labels, norm_weight, weight, bias, dilation=dilation, residual=residual, pool=pool
    )
    torch.testing.assert_close(got, expected)


def test_unit_gradients_to_second_order():
    x, labels, norm_weight, weight, bias, residual = (
        t.requires_grad_() if t.is_floating_point() else t for t in unit_inputs(torch.float64, 2)
    )
    x, residual = x[:, :, :3, :3], residual[:, :, :3, :3]

    def call(x, norm_weight, weight, bias, residual):
        return ops.norm_elu_conv3x3(
            x, labels, norm_weight, weight, bias, dilation=2, residual=residual, pool="zero"
        )

    inputs = [t.detach().requires_grad_() for t in (x, norm_weight, weight, bias, residual)]
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


# --- the dispatcher's view ------------------------------------------------------------------------


def unit_calls():
    def channels_last(t):
        is_image = t is not None and t.dim() == 4
        return t.contiguous(memory_format=torch.channels_last) if is_image else t

    x, labels, norm_weight, weight, bias, residual = map(channels_last, unit_inputs(torch.float32))
    norm = (labels, norm_weight, *torch.ones(2, *x.shape[:2]))
    return {
        "norm_elu_conv3x3": [
            (x, labels, norm_weight, weight, bias, residual, 2, 1e-5, True),
            (x, labels, norm_weight, weight, None, None, 1, 1e-5, False),
        ],
        "conv3x3": [
            (x, weight, bias, residual, 2, False, True),
            (residual, weight, None, None, 1, True, False),
        ],
        "conv3x3_weight_gradient": [
            (residual, x, *norm, 2, True),
            (residual, x, *norm, 1, False),
            (residual, x, None, None, None, None, 1, False),
            (residual, x, None, None, None, None, 1, True),
        ],
    }


def operator_calls():
    x, labels, weight = norm_inputs((2, 3, 5, 6), torch.float32)
    plain = (x, labels, weight, 1e-5, True)
    y, mean, rstd = torch.ops.ncsn_fast.cond_instance_norm_elu(*plain)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    return {
        "cond_instance_norm_elu": [plain, (channels_last, *plain[1:])],
        "cond_instance_norm_elu_backward": [(y, x, labels, weight, mean, rstd, True)],
        "max_pool5": [(x, PADDINGS["neg_inf"]), (channels_last, PADDINGS["zero"])],
        "max_pool5_backward": [(y, x, PADDINGS["zero"]), (y, x, PADDINGS["neg_inf"])],
        **unit_calls(),
    }


@pytest.mark.parametrize("name", sorted(operator_calls()))
def test_opcheck(name):
    for arguments in operator_calls()[name]:
        torch.library.opcheck(getattr(torch.ops.ncsn_fast, name).default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [ops.cond_instance_norm_elu, as_operator])
def test_fullgraph_forward_and_backward(norm):
    x, labels, weight = norm_inputs((2, 3, 5, 6), torch.float32)

    def call(x, weight):
        h = norm(x, labels, weight, 1e-5, True)
        return ops.max_pool5(h).square().sum()

    grads = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        function(*inputs).backward()
        grads.append([t.grad for t in inputs])
    torch.testing.assert_close(*grads)


# --- bad input ------------------------------------------------------------------------------------


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
def test_norm_refuses(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([0, 1])}
    arguments |= {"weight": torch.ones(4, 6)} | change
    with pytest.raises(error, match=message):
        ops.cond_instance_norm_elu(**arguments)


def test_plusplus_refuses_one_channel():
    with pytest.raises(ValueError, match="at least 2 channels"):
        ops.cond_instance_norm_elu(torch.zeros(2, 1, 4, 4), torch.tensor([0]), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(5, 3, 5, 5)}, ValueError, r"\(O, 3, 3, 3\), got \(5, 3, 5, 5\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        ({"residual": torch.zeros(2, 5, 6, 6)}, ValueError, r"residual.*\(2, 5, 6, 7\)"),
        ({"dilation": 0}, ValueError, "dilation must be an int >= 1, got 0"),
        ({"pool": "same"}, ValueError, "padding must be one of neg_inf, zero, got 'same'"),
    ],
)
def test_unit_refuses(change, error, message):
    names = ("x", "labels", "norm_weight", "weight", "bias", "residual")
    arguments = dict(zip(names, unit_inputs(torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.norm_elu_conv3x3(**arguments)


def test_pool_refuses():
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\).*got \(3, 4, 4\)"):
        ops.max_pool5(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="got 'reflect'"):
        ops.max_pool5(torch.zeros(1, 3, 4, 4), padding="reflect")
