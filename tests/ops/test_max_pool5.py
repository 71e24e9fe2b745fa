"""The 5x5 max pool: equal values, and equal choice among equals, in the reference, in C++ and in Triton's interpreter.

Elsewhere: what is particular to the Triton kernels (tests/kernels), the bodies of the CUDA kernels on the CPU
(tests/csrc), results on a GPU (tests/gpu).
"""

from __future__ import annotations

import hashlib

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
from support.tolerances import assert_gradient
from torch.autograd import gradcheck, gradgradcheck

from ncsn_fast import ops, use_backend
from ncsn_fast.ops import reference
from ncsn_fast.ops.schema import PADDINGS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# From one pixel up: rows shorter than a window, no multiple of a vector, several blocks of pixels and bands of rows.
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 1, 7),
    (2, 5, 7, 1),
    (2, 2, 3, 3),
    (2, 3, 5, 7),
    (1, 4, 33, 31),
    (3, 40, 4, 9),
    (1, 33, 70, 3),
    (1, 1, 150, 17),
    (1, 2, 3, 1100),
    (1, 70, 3, 70),
    (5, 7, 8, 8),
    (0, 3, 4, 4),
)
INF, NAN = float("inf"), float("nan")
NEG_INF, ZERO = PADDINGS["neg_inf"], PADDINGS["zero"]

LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
PADDING = pytest.mark.parametrize("padding", PADDINGS)

max_pool5 = torch.ops.ncsn_fast.max_pool5.default
max_pool5_backward = torch.ops.ncsn_fast.max_pool5_backward.default


def ordinary(shape, generator):
    return torch.randn(shape, generator=generator) * 3


def tied(shape, generator):
    """Few different values, zeros of both signs, and windows with nothing above minus infinity."""
    x = torch.randn(shape, generator=generator).round()
    return torch.where(torch.rand(shape, generator=generator) < 0.6, -INF, x)


def special(shape, generator):
    x = tied(shape, generator)
    for value in (NAN, -NAN, INF):
        x[torch.rand(shape, generator=generator) < 0.03] = value
    return x


KINDS = (ordinary, tied, special)


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format, kind=ordinary):
    """x, and a grad_y of small integers, whose sums are exact in every dtype and every order."""
    generator = torch.Generator().manual_seed(0)
    x = kind(shape, generator)
    grad_y = torch.randint(-3, 4, shape, generator=generator)
    return tuple(t.to(dtype).contiguous(memory_format=layout) for t in (x, grad_y))


def assert_same(got, expected):
    """Equal numbers, zeros of equal sign, NaN where NaN is."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(got.signbit() & numbers, expected.signbit() & numbers)


@PADDING
@LAYOUT
@pytest.mark.parametrize("shape", few(SHAPES), ids=str)
@pytest.mark.parametrize("dtype", few(DTYPES), ids=str)
def test_against_windows(backend, dtype, shape, layout, padding, record_backends):
    """Values are the windows' maxima; gradients are the reference's, which are PyTorch's."""
    border = 0.0 if padding == "zero" else -INF
    for kind in KINDS:
        x, grad_y = inputs(shape, dtype, layout, kind)
        leaf = x.clone().requires_grad_()
        with record_backends() as ran:
            y = ops.max_pool5(leaf, padding=padding, backend=backend)
            (grad_x,) = torch.autograd.grad(y, leaf, grad_y)
        assert ran == expected_record(backend, "max_pool5", "max_pool5_backward")
        if (
            backend != "reference"
        ):  # PyTorch's pool of an empty batch, and its gradient, choose their own
            assert y.is_contiguous(memory_format=layout)
            assert grad_x.is_contiguous(memory_format=layout)
        windows = F.pad(x, (2, 2, 2, 2), value=border).unfold(2, 5, 1).unfold(3, 5, 1)
        torch.testing.assert_close(y, windows.amax((-1, -2)), rtol=0, atol=0, equal_nan=True)
        if backend == "native":
            assert_same(y, reference.max_pool5(x, padding))
            assert_same(grad_x, reference.max_pool5_backward(grad_y, x, padding))
        else:
            wide = reference.max_pool5_backward(grad_y.double(), x.double(), padding)
            torch.testing.assert_close(grad_x.double(), wide, rtol=0, atol=0, equal_nan=True)


