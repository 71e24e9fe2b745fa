"""The convolution engine on the CPU: every tile edge, dilation, layout, SIMD level and number of threads.

What every backend must do is tested in ``test_network_operators.py``; here is what can go wrong in this engine alone.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from support.tolerances import NETWORK, WINOGRAD, relative_error

from ncsn_fast import NCSN, ops
from ncsn_fast.ops import extension, reference
from ncsn_fast.ops.dispatch import BackendError

CONV = torch.ops.ncsn_fast.conv3x3.default
UNIT = torch.ops.ncsn_fast.norm_elu_conv3x3.default
WEIGHT_GRADIENT = torch.ops.ncsn_fast.conv3x3_weight_gradient.default
K = 4
CHANNELS_LAST = pytest.mark.parametrize("layout", ["nchw", "nhwc"])
# (samples, channels, height, width), outputs, dilation: whole tiles and rests of 1, 2 and 3; channels around the blocks
# of 4, 16 and 32; interleaved images of unequal sizes; more tiles than a chunk holds.
CASES = (
    ((2, 3, 5, 7), 8, 1),
    ((2, 8, 8, 8), 3, 1),
    ((1, 33, 13, 6), 35, 1),
    ((3, 16, 4, 4), 16, 1),
    ((1, 1, 1, 1), 1, 1),
    ((1, 5, 1, 30), 70, 1),
    ((2, 20, 32, 32), 32, 1),
    ((1, 32, 70, 70), 33, 1),
    ((2, 17, 9, 11), 5, 2),
    ((1, 4, 16, 16), 6, 4),
    ((2, 6, 21, 19), 4, 8),
    ((1, 3, 5, 3), 2, 8),
    ((1, 2, 6, 400), 3, 1),
)


def to_layout(t, layout="nhwc"):
    formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    return t.contiguous(memory_format=formats[layout])


def inputs(shape, outputs, layout="nhwc", columns=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator)

    n, channels, *size = shape
    x = to_layout(randn(*shape) * 2 + 0.5, layout)
    labels = torch.randint(K, (n,), generator=generator)
    norm_weight = randn(K, columns * channels) + 1
    weight = randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    residual, grad = (to_layout(randn(n, outputs, *size), layout) for _ in range(2))
    return x, labels, norm_weight, weight, randn(outputs), residual, grad


def unit(x, labels, norm_weight, weight, bias, residual, dilation=1, pool=None):
    settings = {"dilation": dilation, "residual": residual, "pool": pool}
    return ops.norm_elu_conv3x3(x, labels, norm_weight, weight, bias, **settings, backend="native")


def in_float64(x, labels, norm_weight, weight, bias, residual, dilation=1, pool=None):
    x, norm_weight, weight, bias, residual = (
        None if t is None else t.double() for t in (x, norm_weight, weight, bias, residual)
    )
    return reference.norm_elu_conv3x3(
        x, labels, norm_weight, weight, bias, residual, dilation, pool
    )


def assert_right(shape, outputs, dilation, layout="nhwc", columns=2, pool=None, parts=True):
    *arguments, _ = inputs(shape, outputs, layout, columns)
    if not parts:
        arguments[4:] = [None, None]
    y = unit(*arguments, dilation, pool)
    expected = in_float64(*arguments, dilation, pool)
    assert relative_error(y, expected) <= WINOGRAD.forward
    if layout == "nchw":
        assert y.is_contiguous() or 1 in shape[1:]
    else:
        assert y.is_contiguous(memory_format=torch.channels_last)


def gradients(call, arguments, grad, dilation=1, pool=None):
    x, labels, *rest = arguments
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *rest)]
    y = call(leaves[0], labels, *leaves[1:], dilation, pool)
    wanted = [t for t in leaves if t is not None]
    return y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))


# --- values ---------------------------------------------------------------------------------------


@CHANNELS_LAST
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, layout, record_backends):
    with record_backends() as ran:
        assert_right(*case, layout)
    assert ran == [("norm_elu_conv3x3", "native")]


def test_every_edge_of_a_tile():
    for height, width in product(range(1, 10), range(1, 10)):
        assert_right((1, 3, height, width), 5, 1)


@pytest.mark.parametrize("dilation", [2, 4, 8])
def test_every_edge_of_an_interleaved_image(dilation):
    for height, width in ((1, 1), (dilation, dilation + 1), (3 * dilation + 1, 17), (34, 33)):
        assert_right((2, 3, height, width), 5, dilation)


@pytest.mark.parametrize("pool", [None, "neg_inf", "zero"])
@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
@pytest.mark.parametrize("parts", [True, False])
def test_parts(pool, columns, parts, record_backends):
    with record_backends() as ran:
        assert_right((2, 7, 9, 10), 6, 2, columns=columns, pool=pool, parts=parts)
    composed = [
        ("cond_instance_norm_elu", "native"),
        ("max_pool5", "native"),
        ("conv3x3", "native"),
    ]
    assert ran == (composed if pool else [("norm_elu_conv3x3", "native")])


@CHANNELS_LAST
def test_convolution_alone(layout, record_backends):
    x, _, _, weight, bias, residual, _ = inputs((2, 7, 9, 10), 6, layout)
    with record_backends() as ran:
        y = ops.conv3x3(x, weight, bias, dilation=3, residual=residual, conv_algo="winograd")
    assert ran == [("conv3x3", "native")] and y.stride() == residual.stride()
    expected = reference.conv3x3(
        x.double(), weight.double(), bias.double(), residual.double(), dilation=3
    )
    assert relative_error(y, expected) <= WINOGRAD.forward


def test_the_rounding_of_many_channels():
    """Of numbers without a pattern, whose products cancel; other interpolation points would double it."""
    x, _, _, weight, *_ = inputs((1, 256, 12, 12), 32)
    y = ops.conv3x3(x, weight, None, conv_algo="winograd")
    wide = reference.conv3x3(x.double(), weight.double(), None)
    assert relative_error(y, wide) <= WINOGRAD.forward


def test_statistics_of_large_means_and_outliers():
    x, labels, norm_weight, weight, bias, residual, _ = inputs((2, 6, 40, 41), 4)
    x[:, 1] += 1e4
    x[0, 2, 0, 0] = 1e6
    x[1, 3] = 1e4 / 3
    arguments = (x, labels, norm_weight, weight, bias, residual)
    assert relative_error(unit(*arguments), in_float64(*arguments)) <= WINOGRAD.forward
    _, mean, rstd = UNIT(*arguments, 1, 1e-5, True)
    _, want_mean, want_rstd = reference.cond_instance_norm_elu_with_statistics(
        x.double(), labels, norm_weight.double(), 1e-5, True
    )
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), want_rstd, rtol=1e-5, atol=0)


def test_empty_batch():
    x, labels, norm_weight, weight, bias, residual, grad = inputs((0, 3, 6, 5), 4)
    results = gradients(unit, (x, labels, norm_weight, weight, bias, residual), grad)
    shapes = [grad.shape, x.shape, norm_weight.shape, weight.shape, bias.shape, residual.shape]
    assert [r.shape for r in results] == shapes
    assert not any(r.any() for r in results)


# --- what must not matter -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "outputs", "dilation"),
    [((1, 40, 24, 28), 70, 1), ((5, 16, 33, 32), 16, 1), ((3, 8, 20, 20), 8, 4)],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(shape, outputs, dilation):
    *arguments, grad = inputs(shape, outputs)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(gradients(unit, arguments, grad, dilation))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_sample_has_no_effect_on_another(bad, dilation):
    """Bit by bit, in any batch, whatever is in the others; tiles of small images share a chunk."""
    x, labels, norm_weight, weight, bias, residual, grad = inputs((3, 6, 7, 5), 4)
    arguments = (x, labels, norm_weight, weight, bias, residual)
    clean = gradients(unit, arguments, grad, dilation)
    alone = gradients(
        unit, (x[1:2], labels[1:2], norm_weight, weight, bias, residual[1:2]), grad[1:2], dilation
    )
    assert torch.equal(alone[0], clean[0][1:2]) and torch.equal(alone[1], clean[1][1:2])
    x[1, 2, 3, 3] = bad
    got = gradients(unit, arguments, grad, dilation)
    for which in (0, 1):  # the result and the gradient of x
        assert not got[which][1].isfinite().all()
        for other in (0, 2):
            assert torch.equal(got[which][other], clean[which][other])
    want = in_float64(*arguments, dilation)
    assert got[0][1].isnan()[want[1].isnan()].all()


def test_a_changed_weight_counts_at_once():
    """In whatever way it changes: nothing that is computed of a weight outlives a call."""
    model = torch.nn.Conv2d(5, 6, 3, padding=1)
    x, labels, norm_weight, _, _, residual, _ = inputs((1, 5, 9, 9), 6)

    def check():
        arguments = (x, labels, norm_weight, model.weight, model.bias, residual)
        error = relative_error(unit(*arguments), in_float64(*arguments))
        assert error <= WINOGRAD.forward

    check()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    unit(x, labels, norm_weight, model.weight, model.bias, residual).sum().backward()
    optimizer.step()
    check()
    other = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    model.load_state_dict(other)
    check()
    model.weight.data.mul_(3)  # the version counter does not see this
    check()
    model.weight.data = torch.randn_like(model.weight)
    check()
    with torch.no_grad():
        model.weight[2, 3, 1, 1] = 7
    check()
    model = copy.deepcopy(model)
    check()
    for _ in range(3):  # freed memory, used again at the same place
        model.weight = torch.nn.Parameter(torch.randn(6, 5, 3, 3))
        check()
    model.to(memory_format=torch.channels_last)
    check()


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def poisoned_outputs():
    """Fresh memory is NaN: an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES[:7] + CASES[8:12], ids=str)
