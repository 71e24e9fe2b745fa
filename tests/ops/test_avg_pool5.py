"""The 5x5 average pool: values, gradients of every order, memory, bad input."""

from __future__ import annotations

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
from support.tolerances import assert_forward, assert_gradient
from torch.autograd import gradcheck, gradgradcheck

from ncsn_fast import ops, use_backend
from ncsn_fast.ops import autograd, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
LAYOUTS = pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
# From one pixel up: smaller than a window, no multiple of a vector, several blocks of pixels and bands of rows.
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 1, 7),
    (2, 5, 4, 1),
    (2, 3, 5, 7),
    (1, 4, 33, 31),
    (3, 40, 4, 9),
    (1, 1, 150, 17),
    (1, 2, 3, 2100),
    (1, 130, 3, 33),
    (2, 1030, 3, 3),
    (0, 3, 4, 4),
)
NAN = float("nan")
avg_pool5 = torch.ops.ncsn_fast.avg_pool5.default


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    both = (torch.randn(shape, generator=generator) * 3 + 1 for _ in range(2))
    return tuple(t.to(dtype).contiguous(memory_format=layout) for t in both)


def test_reference_counts_the_border():
    x = torch.ones(1, 1, 6, 7, dtype=torch.float64)
    covered = [min(i + 2, 5) - max(i - 2, 0) + 1 for i in range(6)]
    across = [min(i + 2, 6) - max(i - 2, 0) + 1 for i in range(7)]
    expected = torch.tensor(covered)[:, None] * torch.tensor(across) / 25
    torch.testing.assert_close(reference.avg_pool5(x)[0, 0], expected.double())


@LAYOUTS
@pytest.mark.parametrize("shape", few(SHAPES), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend, dtype, shape, layout, record_backends):
    x, grad_y = inputs(shape, dtype, layout)
    x.requires_grad_()
    with record_backends() as ran:
        y = ops.avg_pool5(x, backend=backend)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
    assert ran == expected_record(backend, "avg_pool5", "avg_pool5")
    assert y.dtype == grad_x.dtype == dtype
    if (
        backend != "reference"
    ):  # PyTorch's pool of an empty batch, and its gradient, choose their own
        assert y.is_contiguous(memory_format=layout)
        assert grad_x.is_contiguous(memory_format=layout)
    wide = x.detach().double().requires_grad_()
    expected = F.avg_pool2d(wide, 5, stride=1, padding=2)
    assert_forward(y, expected, dtype)
    assert_gradient(grad_x, torch.autograd.grad(expected, wide, grad_y.double())[0], dtype)


@LAYOUTS
@pytest.mark.parametrize("shape", [(9, 2, 140, 33), (9, 70, 36, 35)], ids=str)
def test_neither_threads_nor_the_batch_change_a_bit(shape, layout):
    x, _ = inputs(shape, layout=layout)
    (together,) = assert_threads_give_the_same_bits(lambda: [avg_pool5(x)])
    assert torch.equal(together, torch.cat([avg_pool5(sample) for sample in x.split(1)]))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 13, 19), (1, 130, 3, 33), (1, 1, 1, 1)], ids=str)
def test_every_element_is_written_and_none_outside_is_read(shape, dtype, layout):
    """The output begins as NaN; the input lies at an odd offset between NaN."""
    x, _ = inputs(shape, dtype, layout)
    between = between_nans(x)
    with poisoned_outputs():
        y = avg_pool5(between)
    assert_forward(y, reference.avg_pool5(x.double()), dtype)


@LAYOUTS
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_stays_in_its_windows(bad, layout):
    x, _ = inputs((2, 3, 12, 11), layout=layout)
    clean = avg_pool5(x)
    x[1, 2, 6, 4] = bad
    y = avg_pool5(x)
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[1, 2, 4:9, 2:7] = True
    assert torch.equal(y[~touched], clean[~touched])
    assert (y[touched].isnan() if bad != bad else y[touched] == bad).all()


def check_level():
    """What must hold at every SIMD level."""
    for dtype in DTYPES:
        for layout in FORMATS:
            for shape in SHAPES:
                x, _ = inputs(shape, dtype, layout)
                assert_forward(avg_pool5(x), reference.avg_pool5(x.double()), dtype)


@pytest.mark.slow
def test_every_simd_level():
    at_every_level("test_avg_pool5")


@pytest.mark.parametrize("backend", ["native", "reference"])  # in the interpreter it takes minutes
def test_gradients_to_second_order_and_the_third(backend):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(x):
        return ops.avg_pool5(x, backend=backend)

    assert gradcheck(call, (x,)) and gradgradcheck(call, (x,))
    thirds = []
    for pool in (call, reference.avg_pool5):
        g = pool(x).pow(4).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        thirds.append(g)
    torch.testing.assert_close(*thirds)


@LAYOUTS
def test_the_gradient_in_any_layout(layout):
    x, _ = inputs((2, 5, 6, 7), layout=layout)
    x.requires_grad_()
    wide = torch.randn(2, 5, 6, 14)
    for grad_y in (wide[..., ::2], torch.ones(()).expand(x.shape), wide[..., 7:].mT.clone().mT):
        (grad_x,) = torch.autograd.grad(ops.avg_pool5(x), x, grad_y)
        assert grad_x.is_contiguous(memory_format=layout)
        assert_gradient(grad_x, reference.avg_pool5(grad_y.double()), torch.float32)


@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (0, 3, 5, 6), (2, 3, 1, 1)], ids=str)
def test_opcheck(shape, layout):
    torch.library.opcheck(avg_pool5, inputs(shape, layout=layout)[:1])


@pytest.mark.slow
def test_fullgraph():
    x, _ = inputs((2, 3, 9, 11))
    grads = []

    def call(x):
        return ops.avg_pool5(x).square().sum()

    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        with use_backend("native"):
            function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_forward_mode_raises():
    x = torch.ones(1, 2, 3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="forward mode"):
            autograd.AvgPool5.apply(dual, "native")


def test_the_operator_guards_its_memory():
    """Direct calls, past the public function's checks."""
    x = torch.zeros(2, 3, 4, 8)
    for bad, message in (
        (x[..., ::2], "contiguous or channels_last"),
        (x[0], "4 axes"),
        (x.int(), "floating point"),
    ):
        with pytest.raises(RuntimeError, match=message):
            avg_pool5(bad)


def test_refuses(record_backends):
    x = torch.randn(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\).*got \(3, 4, 8\)"):
        ops.avg_pool5(x[0])
    with pytest.raises(ValueError, match=r">= 1, got \(2, 3, 0, 8\)"):
        ops.avg_pool5(x[:, :, :0])
    with pytest.raises(TypeError, match="x must have dtype float32.*got int32"):
        ops.avg_pool5(x.int())
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        ops.avg_pool5([1.0])
    with pytest.raises(RuntimeError, match="cannot serve avg_pool5: strides"):
        ops.avg_pool5(x[..., ::2], backend="native")
    with record_backends() as ran:  # what no kernel serves, the reference does
        y = ops.avg_pool5(x[..., ::2])
    assert not ran
    torch.testing.assert_close(y, ops.avg_pool5(x[..., ::2].contiguous()))
