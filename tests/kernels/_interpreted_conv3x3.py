"""The Triton convolution in Triton's interpreter, on CPU tensors, against float64.

Not collected by name: TRITON_INTERPRET=1 must be set before Triton is imported, so test_triton.py runs this file in a
process of its own. float16 alone: this interpreter multiplies the bit patterns of bfloat16 as integers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_forward, assert_gradient

from ncsn_fast import ops
from ncsn_fast.kernels import conv3x3 as conv
from ncsn_fast.ops import algorithms, dispatch, reference

LAST = torch.channels_last
HALF = torch.float16
K = 3


def inputs(channels=20, outputs=18, size=(9, 10), samples=2):
    """An input and a residual in NaN-filled memory, the weights and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((samples, channels, *size), (samples, outputs, *size))
    tensors = [torch.randn(shape, generator=generator).to(HALF) for shape in shapes]
    inside = []
    for tensor in tensors:
        tensor = tensor.contiguous(memory_format=LAST)
        memory = torch.full((tensor.numel() + 4096,), float("nan"), dtype=HALF)
        inside.append(memory.as_strided(tensor.shape, tensor.stride(), 2048).copy_(tensor))
    weight = torch.randn(outputs, channels, 3, 3, generator=generator).to(HALF) / 12
    return inside[0], weight, torch.randn(outputs, generator=generator), inside[1]


def exact(x, weight, bias, residual, dilation):
    x, weight, bias = x.double(), weight.double(), bias.double()
    return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation) + residual.double()


@pytest.mark.parametrize("dilation", [2, 8])
def test_convolution_and_its_moments(dilation):
    """Of 90 positions, in tiles of 64 and 26; 20 channels and 18 outputs are not whole tiles either."""
    x, weight, bias, residual = inputs()
    y, parts = conv.convolve(x, weight, bias, residual, dilation, dilation == 2, None, True)
    h = F.elu(x.double()) if dilation == 2 else x
    assert_forward(y, exact(h, weight, bias, residual, dilation), HALF)
    assert y.is_contiguous(memory_format=LAST) and parts.mean.shape == (2, 2, 18)
    planes = y.double().permute(0, 2, 3, 1).flatten(1, 2)
    for k, part in enumerate((planes[:, :64], planes[:, 64:])):
        torch.testing.assert_close(parts.mean[:, k].double(), part.mean(1), rtol=1e-5, atol=1e-5)
        squares = part.var(1, correction=0) * part.shape[1]
        torch.testing.assert_close(parts.squares[:, k].double(), squares, rtol=1e-5, atol=1e-5)


def test_norm_and_elu_on_the_way_in():
    """A chain of two: the moments of the first are the statistics of the norm; the border is zero after it."""
    x, weight, bias, residual = inputs(20, 20)
    middle, parts = conv.convolve(x, weight, bias, None, 1, False, None, True)
    table = torch.randn(K, 40, generator=torch.Generator().manual_seed(1)) + 1
    labels = torch.tensor([2, 0])
    norm = conv.Norm(parts, labels, table, 1e-5)
    y, none = conv.convolve(middle, weight, bias, residual, 2, True, norm)
    h = reference.cond_instance_norm_elu(middle.double(), labels, table.double())
    expected = exact(h, weight, bias, residual, 2)
    assert none is None
    # h is rounded to 16 bits before the product.
    assert (y - expected).abs().max() <= 4e-3 * expected.abs().max()


def test_a_sample_does_not_depend_on_its_batch():
    x, weight, bias, residual = inputs(16, 16, (4, 5), 3)
    together, parts = conv.convolve(x, weight, bias, residual, 1, False, None, True)
    for i in range(3):
        one = slice(i, i + 1)
        alone, its = conv.convolve(x[one], weight, bias, residual[one], 1, False, None, True)
        assert torch.equal(alone, together[one]) and torch.equal(its.mean, parts.mean[one])


def test_wrong_labels_are_not_followed():
    """Its rows lie in a larger table: NaN is what says that none was read. (A GPU asserts, too.)"""
    x, weight, bias, _ = inputs(16, 16, (4, 4), 1)
    parts = conv.Parts(torch.zeros(1, 1, 16), torch.ones(1, 1, 16), 16)
    norm = conv.Norm(parts, torch.tensor([K]), torch.ones(K + 1, 32)[:K], 1e-5)
    assert conv.convolve(x, weight, bias, None, 1, True, norm)[0].isnan().all()


def test_it_is_reached_by_name_alone(record_backends):
    """Through the public functions, with gradients; `auto` takes it nowhere."""
    x, weight, bias, residual = inputs(16, 16, (4, 5))
    bias = bias.to(HALF)
    tensors = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    with record_backends() as ran:
        y = ops.conv3x3(*tensors[:3], residual=tensors[3], dilation=2, conv_algo="gemm")
    assert ran == [("conv_direct", "triton")]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = exact(*wide, 2)
    assert_forward(y, expected, HALF)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(HALF)
    got = torch.autograd.grad(y, tensors, grad)
    for a, b in zip(got, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert_gradient(a, b, HALF)
    with record_backends() as ran:
        ops.conv3x3(x, weight, bias)
    assert ("conv_direct", "triton") not in ran
    assert not algorithms.GEMM.pays(x, 1)
    with pytest.raises(dispatch.BackendError, match="takes float16, bfloat16, got float32"):
        ops.conv3x3(x.float(), weight.float(), None, conv_algo="gemm")
    with torch.autocast("cpu", HALF):  # its casts of the parameters
        y = ops.conv3x3(x, weight.float(), bias.float(), conv_algo="gemm")
    assert torch.equal(y, ops.conv3x3(x, weight, bias, conv_algo="gemm"))
    with pytest.raises(ValueError, match="3x3 pixels"):
        conv.conv_direct(x, weight[..., :1, :1], None, None, 1, False)


def test_empty_batch_and_opcheck():
    x, weight, bias, residual = inputs(16, 16, (2, 3), 1)
    assert conv.convolve(x[:0], weight, bias, None, 1, False)[0].shape == (0, 16, 2, 3)
    torch.library.opcheck(
        torch.ops.ncsn_fast_triton.conv_direct.default,
        (x, weight, bias.half(), residual, 1, True),
        test_utils=("test_schema", "test_faketensor"),
    )
