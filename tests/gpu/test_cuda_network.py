"""The network's operators on a real GPU: every fast backend against a float64 evaluation.

What can be checked without a GPU is in test_cuda_sources.py and test_triton.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.matrix import matrix
from support.tolerances import assert_forward, assert_gradient
from torch import Tensor

from ncsn_fast import NCSN, ops
from ncsn_fast.ops import dispatch, extension, reference

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NCHW, NHWC = LAYOUTS = (torch.contiguous_format, torch.channels_last)
F32, BF16, F16 = DTYPES
PLAIN, PLUSPLUS = COLUMNS = (2, 3)  # columns of the table, a channel
# Odd sizes and single pixels; planes in registers, tile by tile, and in parts; few images and many.
SHAPES = [(2, 3, 5, 7), (3, 8, 33, 31), (1, 4, 1, 1), (300, 5, 2, 2), (200, 32, 8, 8)]
SHAPES += [(8, 128, 32, 32), (3, 130, 14, 14), (1, 96, 64, 64), (40, 64, 64, 64), (2, 512, 16, 16)]
SHAPES += [(1, 32, 256, 256), (130, 1, 130, 130), (9, 2, 200, 200)]
K = 4
MARGIN = 64

# Each way through the kernels once, in the network's dtype and sizes where it has them.
NORMS = [
    (BF16, (8, 128, 32, 32), NHWC, PLAIN),
    (BF16, (8, 128, 32, 32), NCHW, PLAIN),
    (BF16, (8, 128, 32, 32), NHWC, PLUSPLUS),
    (F32, (3, 8, 33, 31), NCHW, PLAIN),
    (F32, (3, 8, 33, 31), NHWC, PLUSPLUS),
    (F32, (1, 4, 1, 1), NHWC, PLAIN),
    (F16, (300, 5, 2, 2), NCHW, PLAIN),
    (F16, (40, 64, 64, 64), NHWC, PLAIN),
    (F32, (1, 32, 256, 256), NCHW, PLAIN),
    (BF16, (1, 32, 256, 256), NHWC, PLAIN),
    (BF16, (2, 512, 16, 16), NCHW, PLUSPLUS),
]
POOLS = [
    (BF16, (8, 128, 32, 32), NHWC, "neg_inf"),
    (F32, (8, 128, 32, 32), NCHW, "zero"),
    (F16, (3, 8, 33, 31), NCHW, "neg_inf"),
    (F32, (3, 8, 33, 31), NHWC, "zero"),
    (torch.float64, (2, 3, 5, 7), NCHW, "neg_inf"),
    (BF16, (1, 4, 1, 1), NHWC, "zero"),
]

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
columns_ = pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])


@pytest.fixture(params=["native", "triton"])
def backend(request) -> str:
    """A fast backend; skips the test if it cannot serve all three operators."""
    for op in ("cond_instance_norm_elu", "max_pool5", "avg_pool5"):
        reason = dispatch.why_not(request.param, op, "cuda")
        if reason is not None:
            pytest.skip(reason)
    return request.param


def norm_inputs(shape, dtype=torch.float32, layout=torch.contiguous_format, columns=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    weight = torch.randn(K, columns * shape[1], generator=generator) + 1
    labels = torch.randint(K, shape[:1], generator=generator)
    x = x.to("cuda", dtype, memory_format=layout)
    return x, labels.cuda(), weight.to("cuda", dtype)


def gradient_like(x: Tensor) -> Tensor:
    values = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(x).copy_(values)


@pytest.fixture
def outputs_in_nan(monkeypatch):
    """What the kernels allocate is NaN, and lies in NaN that must not be touched."""
    memories: list[tuple[Tensor, int]] = []
    empty_like = torch.empty_like

    def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is not None:
            return empty_like(like, dtype=dtype).fill_(77)
        size = like.numel()
        memory = torch.full((size + 2 * MARGIN,), float("nan"), dtype=like.dtype, device="cuda")
        memories.append((memory, size))
        return memory.as_strided(like.shape, like.stride(), MARGIN)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    yield
    for memory, size in memories:
        assert memory[:MARGIN].isnan().all() and memory[MARGIN + size :].isnan().all()


# --- conditional instance norm + ELU --------------------------------------------------------------


def check_norm(backend, x, labels, weight, elu=True):
    arguments = (x.detach().requires_grad_(), labels, weight.detach().requires_grad_())
    grad_y = gradient_like(x)
    y = ops.cond_instance_norm_elu(*arguments, elu=elu, backend=backend)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    grads = torch.autograd.grad(y, arguments[::2], grad_y)

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = reference.cond_instance_norm_elu(x64, labels, weight64, 1e-5, elu)
    assert_forward(y, expected, x.dtype)
    expected = torch.autograd.grad(expected, (x64, weight64), grad_y.double())
    assert grads[0].stride() == x.stride()
    assert_gradient(grads[1], expected[1], x.dtype)
    if x.shape[2:].numel() > 1:  # of one pixel the plane's own part is 0, but for rounding / eps
        assert_gradient(grads[0], expected[0], x.dtype)
    return y, grads


@matrix("dtype, shape, layout, columns", DTYPES, SHAPES, LAYOUTS, COLUMNS, telling=NORMS)
def test_norm(backend, dtype, shape, layout, columns, outputs_in_nan, record_backends):
    if columns == 3 and shape[1] == 1:
        pytest.skip("InstanceNorm++ needs two channels")
    x, labels, weight = norm_inputs(shape, dtype, layout, columns)
    with record_backends() as ran:
        for elu in (True, False):
            check_norm(backend, x, labels, weight, elu)
        check_norm(backend, x, labels[:1], weight)
    assert {name for _, name in ran} == {backend}


@pytest.mark.parametrize("start", [MARGIN, MARGIN + 1], ids=["aligned", "misaligned"])
@layouts
def test_norm_at_an_offset(backend, layout, start):
    x, labels, weight = norm_inputs((3, 16, 16, 16), torch.bfloat16, layout)
    memory = torch.full((x.numel() + 2 * MARGIN,), float("nan"), dtype=x.dtype, device="cuda")
    inside = memory.as_strided(x.shape, x.stride(), start)
    inside.copy_(x)
    check_norm(backend, inside, labels, weight)


def test_norm_of_other_ranks(backend):
    x, labels, weight = norm_inputs((3, 4, 8, 15))
    check_norm(backend, x.flatten(2), labels, weight)
    volume = x.reshape(3, 4, 2, 4, 15)
    check_norm(backend, volume, labels, weight)
    check_norm(backend, volume.contiguous(memory_format=torch.channels_last_3d), labels, weight)


@columns_
def test_norm_second_order(backend, columns):
    x, labels, weight = norm_inputs((3, 4, 9, 9), columns=columns)
    results = []
    for name in (backend, "reference"):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = ops.cond_instance_norm_elu(inputs[0], labels, inputs[1], backend=name)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), inputs[0], create_graph=True)
        results.append(torch.autograd.grad(grad.pow(2).sum(), inputs))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
        )


@layouts
@pytest.mark.parametrize("shape", [(8, 64, 32, 32), (1, 32, 256, 256)], ids=str)
def test_norm_keeps_digits_of_a_large_mean(backend, shape, layout):
    x, labels, weight = norm_inputs(shape, layout=layout)
    x = x + 1e4
    weight = torch.cat([torch.ones(K, shape[1]), torch.zeros(K, shape[1])], dim=1).cuda()
    y = ops.cond_instance_norm_elu(x, labels, weight, elu=False, backend=backend)
    expected = F.instance_norm(x.double(), eps=1e-5)
    assert (y - expected).abs().max() < 1e-3 * expected.abs().max()


@matrix(
    "bad, size, layout, columns",
    [float("nan"), float("inf")],
    [5, 130],
    LAYOUTS,
    COLUMNS,
    telling=[(float("inf"), 5, NCHW, PLAIN), (float("inf"), 130, NHWC, PLUSPLUS)],
)
def test_norm_keeps_nan_in_its_plane(backend, bad, size, layout, columns):
    x, labels, weight = norm_inputs((2, 3, size, size), layout=layout, columns=columns)
    x[1, 2, 0, 0] = bad
    y = ops.cond_instance_norm_elu(x, labels, weight, backend=backend)
    assert torch.equal(y.isnan(), reference.cond_instance_norm_elu(x, labels, weight).isnan())


def test_elu_near_zero(backend):
    u = torch.cat([torch.linspace(-3, 0, 2**16), -torch.logspace(-40, 1, 2**14)])[None, None].cuda()
    # One plane of mean 0 and std 1 cannot hold them: beta carries u, and every plane is one pixel.
    x, weight = torch.zeros(1, u.numel(), 1, device="cuda"), torch.ones(1, 2 * u.numel()).cuda()
    weight[:, u.numel() :] = u
    y = ops.cond_instance_norm_elu(x, torch.tensor([0]).cuda(), weight, backend=backend)
    error = (y.flatten() - torch.expm1(u.double().flatten())).abs()
    # Near zero as promised; below, exp(u) - 1 has the error of the chip's exp.
    assert error[u.flatten() > -1].max() <= 1e-7 and error.max() <= 2e-7


def test_wrong_label_is_a_device_side_assertion(backend):
    script = (
        "import torch; from ncsn_fast import ops\n"
        "x, weight = torch.zeros(2, 2, 4, 4).cuda(), torch.ones(3, 4).cuda()\n"
        f"ops.cond_instance_norm_elu(x, torch.tensor([0, 3]).cuda(), weight, backend={backend!r})\n"
        "torch.cuda.synchronize()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0 and "device-side assert" in result.stderr, result.stderr


# --- 5x5 max pool ---------------------------------------------------------------------------------


@matrix(
    "dtype, shape, layout, padding",
    [*DTYPES, torch.float64],
    [*SHAPES[:6], (2, 3, 100, 300)],
    LAYOUTS,
    ["neg_inf", "zero"],
    telling=POOLS,
)
def test_pool(backend, dtype, shape, layout, padding, outputs_in_nan):
    """Exactly PyTorch's values and gradients: also of equal numbers, infinities and NaN."""
    smooth = norm_inputs(shape, torch.float32, layout)[0]
    rounded = (smooth - 2).round()
    with_nan = rounded.masked_fill(torch.rand_like(rounded) < 0.1, float("nan"))
    for values in (smooth, rounded, with_nan, torch.full_like(rounded, -float("inf"))):
        x = values.to(dtype).requires_grad_()
        y = ops.max_pool5(x, padding=padding, backend=backend)
        assert y.dtype == dtype and y.stride() == x.stride()
        expected = reference.max_pool5(x.detach(), padding)
        torch.testing.assert_close(y.detach(), expected, rtol=0, atol=0, equal_nan=True)
        grad_y = gradient_like(x.detach())
        (got,) = torch.autograd.grad(y, x, grad_y)
        # On the CPU: PyTorch's CUDA kernel adds with atomics.
        on_cpu = (grad_y.double().cpu(), x.detach().double().cpu(), padding)
        assert_gradient(got.cpu(), reference.max_pool5_backward(*on_cpu), dtype)


