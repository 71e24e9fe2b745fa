"""The C++ kernels of the max pool against the reference in the same dtype: equal values, equal choice among equals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import deterministic

from ncsn_fast import ops, use_backend
from ncsn_fast.ops import extension, reference
from ncsn_fast.ops.schema import PADDINGS as NUMBERS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
PADDINGS = ("neg_inf", "zero")
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
NEG_INF, ZERO = NUMBERS["neg_inf"], NUMBERS["zero"]

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


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_reference(dtype, shape, layout, padding, record_backends):
    for kind in KINDS:
        x, grad_y = inputs(shape, dtype, layout, kind)
        leaf = x.clone().requires_grad_()
        with record_backends() as ran:
            y = ops.max_pool5(leaf, padding=padding)
            (grad_x,) = torch.autograd.grad(y, leaf, grad_y)
        assert ran == [("max_pool5", "native"), ("max_pool5_backward", "native")]
        for result in (y, grad_x):
            assert result.is_contiguous(memory_format=layout)
        assert_same(y, reference.max_pool5(x, padding))
        assert_same(grad_x, reference.max_pool5_backward(grad_y, x, padding))


def test_which_of_the_windows_elements_gets_the_gradient():
    """By hand, as PyTorch chooses: the first of equals, the last NaN, no border of minus infinity but one of zeros."""

    def owner(values, padding="neg_inf"):
        x = torch.tensor(values).view(1, 1, 1, -1)
        grad_y = torch.zeros_like(x)
        grad_y[..., 0] = 1  # the window of the first pixel: the first three
        return max_pool5_backward(grad_y, x, NUMBERS[padding]).flatten().tolist()

    assert owner([1.0, 2.0, 2.0, 3.0]) == [0, 1, 0, 0]
    assert owner([0.0, -0.0, 0.0, 3.0]) == [1, 0, 0, 0]
    assert owner([NAN, 5.0, NAN, NAN]) == [0, 0, 1, 0]
    assert owner([-INF, -INF, -INF, 3.0]) == [1, 0, 0, 0]
    assert owner([-INF, -1.0, -2.0, 3.0]) == [0, 1, 0, 0]
    assert owner([-3.0, -1.0, -2.0, 3.0], "zero") == [0, 0, 0, 0]
    assert owner([-3.0, 1.0, -2.0, 3.0], "zero") == [0, 1, 0, 0]
    assert owner([0.0, 0.0, -2.0, 3.0], "zero") == [0, 0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(9, 2, 40, 33), (9, 70, 36, 35), (4, 19, 6, 11)], ids=str)
def test_neither_threads_nor_the_batch_change_a_bit(shape, layout):
    """Tasks are cut by the size of the batch; an element's sum has one order all the same."""
    x, _ = inputs(shape, layout=layout)
    grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad_y = grad_y.contiguous(memory_format=layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((max_pool5(x, ZERO), max_pool5_backward(grad_y, x, ZERO)))
    finally:
        torch.set_num_threads(before)
    alone = zip(x.split(1), grad_y.split(1), strict=True)
    alone = [(max_pool5(a, ZERO), max_pool5_backward(g, a, ZERO)) for a, g in alone]
    results.append([torch.cat(samples) for samples in zip(*alone, strict=True)])
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad_x, results[0][1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 13, 19), (5, 7, 6, 9)], ids=str)
def test_every_element_is_written_and_none_outside_is_read(shape, dtype, layout):
    """Outputs begin as NaN; the inputs lie at an odd offset between NaN."""
    x, grad_y = inputs(shape, dtype, layout)
    between = []
    for t in (x, grad_y):
        memory = torch.full((t.numel() + 160,), NAN, dtype=dtype)
        between.append(memory[77:].as_strided(shape, t.stride()).copy_(t))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deterministic, "fill_uninitialized_memory", True)
            assert torch.empty(1).isnan()
            y = max_pool5(between[0], NEG_INF)
            grad_x = max_pool5_backward(between[1], between[0], NEG_INF)
    finally:
        torch.use_deterministic_algorithms(before)
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


LEVEL = """
import hashlib, sys, torch
from test_native_pool import *
assert extension.build_config()["simd_level"] == sys.argv[1], extension.build_config()
for dtype in DTYPES:
    for layout in LAYOUTS:
        for shape in SHAPES[::2]:
            x, grad_y = inputs(shape, dtype, layout, special)
            assert_same(max_pool5(x, ZERO), reference.max_pool5(x, "zero"))
            expected = reference.max_pool5_backward(grad_y, x)
            assert_same(max_pool5_backward(grad_y, x, NEG_INF), expected)
x, grad_y = inputs((2, 20, 30, 40))
grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
grad_x = max_pool5_backward(grad_y, x, ZERO)
print(hashlib.sha256(grad_x.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_every_simd_level():
    """Each in a process of its own; even sums that round are the same bits."""
    build = extension.build_config()
    levels = build["simd_levels"][: build["simd_levels"].index(build["simd_level"]) + 1]
    sums = set()
    for level in levels:
        result = subprocess.run(
            [sys.executable, "-c", LEVEL, level],
            env=os.environ
            | {
                "NCSN_FAST_SIMD": level,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{level}: {result.stderr}"
        sums.add(result.stdout)
    assert len(sums) == 1


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_to_second_order(padding, record_backends):
    x = torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)

    def call(x):
        return ops.max_pool5(x, padding=padding, backend="native")

    with record_backends() as ran:
        assert gradcheck(call, (x,))
    assert {backend for _, backend in ran} == {"native"} and len(ran) > 1
    assert gradgradcheck(call, (x,))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (0, 3, 5, 6), (2, 3, 1, 1)], ids=str)
def test_opcheck(shape, layout):
    x, grad_y = inputs(shape, layout=layout)
    for padding in NUMBERS.values():
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
