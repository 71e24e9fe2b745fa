"""A sum and its norm in one pass, behind a convolution or alone: values, every gradient, biases that cancel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.backends import few
from support.tolerances import TOLERANCES, assert_forward, assert_gradient
from torch.autograd import gradcheck, gradgradcheck

from ncsn_fast import ops, use_backend
from ncsn_fast.ops import reference
from ncsn_fast.ops.extension import interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
K = 3


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format, columns=2):
    """x, bias, residual, labels and the norm's table."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator) * 2 + 0.5 for _ in range(2))
    x, residual = (t.to(dtype).contiguous(memory_format=layout) for t in (x, residual))
    bias = torch.randn(shape[1], generator=generator)
    labels = torch.randint(K, shape[:1], generator=generator)
    return x, bias, residual, labels, torch.randn(K, columns * shape[1], generator=generator) + 1


def expected_of(x, bias, residual, labels, weight):
    """In float64, as one writes it by hand."""
    z = x.double()
    z = z if bias is None else z + bias.double()[:, None, None]
    z = z if residual is None else z + residual.double()
    return z, reference.cond_instance_norm_elu(z, labels, weight.double())


@LAYOUTS
@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
@pytest.mark.parametrize("dtype", few(DTYPES), ids=str)
def test_against_float64(backend, dtype, columns, layout, record_backends):
    x, bias, residual, labels, weight = inputs((2, 3, 5, 4), dtype, layout, columns)
    for terms in ((bias, residual), (bias, None), (None, residual)):
        with record_backends() as ran:
            z, y = ops.add_norm_elu(
                x, labels, weight, bias=terms[0], residual=terms[1], backend=backend
            )
        assert (("add_norm_elu", "triton") in ran) == (backend == "triton")
        assert z.dtype == y.dtype == dtype and z.stride() == y.stride() == x.stride()
        expected_z, expected_y = expected_of(x, *terms, labels, weight)
        assert_forward(z, expected_z, dtype)
        # The norm is that of z as it was rounded: against the norm of the exact sum, twice the error.
        assert (y - expected_y).abs().max() <= 4 * TOLERANCES[
            dtype
        ].forward * expected_y.abs().max()


@LAYOUTS
def test_tile_by_tile_and_in_parts(layout, backend, monkeypatch):
    """Planes too large for registers: z is written by the first pass and read again by the second."""
    if backend == "triton":
        from ncsn_fast.kernels import planes

        small = planes.Aim(64, 64, 32, 1, 4)
        monkeypatch.setattr(planes, "AIMS", dict.fromkeys(planes.AIMS, small))
    for enough in (1, 128):
        if backend == "triton":
            monkeypatch.setattr(planes, "ENOUGH_PROGRAMS", enough)
        x, bias, residual, labels, weight = inputs((1, 3, 9, 11), torch.float32, layout)
        z, y = ops.add_norm_elu(x, labels, weight, bias=bias, residual=residual, backend=backend)
        expected_z, expected_y = expected_of(x, bias, residual, labels, weight)
        assert_forward(z, expected_z, torch.float32)
        assert_forward(y, expected_y, torch.float32)


def gradients(function, tensors):
    """Of a sum of squares of all results, and of a sum of squares of those."""
    wanted = [t.detach().requires_grad_() for t in tensors]
    total = sum(out.double().pow(2).sum() for out in function(*wanted))
    first = torch.autograd.grad(total, wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.double().pow(2).sum() for g in first), wanted)
    return [*first, *second]


@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
def test_gradients_to_second_order(backend, columns):
    x, bias, residual, labels, weight = inputs((2, 3, 3, 2), columns=columns)

    def ours(x, bias, residual, weight):
        return ops.add_norm_elu(x, labels, weight, bias=bias, residual=residual, backend=backend)

    def by_hand(x, bias, residual, weight):
        return expected_of(x, bias, residual, labels, weight)

    tensors = (x, bias, residual, weight)
    expected = gradients(by_hand, [t.double() for t in tensors])
    for got, wanted in zip(gradients(ours, tensors), expected, strict=True):
        assert_gradient(got, wanted, torch.float32)