@pytest.mark.parametrize("start", [MARGIN, MARGIN + 1], ids=["aligned", "misaligned"])
@layouts
def test_pool_at_an_offset(backend, layout, start):
    values = norm_inputs((3, 16, 16, 16), torch.bfloat16, layout)[0]
    memory = torch.full(
        (values.numel() + 2 * MARGIN,), float("nan"), dtype=values.dtype, device="cuda"
    )
    x = memory.as_strided(values.shape, values.stride(), start)
    x.copy_(values).requires_grad_()
    y = ops.max_pool5(x, backend=backend)
    assert torch.equal(y, reference.max_pool5(values, "neg_inf"))
    grad_y = gradient_like(values)
    (got,) = torch.autograd.grad(y, x, grad_y)
    on_cpu = (grad_y.double().cpu(), values.double().cpu(), "neg_inf")
    assert_gradient(got.cpu(), reference.max_pool5_backward(*on_cpu), values.dtype)


@matrix(
    "dtype, shape, layout, start",
    [F32, BF16, F16, torch.float64],
    [*SHAPES[:6], (2, 3, 100, 300)],
    LAYOUTS,
    [MARGIN, MARGIN + 1],
    telling=[
        (BF16, (8, 128, 32, 32), NHWC, MARGIN),
        (F32, (8, 128, 32, 32), NCHW, MARGIN),
        (F16, (3, 8, 33, 31), NCHW, MARGIN + 1),
        (torch.float64, (2, 3, 5, 7), NHWC, MARGIN + 1),
    ],
)
def test_mean_pool(backend, dtype, shape, layout, start):
    """The border counted, and the pool its own gradient; NaN around the input stays out."""
    values = norm_inputs(shape, dtype, layout)[0]
    size = values.numel() + 2 * MARGIN
    memory = torch.full((size,), float("nan"), dtype=dtype, device="cuda")
    x = memory.as_strided(values.shape, values.stride(), start)
    x.copy_(values).requires_grad_()
    y = ops.avg_pool5(x, backend=backend)
    assert y.dtype == dtype and y.stride() == x.stride()
    assert_forward(y.detach(), reference.avg_pool5(values.double()), dtype)
    grad_y = gradient_like(values)
    (got,) = torch.autograd.grad(y, x, grad_y)
    assert_forward(got, reference.avg_pool5(grad_y.double()), dtype)