def test_unaligned_slices_between_nans(case, poisoned_outputs):
    """Every output element is written, and nothing beside an input is read into a result."""

    def between_nans(t):
        if not t.is_floating_point():
            return t
        buffer = torch.full((t.numel() + 66,), float("nan"))
        return buffer[33:-33].as_strided(t.shape, t.stride(), storage_offset=33).copy_(t)

    shape, outputs, dilation = case
    *arguments, grad = inputs(shape, outputs)
    got = gradients(unit, [between_nans(t) for t in arguments], between_nans(grad), dilation)
    want = gradients(unit, arguments, grad, dilation)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)


def test_the_operators_guard_their_memory():
    """Direct calls, past the public function's checks."""
    x, labels, norm_weight, weight, bias, residual, grad = inputs((2, 3, 6, 5), 4)
    statistics = torch.ones(2, 2, 3).unbind()
    bad = [
        ("x", x.double()),
        ("x", x.contiguous()),
        ("x", x[0]),
        ("weight", weight[:, :2]),
        ("weight", weight[..., :2]),
        ("weight", weight.double()),
        ("bias", bias[:3]),
        ("bias", bias[:, None]),
        ("bias", bias.double()),
        ("residual", residual[:1]),
        ("residual", residual.contiguous()),
        ("dilation", 0),
    ]
    good = {"x": x, "weight": weight, "bias": bias, "residual": residual, "dilation": 1}
    for name, value in bad:
        a = good | {name: value}
        with pytest.raises(RuntimeError, match=f"{name} must"):
            CONV(**a, transposed=False, elu=False)
        with pytest.raises(RuntimeError, match=f"{name} must"):
            UNIT(labels=labels, norm_weight=norm_weight, eps=1e-5, elu=True, **a)
    with pytest.raises(RuntimeError, match="weight must"):
        CONV(x, weight, None, None, 1, True, False)
    for gradient in (grad[:1], grad.double(), grad.contiguous(), to_layout(grad[..., :3])):
        with pytest.raises(RuntimeError, match="grad_y must"):
            WEIGHT_GRADIENT(gradient, x, labels, norm_weight, *statistics, 1, True)
    for wrong in (statistics[0][:1], statistics[0].double(), statistics[0].t()):
        with pytest.raises(RuntimeError, match="must be what the forward pass returned"):
            WEIGHT_GRADIENT(grad, x, labels, norm_weight, wrong, statistics[1], 1, True)
    with pytest.raises(RuntimeError, match="must come with"):
        WEIGHT_GRADIENT(grad, x, labels, None, None, None, 1, True)
    with pytest.raises(IndexError, match=r"labels must be in 0\.\.3, got 4"):
        WEIGHT_GRADIENT(grad, x, labels * 0 + K, norm_weight, *statistics, 1, True)
    with pytest.raises(IndexError, match=r"labels must be in 0\.\.3, got 4"):
        unit(x, labels * 0 + K, norm_weight, weight, bias, residual)


