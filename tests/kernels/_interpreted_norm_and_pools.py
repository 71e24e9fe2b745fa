"""The Triton kernels of the network in Triton's interpreter, on CPU tensors, against float64.

Not collected by name: TRITON_INTERPRET=1 must be set before Triton is imported, so test_triton.py
runs this file in a process of its own. The interpreter takes some 50 ms a program: shapes are small, and
tiles are made smaller, so that small shapes go the ways of large ones.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.tolerances import assert_forward, assert_gradient
from torch.nn import functional as F

from ncsn_fast import ops
from ncsn_fast.kernels import avg_pool5 as mean_pool
from ncsn_fast.kernels import cond_instance_norm_elu as norm
from ncsn_fast.kernels import cond_instance_norm_elu_backward as norm_backward
from ncsn_fast.kernels import max_pool5 as pool
from ncsn_fast.kernels import planes
from ncsn_fast.ops import dispatch, reference
from ncsn_fast.ops.schema import PADDINGS

NCHW, NHWC = torch.contiguous_format, torch.channels_last
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, PLUSPLUS = 2, 3  # columns a channel
K = 4
IDS = {NCHW: "nchw", NHWC: "nhwc", PLAIN: "plain", PLUSPLUS: "plusplus"}
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=IDS.get)
COLUMNS = pytest.mark.parametrize("columns", [PLAIN, PLUSPLUS], ids=IDS.get)


def norm_inputs(shape, dtype=F32, layout=NCHW, columns=PLAIN):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    weight = torch.randn(K, columns * shape[1], generator=generator) + 1
    labels = torch.randint(K, shape[:1], generator=generator)
    x = x.to(dtype).contiguous(memory_format=layout) if len(shape) == 4 else x.to(dtype)
    return x, labels, weight.to(dtype)


def in_nan(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in the middle of a NaN-filled memory, with their layout, and that memory."""
    memory = torch.full((values.numel() + 64,), float("nan"), dtype=values.dtype)
    inside = memory.as_strided(values.shape, values.stride(), 32)
    inside.copy_(values)
    return inside, memory