# --- both -----------------------------------------------------------------------------------------


def forward_and_backward(backend, x, labels, weight):
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    h = ops.cond_instance_norm_elu(inputs[0], labels, inputs[1], backend=backend)
    h = ops.max_pool5(h, padding="zero", backend=backend)
    return h, *torch.autograd.grad(h.square().sum(), inputs)


@columns_
@layouts
@pytest.mark.parametrize("shape", [(64, 64, 16, 16), (2, 24, 130, 130)], ids=str)
def test_determinism(backend, shape, layout, columns):
    inputs = norm_inputs(shape, torch.bfloat16, layout, columns)
    first = forward_and_backward(backend, *inputs)
    for _ in range(3):
        for got, expected in zip(forward_and_backward(backend, *inputs), first, strict=True):
            assert torch.equal(got, expected)


@columns_
def test_side_stream(backend, columns):
    """Everything is queued behind the work of the current stream, not of the default one."""
    x, labels, weight = norm_inputs((4, 8, 16, 16), columns=columns)
    expected = forward_and_backward(backend, x, labels, weight)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
        late.copy_(x)
        got = forward_and_backward(backend, late, labels, weight)
    side.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@columns_
@layouts
def test_graph_capture(backend, layout, columns):
    x, labels, weight = norm_inputs((4, 8, 16, 16), torch.bfloat16, layout, columns)
    state = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads: neither is allowed in a capture
        forward_and_backward(backend, state, labels, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(backend, state, labels, weight)
    for values in (x, -x):
        state.copy_(values)
        graph.replay()
        for got, expected in zip(
            captured, forward_and_backward(backend, values, labels, weight), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.slow
@layouts
def test_fullgraph(backend, layout):
    x, labels, weight = norm_inputs((4, 8, 16, 16), torch.float32, layout)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        h = ops.cond_instance_norm_elu(x * 2, labels, weight, backend=backend)
        return ops.max_pool5(h, backend=backend) + 1

    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = function(*inputs)
        assert y.is_contiguous(memory_format=layout)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def small_network() -> NCSN:
    model = NCSN(nf=16, num_classes=2)
    model.set_sigmas(NCSN.make_sigmas(1.0, 0.1, 2))
    return model.cuda()


def test_network_runs_the_fast_kernels_by_default(record_backends):
    """With no compiled CUDA kernels, a network runs on Triton and not on the reference."""
    best = {
        op: next(b for b in dispatch.AUTO["cuda"] if dispatch.why_not(b, op, "cuda") is None)
        for op in ("cond_instance_norm_elu", "max_pool5", "langevin_step_")
    }
    assert "reference" not in best.values()
    model = small_network()
    with record_backends() as ran:
        loss, _ = model.get_loss(torch.rand(2, 3, 16, 16, device="cuda"))
        loss.backward()
        model.sample(1, 16, n_steps_each=1, verbose=False)
    assert {*best.items()} <= set(ran)
    assert ("cond_instance_norm_elu_backward", best["cond_instance_norm_elu"]) in ran
    assert "reference" not in {name for _, name in ran}


def test_network_runs_on_triton_without_cuda_kernels(monkeypatch, record_backends):
    """What `auto` takes where the package was installed without nvcc."""
    if (reason := dispatch.why_not("triton", "cond_instance_norm_elu", "cuda")) is not None:
        pytest.skip(reason)
    monkeypatch.setitem(extension._status, "cuda", "not built")
    model = small_network()
    with record_backends() as ran:
        loss, _ = model.get_loss(torch.rand(2, 3, 16, 16, device="cuda"))
        loss.backward()
        model.sample(1, 16, n_steps_each=1, verbose=False)
    assert {name for _, name in ran} == {"triton"}
    assert {op for op, _ in ran} >= {
        "cond_instance_norm_elu", "cond_instance_norm_elu_backward",
        "max_pool5", "max_pool5_backward", "langevin_step_",
    }  # fmt: skip


def test_triton_compiles_once():
    """A batch size compiles nothing anew."""
    triton = pytest.importorskip("triton")
    compiled = []

    def call(n: int, layout: torch.memory_format, columns: int) -> None:
        x, labels, weight = norm_inputs((n, 32, 16, 16), torch.bfloat16, layout, columns)
        forward_and_backward("triton", x, labels, weight)

    for layout in LAYOUTS:
        for columns in (2, 3):
            call(3, layout, columns)
            with pytest.MonkeyPatch.context() as patch:
                hook = "jit_post_compile_hook"
                patch.setattr(triton.knobs.runtime, hook, lambda **call: compiled.append(call))
                for n in (1, 2, 16, 17, 64):
                    call(n, layout, columns)
    assert not compiled


@pytest.mark.slow
@pytest.mark.matrix  # takes 48 GiB, which tests beside it may hold
@layouts
def test_more_than_2_31_elements(backend, layout):
    shape = (1100, 128, 128, 128)
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    assert x.numel() > 2**31
    labels = torch.arange(shape[0], device="cuda") % K
    weight = norm_inputs((1, 128, 1, 1), torch.bfloat16)[2]
    y = ops.cond_instance_norm_elu(x, labels, weight, backend=backend)
    pooled = ops.max_pool5(x, backend=backend)
    for n in (0, 1023, 1024, 1099):
        part = x[n : n + 1].clone()
        expected = reference.cond_instance_norm_elu(part, labels[n : n + 1], weight)
        assert_forward(y[n : n + 1], expected, x.dtype)
        assert torch.equal(pooled[n : n + 1], reference.max_pool5(part))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(backend):
    """The launch follows the tensors, not the current device."""
    inputs = norm_inputs((3, 8, 16, 16), columns=3)
    expected = forward_and_backward(backend, *inputs)
    got = forward_and_backward(backend, *(t.to("cuda:1") for t in inputs))
    for a, b in zip(got, expected, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0
