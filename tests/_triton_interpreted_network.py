"""The Triton kernels of the network's operators in Triton's interpreter, on CPU tensors, against float64.

Not collected by name: TRITON_INTERPRET=1 must be set before Triton is imported, so test_triton.py
runs this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from tolerances import assert_forward, assert_gradient

from ncsn_fast import ops
from ncsn_fast.kernels import cond_instance_norm_elu as norm
from ncsn_fast.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
K = 4

# How the kernels go about it: by the sizes of tiles, which are made small so that images can be.
ROUTES = {
    "whole planes": {},
    "tile by tile": {"TILE": 64, "SMALL_TILE": 64, "ENOUGH_PROGRAMS": 1},
    "in parts": {"TILE": 64, "SMALL_TILE": 64, "MAX_SPLITS": 4, "CHANNEL_BLOCK": 4},
}


@pytest.fixture(params=ROUTES, ids=lambda name: name.replace(" ", "_"))
def route(request, monkeypatch) -> str:
    for name, value in ROUTES[request.param].items():
        monkeypatch.setattr(norm, name, value)
    return request.param


def norm_inputs(shape, dtype=torch.float32, layout=torch.contiguous_format, columns=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    weight = torch.randn(K, columns * shape[1], generator=generator) + 1
    labels = torch.randint(K, shape[:1], generator=generator)
    x = x.to(dtype).contiguous(memory_format=layout) if len(shape) == 4 else x.to(dtype)
    return x, labels, weight.to(dtype)


def inside_nan(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in the middle of a NaN-filled memory, with their layout, and that memory."""
    memory = torch.full((values.numel() + 64,), float("nan"), dtype=values.dtype)
    inside = memory.as_strided(values.shape, values.stride(), 32)
    inside.copy_(values)
    return inside, memory


@pytest.fixture
def poison(monkeypatch):
    """Kernels find NaN around what they read and in what they write; checks what lies around it."""
    memories = []

    def empty_like(values: torch.Tensor) -> torch.Tensor:
        inside, memory = inside_nan(torch.full_like(values, float("nan")))
        memories.append(memory)
        return inside

    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield lambda values: inside_nan(values)[0]
    for memory in memories:
        assert memory[:32].isnan().all() and memory[-32:].isnan().all()


def check_norm(x, labels, weight, elu, poison, dtype=None):
    """Forward and backward against the reference in float64."""
    dtype = dtype or x.dtype
    y, mean, rstd = norm.cond_instance_norm_elu(poison(x), labels, poison(weight), 1e-5, elu)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert mean.dtype == rstd.dtype == torch.float32

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = reference.cond_instance_norm_elu(x64, labels, weight64, 1e-5, elu)
    assert_forward(y, expected, dtype)
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    grad_x, grad_weight = norm.cond_instance_norm_elu_backward(
        grad_y, poison(x), labels, poison(weight), mean, rstd, elu
    )
    assert grad_x.dtype == x.dtype and grad_x.stride() == x.stride()
    assert grad_weight.dtype == weight.dtype and grad_weight.is_contiguous()
    expected_x, expected_weight = torch.autograd.grad(expected, (x64, weight64), grad_y.double())
    assert_gradient(grad_weight, expected_weight, dtype)
    if x.shape[2:].numel() > 1:  # of one pixel the plane's own part is 0, times 1/sqrt(eps)
        assert_gradient(grad_x, expected_x, dtype)
    again = norm.cond_instance_norm_elu_backward(grad_y, x, labels, weight, mean, rstd, elu)
    assert torch.equal(again[0], grad_x) and torch.equal(again[1], grad_weight)


@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 10, 9, 11), (1, 4, 1, 1)], ids=str)
def test_norm(route, shape, layout, columns, poison):
    for dtype in DTYPES:
        elu = dtype != torch.float16
        check_norm(*norm_inputs(shape, dtype, layout, columns), elu, poison)