@PADDING
@LAYOUT
@pytest.mark.parametrize("dtype", few(DTYPES), ids=str)
def test_sums_of_gradients_that_round(backend, dtype, layout, padding):
    x, _ = inputs((2, 3, 5, 7), dtype, layout)
    x.requires_grad_()
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = x.detach().double().requires_grad_()
    y = ops.max_pool5(x, padding=padding, backend=backend)
    expected = torch.autograd.grad(reference.max_pool5(wide, padding), wide, grad_y.double())[0]
    assert_gradient(torch.autograd.grad(y, x, grad_y)[0], expected, dtype)


def test_ties_go_to_the_first_maximum(backend):
    x = torch.zeros(1, 1, 5, 5, requires_grad=True)
    ops.max_pool5(x, backend=backend).sum().backward()
    expected = torch.zeros(5, 5)  # the window of (i, j) begins at (max(i - 2, 0), max(j - 2, 0))
    for i in range(5):
        for j in range(5):
            expected[max(i - 2, 0), max(j - 2, 0)] += 1
    assert torch.equal(x.grad[0, 0], expected)


def test_which_of_the_windows_elements_gets_the_gradient():
    """By hand, as PyTorch chooses: the first of equals, the last NaN, no border of minus infinity but one of zeros."""

    def owner(values, padding="neg_inf"):
        x = torch.tensor(values).view(1, 1, 1, -1)
        grad_y = torch.zeros_like(x)
        grad_y[..., 0] = 1  # the window of the first pixel: the first three
        return max_pool5_backward(grad_y, x, PADDINGS[padding]).flatten().tolist()

    assert owner([1.0, 2.0, 2.0, 3.0]) == [0, 1, 0, 0]
    assert owner([0.0, -0.0, 0.0, 3.0]) == [1, 0, 0, 0]
    assert owner([NAN, 5.0, NAN, NAN]) == [0, 0, 1, 0]
    assert owner([-INF, -INF, -INF, 3.0]) == [1, 0, 0, 0]
    assert owner([-INF, -1.0, -2.0, 3.0]) == [0, 1, 0, 0]
    assert owner([-3.0, -1.0, -2.0, 3.0], "zero") == [0, 0, 0, 0]
    assert owner([-3.0, 1.0, -2.0, 3.0], "zero") == [0, 1, 0, 0]
    assert owner([0.0, 0.0, -2.0, 3.0], "zero") == [0, 0, 0, 0]


@LAYOUT
@pytest.mark.parametrize("shape", [(9, 2, 40, 33), (9, 70, 36, 35), (4, 19, 6, 11)], ids=str)
def test_neither_threads_nor_the_batch_change_a_bit(shape, layout):
    """Tasks are cut by the size of the batch; an element's sum has one order all the same."""
    x, _ = inputs(shape, layout=layout)
    grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad_y = grad_y.contiguous(memory_format=layout)

    def call(x=x, grad_y=grad_y):
        return max_pool5(x, ZERO), max_pool5_backward(grad_y, x, ZERO)

    together = assert_threads_give_the_same_bits(call)
    alone = [call(*one) for one in zip(x.split(1), grad_y.split(1), strict=True)]
    for result, samples in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(result, torch.cat(samples))


@LAYOUT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 13, 19), (5, 7, 6, 9)], ids=str)
def test_every_element_is_written_and_none_outside_is_read(shape, dtype, layout):
    """Outputs begin as NaN; the inputs lie at an odd offset between NaN."""
    x, grad_y = inputs(shape, dtype, layout)
    between = [between_nans(t) for t in (x, grad_y)]
    with poisoned_outputs():
        y = max_pool5(between[0], NEG_INF)
        grad_x = max_pool5_backward(between[1], between[0], NEG_INF)
    assert_same(y, reference.max_pool5(x))
    assert_same(grad_x, reference.max_pool5_backward(grad_y, x))


