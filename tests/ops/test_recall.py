"""What was chosen for a call serves the next one that looks the same, and no other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ncsn_fast import ops, use_backend
from ncsn_fast.ops import dispatch
from ncsn_fast.ops.dispatch import BackendError


@pytest.fixture(autouse=True)
def nothing_remembered():
    with use_backend("auto"):
        yield


def arguments(channels: int = 16, **options):
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, channels, 8, 8, **options),
        "labels": torch.tensor([0, 1]),
        "norm_weight": torch.rand(3, 2 * channels, **options),
        "weight": torch.randn(channels, channels, 3, 3, **options),
        "bias": torch.randn(channels, **options),
    }


def unit(**changes):
    return ops.norm_elu_conv3x3(**(arguments() | changes))


CALLS = {
    "norm_elu_conv3x3": lambda x, labels, norm_weight, weight, bias, **o: ops.norm_elu_conv3x3(
        x, labels, norm_weight, weight, bias, **o
    ),
    "cond_instance_norm_elu": lambda x, labels, norm_weight, weight, bias, **o: (
        ops.cond_instance_norm_elu(x, labels, norm_weight, **o)
    ),
    "conv3x3": lambda x, labels, norm_weight, weight, bias, **o: ops.conv3x3(x, weight, bias, **o),
    "elu_conv3x3": lambda x, labels, norm_weight, weight, bias, **o: ops.elu_conv3x3(
        x, weight, bias, **o
    ),
    "max_pool5": lambda x, labels, norm_weight, weight, bias, **o: ops.max_pool5(x, **o),
    "avg_pool5": lambda x, labels, norm_weight, weight, bias, **o: ops.avg_pool5(x, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_looks_the_same_is_not_decided_again(name, monkeypatch):
    call = CALLS[name]
    first = call(**arguments())

    def decided(*args):
        raise AssertionError("it was decided again")

    monkeypatch.setattr(dispatch, "why_not", decided)
    assert torch.equal(call(**arguments()), first)
    for other in (arguments(channels=17), arguments(dtype=torch.float64)):
        with pytest.raises(AssertionError, match="decided again"):
            call(**other)


@pytest.mark.parametrize("name", CALLS)
def test_the_policy_of_the_moment_holds(name, record_backends):
    call = CALLS[name]

    def ran(**options):
        with record_backends() as calls:
            call(**arguments(), **options)
        return {backend for _, backend in calls}

    assert ran() == {"native"}
    with use_backend("reference"):
        assert ran() == set()
        assert ran(backend="native") == {"native"}
        assert ran() == set()
    assert ran() == {"native"}
    assert ran(backend="reference") == set()
    assert ran() == {"native"}


WRONG = {
    "labels": (torch.tensor([0.0, 1.0]), TypeError, "labels must have dtype"),
    "norm_weight": (torch.rand(3, 33), ValueError, "norm_weight must have shape"),
    "weight": (torch.rand(16, 17, 3, 3), ValueError, "weight must have shape"),
    "bias": (torch.rand(15), ValueError, "bias must have shape"),
    "residual": (torch.rand(2, 16, 8, 9), ValueError, "residual must have shape"),
    "x": ([[1.0]], TypeError, "x must be a tensor, got list"),
    "eps": (-1.0, ValueError, "eps must be finite"),
    "dilation": (1.0, TypeError, "dilation"),
    "pool": ("same", ValueError, "padding must be one of"),
    "conv_algo": (["winograd"], ValueError, "conv_algo must be one of"),
    "backend": (["native"], ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_was_right_before_does_not_hide_what_is_wrong_now(name):
    unit()
    value, error, message = WRONG[name]
    for _ in range(2):  # nor is a wrong call remembered
        with pytest.raises(error, match=message):
            unit(**{name: value})
    with pytest.raises(TypeError, match="x must be a tensor, got NoneType"):
        unit(x=None)


def test_a_label_out_of_range_is_told_every_time():
    unit()
    with pytest.raises(IndexError):
        unit(labels=torch.tensor([0, 3]))


def test_other_strides_are_another_call(record_backends):
    x = arguments()["x"]
    spread = torch.zeros(2, 16, 8, 16)[..., ::2].copy_(x)
    for images, backends in ((x, {"native"}), (spread, set()), (x, {"native"})):
        with record_backends() as calls:
            y = ops.max_pool5(images)
        assert {backend for _, backend in calls} == backends
        assert torch.equal(y, F.max_pool2d(x, 5, 1, 2))
    with pytest.raises(BackendError, match="strides"):
        ops.max_pool5(spread, backend="native")


def test_autocast_is_another_call():
    x, weight = arguments()["x"], arguments()["weight"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # takes tensors of two dtypes
        mixed = ops.conv3x3(x, weight, None, backend="native")
    assert mixed.dtype in (torch.float32, torch.bfloat16)
    with pytest.raises(BackendError, match="one dtype"):
        ops.conv3x3(x, weight, None, backend="native")


def test_forward_mode_after_a_plain_call():
    x = arguments()["x"]
    plain = ops.max_pool5(x)
    y, tangent = torch.func.jvp(ops.max_pool5, (x,), (torch.ones_like(x),))
    assert torch.equal(y, plain) and torch.equal(tangent, torch.ones_like(x))


def test_a_sum_of_sizes_is_forgotten(monkeypatch):
    monkeypatch.setattr(dispatch, "_MOST_DECIDED", 3)
    for size in range(1, 12):
        ops.max_pool5(torch.zeros(1, 1, size, size))
    assert len(dispatch._decided) <= 4