def test_each_result_alone_has_a_gradient(backend):
    x, bias, residual, labels, weight = inputs((2, 2, 3, 2))
    for which in (0, 1):
        wanted = [t.detach().requires_grad_() for t in (x, bias, residual, weight)]
        results = ops.add_norm_elu(
            wanted[0], labels, wanted[3], bias=wanted[1], residual=wanted[2], backend=backend
        )
        got = torch.autograd.grad(results[which].pow(2).sum(), wanted, allow_unused=True)
        wide = [t.detach().double().requires_grad_() for t in wanted]
        results = expected_of(*wide[:3], labels, wide[3])
        expected = torch.autograd.grad(results[which].pow(2).sum(), wide, allow_unused=True)
        assert (got[3] is None) == (expected[3] is None) == (which == 0)
        for a, b in zip(got, expected, strict=True):
            if b is not None and not (which == 1 and b.shape == bias.shape):
                assert_gradient(a, b, torch.float32)
            elif b is not None:  # it cancels: rounding is all there is
                assert a.abs().max() < 1e-4


@pytest.mark.skipif(interpreting(), reason="of the reference")
def test_gradcheck_of_the_convolution_and_its_norm():
    generator = torch.Generator().manual_seed(1)
    wide = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    labels = torch.tensor([1, 0])

    def function(x, weight, bias, residual, norm_weight):
        return ops.conv3x3_norm_elu(x, weight, bias, labels, norm_weight, residual=residual)

    shapes = ((2, 2, 3, 3), (3, 2, 3, 3), (3,), (2, 3, 3, 3), (K, 6))
    tensors = tuple(torch.randn(shape, **wide) for shape in shapes)
    assert gradcheck(function, tensors) and gradgradcheck(function, tensors)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
def test_convolution(backend, columns, keep):
    """A bias that a plain norm alone reads is not added, and has the gradient zero, not None."""
    x, bias, _, labels, table = inputs((2, 3, 4, 4), columns=columns, layout=torch.channels_last)
    kernel = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(2)) / 4
    tensors = [t.detach().requires_grad_() for t in (x, kernel, bias, table)]
    with use_backend(backend if backend == "triton" else "auto"):
        z, y = ops.conv3x3_norm_elu(
            *tensors[:3], labels, tensors[3], dilation=2, keep=keep, conv_algo="direct"
        )
    assert (z is not None) == keep
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = F.conv2d(*wide[:3], padding=2, dilation=2)
    expected = reference.cond_instance_norm_elu(exact, labels, wide[3])
    assert_forward(y, expected, torch.float32)
    if keep:
        assert_forward(z, exact, torch.float32)
    got = torch.autograd.grad(y.pow(2).sum(), tensors)
    exact_gradients = torch.autograd.grad(expected.pow(2).sum(), wide)
    for i, (a, b) in enumerate(zip(got, exact_gradients, strict=True)):
        if i != 2 or columns == 3:
            assert_gradient(a, b, torch.float32)
        elif backend == "triton" and not keep:
            assert torch.equal(a, torch.zeros_like(bias))
        else:
            assert a.abs().max() < 1e-4


def test_opcheck(backend):
    x, bias, residual, labels, weight = inputs((1, 2, 2, 3), layout=torch.channels_last)
    namespace = torch.ops.ncsn_fast_triton if backend == "triton" else torch.ops.ncsn_fast
    for terms in ((bias, residual), (None, residual), (bias, None), (None, None)):
        torch.library.opcheck(
            namespace.add_norm_elu.default,
            (x, *terms, labels, weight, 1e-5, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.skipif(interpreting(), reason="of the graph, whatever the kernel")
def test_one_graph_without_a_break():
    x, bias, residual, labels, table = inputs((2, 3, 4, 4))
    kernel = torch.randn(3, 3, 3, 3, requires_grad=True)

    def function(x):
        z, y = ops.conv3x3_norm_elu(x, kernel, bias, labels, table, residual=residual)
        return ops.add_norm_elu(y, labels, table, bias=bias, residual=z)[1]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-5)


def test_arguments(backend):
    x, bias, residual, labels, weight = inputs((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\), got \(2,\)"):
        ops.add_norm_elu(x, labels, weight, bias=bias[:2], backend=backend)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 3, 4, 4\), got"):
        ops.add_norm_elu(x, labels, weight, residual=residual[:1], backend=backend)
    z, y = ops.add_norm_elu(x, labels, weight, backend=backend)
    assert z is x
    torch.testing.assert_close(y, reference.cond_instance_norm_elu(x, labels, weight))
    z, _ = ops.add_norm_elu(x.bfloat16(), labels, weight, residual=residual, backend=backend)
    assert z.dtype == torch.float32
    empty = ops.add_norm_elu(
        x[:0], labels[:0], weight, bias=bias, residual=residual[:0], backend=backend
    )
    assert [t.shape for t in empty] == [(0, 3, 4, 4)] * 2