# --- SIMD levels ----------------------------------------------------------------------------------


def assert_gradients_right(shape, outputs, dilation, columns=2, pool=None):
    *arguments, grad = inputs(shape, outputs, columns=columns)
    got = gradients(unit, arguments, grad, dilation, pool)
    want = gradients(in_float64, arguments, grad, dilation, pool)
    names = ("y", "x", "norm_weight", "weight", "bias", "residual")
    for name, ours, theirs in zip(names, got, want, strict=True):
        error = relative_error(ours, theirs)
        assert error <= (WINOGRAD.forward if name == "y" else WINOGRAD.gradient), (name, error)


def check_level():
    """What must hold at every SIMD level."""
    for shape, outputs, dilation in CASES[:7] + CASES[8:12]:
        assert_right(shape, outputs, dilation)
    for shape, outputs, dilation in (CASES[0], CASES[2], CASES[6], CASES[8]):
        assert_gradients_right(shape, outputs, dilation)


def test_every_simd_level():
    """Every level below this CPU's own, each in a process of its own: the level is chosen once."""
    config = extension.build_config()
    seen = {config["simd_level"]}
    for wanted in config["simd_levels"]:
        if wanted in seen:
            break
        environment = os.environ | {"NCSN_FAST_SIMD": wanted, "OMP_NUM_THREADS": "1"}
        here = os.path.dirname(__file__)
        environment["PYTHONPATH"] = os.pathsep.join([here, os.path.dirname(here), *sys.path])
        code = "import test_native_conv as t; t.check_level(); print(t.extension.build_config()['simd_level'])"
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert output.returncode == 0, output.stderr
        seen.add(output.stdout.strip())
    assert "baseline" in seen


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c[0][2:] != (1, 1)], ids=str)
def test_gradients_against_float64(case):
    assert_gradients_right(*case)