def test_the_gradient_in_any_layout():
    shape = (2, 5, 6, 7)
    for layout in LAYOUTS:
        x, _ = inputs(shape, layout=layout)
        wide = torch.randint(-3, 4, (2, 5, 6, 14)).float()
        others = [wide[..., ::2], torch.ones(()).expand(shape)]
        others += [others[0].contiguous(memory_format=other) for other in LAYOUTS]
        for grad_y in others:
            got = max_pool5_backward(grad_y, x, ZERO)
            assert got.is_contiguous(memory_format=layout)
            assert_same(got, reference.max_pool5_backward(grad_y.contiguous(), x, "zero"))


def check_level():
    """What must hold at every SIMD level; a hash of sums that round."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for shape in SHAPES[::2]:
                x, grad_y = inputs(shape, dtype, layout, special)
                assert_same(max_pool5(x, ZERO), reference.max_pool5(x, "zero"))
                expected = reference.max_pool5_backward(grad_y, x)
                assert_same(max_pool5_backward(grad_y, x, NEG_INF), expected)
    x, _ = inputs((2, 20, 30, 40))
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return hashlib.sha256(max_pool5_backward(grad_y, x, ZERO).numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_every_simd_level():
    """Even sums that round are the same bits."""
    assert len(set(at_every_level("test_max_pool5"))) == 1


@PADDING
@pytest.mark.parametrize("backend", ["native", "reference"])  # in the interpreter it takes minutes
def test_gradients_to_second_order(backend, padding, record_backends):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(x):
        return ops.max_pool5(x, padding=padding, backend=backend)

    with record_backends() as ran:
        assert gradcheck(call, (x,))
    assert {name for _, name in ran} == {backend} - {"reference"}
    assert gradgradcheck(call, (x,))


@LAYOUT
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (0, 3, 5, 6), (2, 3, 1, 1)], ids=str)
def test_opcheck(shape, layout):
    x, grad_y = inputs(shape, layout=layout)
    for padding in PADDINGS.values():
        torch.library.opcheck(max_pool5, (x, padding))
        torch.library.opcheck(max_pool5_backward, (grad_y, x, padding))


@pytest.mark.slow
def test_fullgraph(record_backends):
    def call(x):
        return ops.max_pool5(x, padding="zero").square().sum()

    x, _ = inputs((2, 3, 9, 11))
    grads = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        with use_backend("native"):
            function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_the_operator_guards_its_memory():
    """Direct calls, past the public function's checks."""
    x = torch.zeros(2, 3, 4, 8)
    for bad, message in (
        (x[..., ::2], "contiguous or channels_last"),
        (x[0], "4 axes"),
        (x.int(), "floating point"),
    ):
        with pytest.raises(RuntimeError, match=message):
            max_pool5(bad, ZERO)
        with pytest.raises(RuntimeError, match=message):
            max_pool5_backward(bad, bad, ZERO)
    with pytest.raises(RuntimeError, match=r"0 \(neg_inf\) or 1 \(zero\), got 2"):
        max_pool5(x, 2)
    with pytest.raises(RuntimeError, match="shape of x"):
        max_pool5_backward(x[:, :2], x, ZERO)
    with pytest.raises(RuntimeError, match="dtype of x"):
        max_pool5_backward(x.double(), x, ZERO)
    with pytest.raises(RuntimeError, match="cannot serve max_pool5: strides"):
        ops.max_pool5(x[..., ::2], backend="native")


def test_refuses():
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\).*got \(3, 4, 4\)"):
        ops.max_pool5(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="got 'reflect'"):
        ops.max_pool5(torch.zeros(1, 3, 4, 4), padding="reflect")