@pytest.fixture
def outputs_in_nan(monkeypatch):
    """What the kernels allocate is NaN, and lies in NaN that must not be touched."""
    memories = []
    empty_like = torch.empty_like

    def poisoned(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        if dtype is not None:  # the places of the pool's maxima: integers
            return empty_like(like, dtype=dtype).fill_(77)
        inside, memory = in_nan(torch.full_like(like, float("nan")))
        memories.append(memory)
        return inside

    monkeypatch.setattr(torch, "empty_like", poisoned)
    yield
    assert memories
    for memory in memories:
        assert memory[:32].isnan().all() and memory[-32:].isnan().all()


def check_norm(x, labels, weight, elu=True, grad_layout=None):
    """Forward and backward against the reference in float64."""
    arguments = (in_nan(x)[0], labels, in_nan(weight)[0])
    y, mean, rstd = norm.cond_instance_norm_elu(*arguments, 1e-5, elu)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert mean.dtype == rstd.dtype == F32

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = reference.cond_instance_norm_elu(x64, labels, weight64, 1e-5, elu)
    assert_forward(y, expected, x.dtype)
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    expected_x, expected_weight = torch.autograd.grad(expected, (x64, weight64), grad_y.double())
    grad_y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(grad_y)
    if grad_layout is not None:
        grad_y = grad_y.contiguous(memory_format=grad_layout)
    grad_x, grad_weight = norm_backward.cond_instance_norm_elu_backward(
        grad_y, *arguments, mean, rstd, elu
    )
    assert grad_x.dtype == x.dtype and grad_x.stride() == x.stride()
    assert grad_weight.dtype == weight.dtype and grad_weight.is_contiguous()
    assert_gradient(grad_weight, expected_weight, x.dtype)
    if x.shape[2:].numel() > 1:  # of one pixel the plane's own part is 0, but for rounding / eps
        assert_gradient(grad_x, expected_x, x.dtype)


# --- conditional instance norm + ELU --------------------------------------------------------------


def small_tiles(monkeypatch, elements, enough=128):
    """Tiles of so many elements, so that small planes go the ways of large ones."""
    small = planes.Aim(elements, elements, 32, 1, 4)
    monkeypatch.setattr(planes, "AIMS", dict.fromkeys(planes.AIMS, small))
    monkeypatch.setattr(planes, "ENOUGH_PROGRAMS", enough)
    for module in (planes, norm):
        monkeypatch.setattr(module, "MAX_SPLITS", 4)


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_norm_of_whole_planes(dtype, layout, outputs_in_nan):
    """With a tile that covers the planes exactly, where nothing is masked, and with one that does not."""
    shape = (2, 4, 4, 8) if dtype == BF16 else (2, 3, 5, 7)
    check_norm(*norm_inputs(shape, dtype, layout))


@LAYOUTS
def test_norm_tile_by_tile(layout, outputs_in_nan, monkeypatch):
    small_tiles(monkeypatch, 64, enough=1)
    shape = (1, 3, 9, 11) if layout == NCHW else (1, 2, 8, 16)
    check_norm(*norm_inputs(shape, F32, layout))
    tile = planes.tile_for("norm", 3, 99, layout == NHWC, F32)
    assert tile.positions < 99 and planes.in_one_kernel(1, 3, 99, tile, False)


@COLUMNS
@LAYOUTS
def test_norm_in_parts(layout, columns, outputs_in_nan, monkeypatch):
    small_tiles(monkeypatch, 64)
    for module in (norm, norm_backward):
        monkeypatch.setattr(module, "CHANNEL_BLOCK", 8)
    shape = (1, 3, 9, 11) if columns == PLUSPLUS else (1, 2, 8, 16)
    check_norm(*norm_inputs(shape, F32, layout, columns))


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_plusplus(dtype, layout, outputs_in_nan):
    check_norm(*norm_inputs((2, 3, 5, 7), dtype, layout, PLUSPLUS), elu=dtype == BF16)


@COLUMNS
def test_norm_of_one_pixel_and_of_lines(columns):
    x, labels, weight = norm_inputs((2, 3, 1, 1), F32, NCHW, columns)
    check_norm(x, labels, weight)
    if columns == PLAIN:
        y = norm.cond_instance_norm_elu(x, labels, weight, 1e-5, True)[0]
        torch.testing.assert_close(y, F.elu(weight[labels][:, 3:, None, None]))
    check_norm(*norm_inputs((1, 2, 19), F32, NCHW, columns), elu=False)


@LAYOUTS
def test_gradient_of_another_layout(layout):
    check_norm(
        *norm_inputs((2, 3, 4, 5), F32, layout), grad_layout=NHWC if layout == NCHW else NCHW
    )


def test_labels_and_weight_of_any_stride():
    x, _, weight = norm_inputs((3, 2, 4, 3))
    check_norm(x, torch.tensor([1, 9, 3, 9, 0, 9])[::2], weight)
    check_norm(x, torch.tensor([2]), weight.t().contiguous().t())


def test_half_input_with_float32_weight():
    x, labels, weight = norm_inputs((2, 3, 4, 3), BF16)
    check_norm(x, labels, weight.float())


@pytest.mark.parametrize("label", [-1, 2, 2**40])
def test_wrong_label_is_not_followed(label):
    """Its rows lie in a larger table: NaN is what says that none was read. (A GPU asserts, too.)"""
    x, _, table = norm_inputs((2, 2, 3, 3))
    labels = torch.tensor([1, label])
    y = norm.cond_instance_norm_elu(x, labels, table[1:3], 1e-5, True)[0]
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("route", ["whole", "tiles", "parts"])
def test_norm_keeps_digits_of_a_large_mean(route, monkeypatch):
    if route != "whole":
        small_tiles(monkeypatch, 256, enough=1 if route == "tiles" else 128)
    x = torch.randn(1, 1, 33, 31, generator=torch.Generator().manual_seed(0)) + 1e4
    weight = torch.tensor([[1.0, 0.0]])
    got, mean, _ = norm.cond_instance_norm_elu(x, torch.tensor([0]), weight, 1e-5, False)
    expected = F.instance_norm(x.double(), eps=1e-5)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (mean - x.double().mean((2, 3))).abs() < 1e-3


@COLUMNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_keeps_nan_in_its_plane(bad, columns):
    x, labels, weight = norm_inputs((2, 2, 3, 3), F32, NCHW, columns)
    x[1, 1, 0, 0] = bad
    y = norm.cond_instance_norm_elu(x, labels, weight, 1e-5, True)[0]
    expected = reference.cond_instance_norm_elu(x, labels, weight)
    assert torch.equal(y.isnan(), expected.isnan()) and y[1, 1].isnan().all()


def test_empty_batch():
    x, labels, weight = norm_inputs((0, 3, 4, 4))
    y, mean, rstd = norm.cond_instance_norm_elu(x, labels, weight, 1e-5, True)
    grad_x, grad_weight = norm_backward.cond_instance_norm_elu_backward(
        y, x, labels, weight, mean, rstd, True
    )
    assert y.shape == grad_x.shape == x.shape and mean.shape == rstd.shape == (0, 3)
    assert not grad_weight.any()
    assert pool.max_pool5(x, 1).shape == pool.max_pool5_backward(x, x, 1).shape == x.shape


@triton.jit
def map_elu(u_ptr, y_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + lane, norm.activated(tl.load(u_ptr + lane), True, HALF))


@pytest.mark.parametrize("half", [False, True])
def test_elu_near_zero(half):
    """In half precision it is the result's rounding that counts, to an eighth of its last place."""
    tiny = -torch.logspace(-40, 2, 2**15)
    u = torch.cat([torch.linspace(-2, 0, 2**16), tiny, -tiny])
    u = torch.cat([u, torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    u = F.pad(u, (0, -len(u) % 4096))
    y = torch.empty_like(u)
    map_elu[(len(u) // 4096,)](u, y, HALF=half, BLOCK=4096)
    expected = F.elu(u.double())
    error = (y - expected).abs()[expected.isfinite() & (u <= 0)]
    allowed = torch.full_like(error, 1e-7)
    if half:
        allowed += 2.0**-14 * expected.abs()[expected.isfinite() & (u <= 0)]
    assert (error <= allowed).all()
    assert torch.equal(y[u > 0], u[u > 0])
    map_elu[(1,)](torch.full((16,), float("nan")), y, HALF=half, BLOCK=16)
    assert y[:16].isnan().all()


# --- 5x5 max pool ---------------------------------------------------------------------------------


def check_pool(x, padding):
    """Values and gradients as PyTorch's, also of equal numbers, infinities and NaN."""
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    y = pool.max_pool5(in_nan(x)[0], PADDINGS[padding])
    expected = reference.max_pool5(x, padding)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    grad_x = pool.max_pool5_backward(grad_y, in_nan(x)[0], PADDINGS[padding])
    expected = reference.max_pool5_backward(grad_y.double(), x.double(), padding)
    assert grad_x.dtype == x.dtype and grad_x.stride() == x.stride()
    assert_gradient(grad_x, expected, x.dtype)


def pool_input(shape, dtype=F32, layout=NCHW):
    """Few different numbers, most below zero, so that many windows hold equal ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) - 1
    return x.round().to(dtype).contiguous(memory_format=layout)


@LAYOUTS
@pytest.mark.parametrize("padding", ["neg_inf", "zero"])
def test_pool(padding, layout, outputs_in_nan):
    shape = (2, 2, 11, 3) if (padding == "zero") == (layout == NHWC) else (1, 3, 5, 9)
    check_pool(pool_input(shape, F32, layout), padding)


@pytest.mark.parametrize("dtype", [BF16, F16, torch.float64], ids=str)
def test_pool_dtypes(dtype):
    check_pool(pool_input((1, 2, 4, 5), dtype, NHWC), "neg_inf")


@pytest.mark.parametrize("padding", ["neg_inf", "zero"])
def test_pool_of_infinities_and_nan(padding):
    x = torch.full((1, 2, 6, 7), -float("inf"))
    x[0, 1].view(-1)[::5] = float("nan")
    x[0, 1, :2] = -float("inf")
    check_pool(x, padding)
    check_pool(pool_input((1, 1, 1, 1)), padding)


@pytest.mark.parametrize("padding", [2, -1])
def test_pool_of_an_unknown_padding(padding):
    x = pool_input((1, 1, 2, 2))
    for call in (pool.max_pool5, lambda x, padding: pool.max_pool5_backward(x, x, padding)):
        with pytest.raises(ValueError, match=rf"0 \(neg_inf\) or 1 \(zero\), got {padding}"):
            call(x, padding)


@LAYOUTS
def test_pool_64_bit_offsets(layout, monkeypatch):
    monkeypatch.setattr(pool, "INT32_ELEMENTS", 0)
    check_pool(pool_input((1, 2, 5, 4), F32, layout), "neg_inf")


# --- 5x5 average pool -----------------------------------------------------------------------------


def check_mean_pool(x):
    y = mean_pool.avg_pool5(in_nan(x)[0])
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert_forward(y, reference.avg_pool5(x.double()), x.dtype)


@LAYOUTS
def test_mean_pool(layout, monkeypatch):
    for shape in ((2, 2, 11, 3), (1, 3, 5, 9), (1, 1, 1, 1), (0, 2, 3, 3)):
        check_mean_pool(pool_input(shape, F32, layout))
    for dtype in (BF16, F16, torch.float64):
        check_mean_pool(pool_input((1, 2, 4, 5), dtype, layout))
    monkeypatch.setattr(pool, "INT32_ELEMENTS", 0)
    check_mean_pool(pool_input((1, 2, 5, 4), F32, layout))


# --- as operators ---------------------------------------------------------------------------------


def test_public_functions_run_triton(record_backends):
    x, labels, weight = norm_inputs((1, 2, 4, 3), F32, NHWC)
    results = []
    for backend in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        with record_backends() as ran:
            h = ops.cond_instance_norm_elu(inputs[0], labels, inputs[1], backend=backend)
            h = ops.avg_pool5(ops.max_pool5(h, backend=backend), backend=backend)
            (grad,) = torch.autograd.grad(h.pow(2).sum(), inputs[0], create_graph=True)
            results += [h, grad, *torch.autograd.grad(grad.pow(2).sum(), inputs)]
        assert {name for _, name in ran} <= {backend}
        if backend == "triton":
            assert {name for name, _ in ran} == {
                "cond_instance_norm_elu", "cond_instance_norm_elu_backward",
                "max_pool5", "max_pool5_backward", "avg_pool5",
            }  # fmt: skip
    for got, expected in zip(results[:4], results[4:], strict=True):
        assert_gradient(got, expected, F32)


def test_float64_is_refused_by_name():
    x, labels, weight = norm_inputs((1, 2, 3, 3), torch.float64)
    with pytest.raises(dispatch.BackendError, match="triton.*no float64"):
        ops.cond_instance_norm_elu(x, labels, weight, backend="triton")
    ops.max_pool5(x, backend="triton")
    y = ops.avg_pool5(x, backend="triton")
    assert_forward(y, reference.avg_pool5(x), torch.float64)


def test_opcheck():
    x, labels, weight = norm_inputs((1, 2, 2, 3), F32, NHWC)
    y, mean, rstd = norm.cond_instance_norm_elu(x, labels, weight, 1e-5, True)
    calls = {
        "cond_instance_norm_elu": (x, labels, weight, 1e-5, True),
        "cond_instance_norm_elu_backward": (y, x, labels, weight, mean, rstd, True),
        "avg_pool5": (x,),
        "max_pool5": (x, PADDINGS["zero"]),
        "max_pool5_backward": (y, x, PADDINGS["zero"]),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.ncsn_fast_triton, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