@pytest.mark.parametrize("pool", [None, "neg_inf", "zero"])
@pytest.mark.parametrize("columns", [2, 3], ids=["plain", "plusplus"])
def test_gradients_of_every_kind(pool, columns, record_backends):
    with record_backends() as ran:
        assert_gradients_right((2, 7, 9, 10), 6, 2, columns, pool)
    assert {backend for _, backend in ran} == {"native"}
    assert {name for name, _ in ran} >= {"conv3x3", "conv3x3_weight_gradient"}


def test_only_the_gradients_that_are_needed(record_backends):
    x, labels, norm_weight, weight, bias, residual, grad = inputs((2, 5, 6, 7), 4)
    want = gradients(unit, (x, labels, norm_weight, weight, bias, residual), grad)
    x.requires_grad_()
    with record_backends() as ran:
        y = unit(x, labels, norm_weight, weight, bias, residual)
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], want[1])
    assert ("conv3x3_weight_gradient", "native") not in ran
    weight.requires_grad_()
    with record_backends() as ran:
        y = unit(x.detach(), labels, norm_weight, weight, bias, residual)
        assert torch.equal(torch.autograd.grad(y, weight, grad)[0], want[3])
    assert ran == [("norm_elu_conv3x3", "native"), ("conv3x3_weight_gradient", "native")]


@CHANNELS_LAST
def test_the_gradient_may_come_in_any_layout(layout):
    *arguments, grad = inputs((2, 6, 5, 7), 4, layout)
    want = gradients(unit, arguments, grad)
    for other in (grad.contiguous(), to_layout(grad), grad.mT.contiguous().mT):
        got = gradients(unit, arguments, other)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("pool", [None, "zero"])
def test_second_order_agrees_with_the_reference(pool):
    def penalty(call, arguments, dtype):
        x, labels, *rest = arguments
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *rest)]
        y = call(leaves[0], labels, *leaves[1:], 2, pool)
        first = torch.autograd.grad(y.square().sum(), leaves[:3], create_graph=True)
        sum(g.square().mean() for g in first).backward()
        return [t.grad for t in leaves]

    *arguments, _ = inputs((2, 3, 6, 5), 4, columns=3)
    got = penalty(unit, arguments, torch.float32)
    want = penalty(in_float64, arguments, torch.float64)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) <= WINOGRAD.gradient


@pytest.mark.parametrize("kind", ["norm_elu_conv3x3", "conv3x3", "elu_conv3x3"])
def test_gradients_without_a_bias(kind):
    """First and second: autograd takes no gradient for what is not there."""
    x, labels, norm_weight, weight, _, residual, grad = inputs((2, 5, 9, 7), 6)
    call = {
        "norm_elu_conv3x3": lambda x, w, b: ops.norm_elu_conv3x3(
            x, labels, norm_weight, w, None, backend=b
        ),
        "conv3x3": lambda x, w, b: ops.conv3x3(x, w, None, residual=residual, backend=b),
        "elu_conv3x3": lambda x, w, b: ops.elu_conv3x3(x, w, None, backend=b),
    }[kind]
    results = []
    for backend in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = call(*leaves, backend)
        first = torch.autograd.grad((y * grad).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((*first, *second))
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) <= WINOGRAD.gradient


def test_forward_mode_raises():
    *arguments, _ = inputs((1, 3, 4, 4), 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with pytest.raises(BackendError, match="forward-mode"):
            unit(dual, *arguments[1:])


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, "neg_inf"])
@CHANNELS_LAST
def test_fullgraph_forward_and_backward(layout, pool):
    *arguments, grad = inputs((2, 3, 6, 5), 4, layout)
    torch.compiler.reset()
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    want = gradients(unit, arguments, grad, 2, pool)
    got = gradients(compiled, arguments, grad, 2, pool)
    torch.testing.assert_close(got, want)
    assert [t.stride() for t in got[:2]] == [t.stride() for t in want[:2]]
    with torch.no_grad():
        assert torch.equal(compiled(*arguments, 2, pool), want[0])


# --- the network ----------------------------------------------------------------------------------


def test_the_default_network(record_backends):
    torch.manual_seed(0)
    model = NCSN(sigmas=NCSN.make_sigmas(1.0, 0.01, 10)).eval()
    x, labels = torch.randn(1, 3, 32, 32), torch.tensor([7])
    with torch.no_grad(), record_backends() as ran:
        score = model(x, labels)
    units = [name for name, _ in ran if "conv3x3" in name]
    assert len(units) == 83 and {backend for _, backend in ran} == {"native"}
    assert score.is_contiguous()
    with torch.no_grad():
        rows = model(to_layout(x), labels)
        wide = model.double()(x.double(), labels)
    assert torch.equal(rows, score) and rows.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(score, wide) <= NETWORK


def test_which_algorithm(record_backends):
    def ran_by(channels, height, width, dilation, conv_algo, dtype=torch.float32):
        x, *_, weight, bias, _, _ = (t.to(dtype) for t in inputs((1, channels, height, width), 4))
        with record_backends() as ran:
            ops.conv3x3(x, weight, bias, dilation=dilation, conv_algo=conv_algo)
        return "winograd" if ran else "direct"

    for algorithm in ("direct", "winograd"):
        assert ran_by(20, 32, 32, 8, algorithm) == ran_by(2, 3, 3, 8, algorithm) == algorithm
    table = {
        (16, 32, 32, 1): "winograd",
        (16, 32, 32, 8): "winograd",
        (16, 16, 16, 8): "direct",  # images of 2x2
        (16, 33, 32, 8): "winograd",
        (3, 12, 12, 1): "winograd",
        (3, 32, 32, 1): "direct",
        (32, 1, 1, 1): "direct",
    }
    for case, expected in table.items():
        assert ran_by(*case, "auto") == expected, case
    assert ran_by(16, 32, 32, 1, "auto", torch.float64) == "direct"
    with pytest.raises(RuntimeError, match="'winograd' cannot serve conv3x3: .* in float32, got"):
        ran_by(16, 32, 32, 1, "winograd", torch.float64)
    with pytest.raises(ValueError, match="conv_algo must be one of auto, direct, winograd"):
        ran_by(16, 32, 32, 1, "fft")
